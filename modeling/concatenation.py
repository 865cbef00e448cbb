"""The code bundle's files, made from the installed source: the modules of each room, one after the other in one file.

What changes on the way is what one file asks for. The imports that modules start with come together at its top, without
those from the same room; those from another room name its file. A module that is used as a namespace
(`losses.balance_loss`) is the file that holds it. All else stays as it was written, under a line that names the module.
Nothing is executed.

A room in one file has one namespace, so its modules may not use one name for two things; that is checked.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import takewhile
from symtable import symtable
from typing import NamedTuple

from st_moe.configuration.configuration_st_moe import installed_version

_PACKAGE = __name__.partition(".")[0]
_LINE_LENGTH = 120
#: What every module may say for itself: one file has one logger.
_LOGGER = "logger = logging.get_logger(__name__)"


class _Module(NamedTuple):
    """A module's source, and its statements: those that it starts with, docstring and imports, and those after them."""

    name: str
    source: str
    head: Sequence[ast.stmt]
    body: Sequence[ast.stmt]


def concatenated(roots: Iterable[str]) -> dict[str, str]:
    """Name and text of one file per room.

    Args:
        roots: modules that the files have to hold, with all that these import from this package.

    Raises:
        ValueError: when two modules of a room cannot stand in one file.
    """
    modules: dict[str, _Module] = {}
    begun: set[str] = set()
    for name in roots:
        _collect(name, modules, begun)
    # What a package says about its room comes last there.
    for name in sorted({_room(name) for name in modules}):
        _collect(name, modules, begun)
    rooms: dict[str, list[_Module]] = {}
    for module in modules.values():
        rooms.setdefault(_room(module.name), []).append(module)
    return {f"{_file(room)}.py": _text(room, rooms[room]) for room in sorted(rooms)}


# Modules.


@lru_cache
def _source(module: str) -> str | None:
    """Source of a module, which is not imported; None where the name is no module's, but one inside of a module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None else spec.loader.get_source(module)  # type: ignore[union-attr]


@lru_cache
def _room(module: str) -> str:
    """The package that a module is or lies in."""
    spec = importlib.util.find_spec(module)
    return str(spec.parent) if spec is not None else module


def _file(room: str) -> str:
    """The file of a room, without its suffix."""
    return f"{_PACKAGE}_{room.rpartition('.')[2]}"


def _is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_PACKAGE}.")


def _home(node: ast.ImportFrom, alias: ast.alias) -> str:
    """The module that one name of an import is, or else is from."""
    package, inner = str(node.module), f"{node.module}.{alias.name}"
    # A package may bind the name of one of its modules to something else.
    is_module = _source(inner) is not None and alias.name not in set(_bound(_source(package) or ""))
    return inner if is_module else package


def _homes(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """The modules of this package that statements import from, at any depth."""
    for node in (inner for outer in statements for inner in ast.walk(outer)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node):
            yield from (_home(node, alias) for alias in node.names)


def _starts_module(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, an import, or the imports for type checkers."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom) or _is_for_types(node)


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _parsed(name: str, source: str) -> _Module:
    statements = ast.parse(source).body
    head = list(takewhile(_starts_module, statements))
    return _Module(name, source, head, statements[len(head) :])


def _collect(name: str, modules: dict[str, _Module], begun: set[str]) -> None:
    """Add a module, after what it imports when it is imported, and before what it imports later."""
    source = None if name in begun else _source(name)
    if source is None:
        return
    begun.add(name)
    module = _parsed(name, source)
    for home in _homes(node for node in module.head if not _is_for_types(node)):
        _collect(home, modules, begun)
    modules[name] = module
    for home in _homes([*module.head, *module.body]):
        _collect(home, modules, begun)


# Statements.


def _rewritten(node: ast.Import | ast.ImportFrom, room: str) -> Iterator[str]:
    """An import as statements of the room's file, one for each name that it binds and the file does not have anyway."""
    for alias in node.names:
        bound, text = alias.asname or alias.name, ast.unparse(alias)
        if not (isinstance(node, ast.ImportFrom) and _is_ours(node)):
            yield f"from {node.module} import {text}" if isinstance(node, ast.ImportFrom) else f"import {text}"
            continue
        home = _home(node, alias)
        is_module, file = home != node.module, _file(_room(home))
        if _room(home) != room:
            yield f"from . import {file} as {bound}" if is_module else f"from .{file} import {text}"
        elif is_module:
            yield from ("import sys", f"{bound} = sys.modules[__name__]")
        elif bound != alias.name:
            yield f"{bound} = {alias.name}"


def _first_imports(module: _Module) -> list[str]:
    """The imports that a module starts with, rewritten."""
    nodes = [node for outer in module.head for node in ast.walk(outer)]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return [statement for node in imports for statement in _rewritten(node, _room(module.name))]


def _body(module: _Module) -> str:
    """Text of what follows a module's imports, with the empty lines before it."""
    # What only an installed package can say. The registry's own routers are in the file that looks one up.
    elsewhere = {
        f"importlib.metadata.version('{_PACKAGE}')": f'"{installed_version()}"',
        "import_module(module)": f'import_module(__name__ if module.startswith("{_PACKAGE}.") else module)',
    }
    # Columns of the tree count bytes.
    lines = module.source.encode().splitlines(keepends=True)
    nodes = [node for outer in module.body for node in ast.walk(outer) if isinstance(node, ast.ImportFrom | ast.Call)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        if isinstance(node, ast.ImportFrom) and _is_ours(node):
            text = ("\n" + " " * node.col_offset).join(_rewritten(node, _room(module.name)))
        elif ast.unparse(node) in elsewhere:
            text = elsewhere[ast.unparse(node)]
        else:
            continue
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        line = lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]
        lines[first : last + 1] = [line] if line.strip() else []
    start = max((node.end_lineno or 0 for node in module.head), default=0)
    return b"".join(lines[start:]).decode()


# Files.


def _text(room: str, modules: Sequence[_Module]) -> str:
    """The file of a room: header, docstring, imports, and a section for each module."""
    _check_names(room, modules)
    imports: set[str] = set()
    sections = []
    for module in modules:
        statements = _first_imports(module)
        imports |= {each for each in statements if each.startswith(("from ", "import "))}
        aliases = "\n".join(each for each in statements if each not in imports)
        docstrings = [ast.get_source_segment(module.source, node) for node in module.head if isinstance(node, ast.Expr)]
        own = "" if module.name == room else "\n".join(map(str, docstrings))
        start = "\n\n".join(part for part in (f"# {'-' * 60} {module.name}", own, aliases) if part)
        sections.append(f"{start}\n{_body(module)}".rstrip("\n"))
    words = set(re.findall(r"\w+", "".join(sections)))
    needed = [each for each in imports if each.startswith("from __future__") or words.issuperset(_bound(each))]
    docstring = next(ast.get_docstring(ast.parse(module.source)) for module in modules if module.name == room)
    start = (
        f"# Generated from {room} of {_PACKAGE} {installed_version()} (licence: Apache-2.0); do not edit.\n"
        f'# Saving a model with bundle_code=True makes it anew.\n"""{docstring}"""\n\n{_merged(needed)}'
    )
    return "\n\n\n".join([start, *sections]) + "\n"


def _merged(imports: Iterable[str]) -> str:
    """Imports of single names as one statement per module: `__future__`, standard library, others, this folder."""
    names: dict[tuple[int, str], list[str]] = {}
    for statement in imports:
        start, _, name = statement.rpartition("import ")
        origin = start.removeprefix("from ").strip()
        library = (origin or name).partition(".")[0]
        group = 3 if origin.startswith(".") else 2 - (library in sys.stdlib_module_names)
        names.setdefault((0 if origin == "__future__" else group, start), []).append(name)
    groups: dict[int, list[str]] = {}
    for (group, start), found in sorted(names.items()):
        line = f"{start}import {', '.join(sorted(found))}"
        if not start:
            line = "\n".join(f"import {name}" for name in sorted(found))
        elif len(line) > _LINE_LENGTH:
            line = f"{start}import (\n" + "".join(f"    {name},\n" for name in sorted(found)) + ")"
        groups.setdefault(group, []).append(line)
    return "\n\n".join("\n".join(lines) for lines in groups.values())


def _check_names(room: str, modules: Sequence[_Module]) -> None:
    """See that every name at the top of the room's modules means one thing, and so do annotations."""
    meanings = dict.fromkeys(dir(builtins), ("", "builtins"))
    futures = {}
    for module in modules:
        imports = _first_imports(module)
        if module.name != room:
            futures[tuple(each for each in imports if each.startswith("from __future__"))] = module.name
        statements = [*imports, *map(ast.unparse, module.body)]
        for statement, name in ((each, name) for each in statements for name in _bound(each)):
            meaning, other = meanings.setdefault(name, (statement, module.name))
            # Two equal statements may still make two things, such as empty dictionaries.
            same = meaning == statement and (statement in imports or statement == _LOGGER)
            if other != module.name and not same:
                raise ValueError(
                    f"{name}: must mean one thing in the modules of {room}, which a bundle holds in one file, got one "
                    f"in {other} and another in {module.name}; rename one"
                )
    if len(futures) > 1:
        raise ValueError(
            f"from __future__: must be the same in the modules of {room}, which a bundle holds in one file, got "
            f"differences between {' and '.join(futures.values())}"
        )


def _bound(statement: str) -> Iterator[str]:
    """Names that a statement binds at the top of a module."""
    for symbol in symtable(statement, "", "exec").get_symbols():
        if symbol.is_assigned() or symbol.is_imported():
            yield symbol.get_name()
