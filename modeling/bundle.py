"""A mixture's code beside its weights: flat files, made from the installed source, that load without this package.

Transformers loads them with `trust_remote_code=True`, and its ways decide their form. It copies the files that a file
names as `from .name import`, so modules become files of one folder, with an entry that names them all. It gives
each entry of `auto_map` a folder after the content of the files it needs, and classes from two folders are strangers to
each other, so all Auto classes share one entry.

This lives in the modeling room, not above it, because a model saves itself, and because all that it reads is the source
of this room and of the one below. It is part of the bundle: what was loaded from one is saved with its code again.
Nothing of the bundle is executed while it is written.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from transformers import CONFIG_MAPPING

from st_moe.configuration import ROUTER_TYPES, STMoEConfig
from st_moe.configuration.configuration_st_moe import installed_version

_OWN_NAME = "st_moe.modeling.bundle"
_PACKAGE = _OWN_NAME.partition(".")[0]

#: Whether this module is a file of a bundle.
IN_BUNDLE = __name__ != _OWN_NAME

#: The file, without its suffix, that `auto_map` names.
ENTRY = "st_moe_bundle"


def import_module(name: str) -> ModuleType:
    """As `importlib.import_module`; in a bundle, the modules of this package are its files."""
    if IN_BUNDLE and _is_ours(name):
        return importlib.import_module(f".{_file(name)}", __package__)
    return importlib.import_module(name)


def auto_map() -> dict[str, str]:
    """`auto_map` of a bundled config: Auto class -> entry and class."""
    from st_moe.modeling.families import KINDS

    models = {auto_class.__name__: f"{ENTRY}.{public.__name__}" for public, _, auto_class in KINDS}
    return {"AutoConfig": f"{ENTRY}.{STMoEConfig.__name__}", **models}


def check_bundle(router_type: str, dense_model_type: str) -> None:
    """See that a mixture needs no code beside the bundle and Transformers.

    Raises:
        ValueError: when its router or its dense family was registered from elsewhere.
    """
    places = {
        "router_type": (router_type, ROUTER_TYPES[router_type].path, f"{_PACKAGE}."),
        "dense_model_type": (dense_model_type, CONFIG_MAPPING[dense_model_type].__module__, "transformers."),
    }
    for field, (value, place, home) in places.items():
        if not place.startswith(home):
            raise ValueError(
                f"{field}: must be one of {home[:-1]}'s own to bundle code, got {value!r} from {place}, which a bundle "
                "would lack; save with bundle_code=False"
            )


def write_bundle(folder: str | os.PathLike[str]) -> None:
    """Write the bundle into the folder of a saved mixture, and `auto_map` into the config there, last.

    Raises:
        ValueError: when the folder holds no mixture's config, or one that `check_bundle` refuses; nothing is written.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != STMoEConfig.model_type:
        raise ValueError(f"folder: must hold the config.json of a saved mixture to bundle code, got {folder}")
    # A saved config leaves defaults out.
    check_bundle(*(config.get(name, getattr(STMoEConfig, name)) for name in ("router_type", "dense_model_type")))
    for name, text in bundle_files().items():
        (path.parent / name).write_text(text, encoding="utf-8", newline="\n")
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(config | {"auto_map": auto_map()}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


@lru_cache
def bundle_files() -> dict[str, str]:
    """Name and text of each file of the bundle, the entry first; a bundle's own files are passed on as they are."""
    if IN_BUNDLE:
        own = sorted(Path(__file__).parent.glob(f"{_PACKAGE}_*.py"))
        return {path.name: path.read_text(encoding="utf-8") for path in own}
    sources = _sources()
    texts = {_file(name): _header(name) + _flattened(text) for name, text in sources.items()}
    return {f"{name}.py": text for name, text in {ENTRY: _entry(list(texts)), **texts}.items()}


def _header(origin: str) -> str:
    return (
        f"# Generated from {origin} of {_PACKAGE} {installed_version()} (licence: Apache-2.0); do not edit.\n"
        "# Saving a model with bundle_code=True makes it anew.\n"
    )


def _entry(files: list[str]) -> str:
    """Text of the entry, which imports every file, so that Transformers copies it."""
    config, *models = (reference.partition(".")[2] for reference in auto_map().values())
    lines = [
        '"""What config.json names in auto_map."""',
        f"from .{_file(STMoEConfig.__module__)} import {config}",
        f"from .{_file(_OWN_NAME.rpartition('.')[0])} import {', '.join(models)}",
        "# Transformers copies the files that are named in this way.",
        *(f"from .{name} import __name__ as _" for name in files),
    ]
    return _header("the names of the modules") + "\n".join(lines) + "\n"


def _is_ours(module: str | None) -> bool:
    return module is not None and module.startswith(f"{_PACKAGE}.")


def _file(module: str) -> str:
    """The file of a module, without its suffix."""
    return module.replace(".", "_")


@lru_cache
def _source(module: str) -> str | None:
    """Source of a module, which is not imported; None where the name is no module's, but one inside of a module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None else spec.loader.get_source(module)  # type: ignore[union-attr]


def _sources() -> dict[str, str]:
    """Source of each module that a mixture runs on, by name: the two rooms, the routers, and all that they import."""
    wanted = [_OWN_NAME.rpartition(".")[0], *(row.path.rpartition(".")[0] for row in ROUTER_TYPES.values())]
    sources: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        source = _source(name) if _is_ours(name) else None
        if source is None or name in sources:
            continue
        sources[name] = source
        for node in _own_imports(ast.parse(source)):
            wanted += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return dict(sorted(sources.items()))


def _own_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """The imports from this package anywhere in a module."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and _is_ours(node.module))


def _relative(node: ast.ImportFrom) -> str:
    """An import from this package as imports of files: one for names inside of a module, one for each module."""
    modules = [alias for alias in node.names if _source(f"{node.module}.{alias.name}") is not None]
    names = [ast.unparse(alias) for alias in node.names if alias not in modules]
    lines = [f"from .{_file(str(node.module))} import {', '.join(names)}"] if names else []
    for alias in modules:
        lines.append(f"from . import {_file(f'{node.module}.{alias.name}')} as {alias.asname or alias.name}")
    return ("\n" + " " * node.col_offset).join(lines)


def _flattened(source: str) -> str:
    """A module's source as a file of the bundle: imports between files, and what only an installed package can say."""
    tree = ast.parse(source)
    edits: list[tuple[ast.stmt | ast.expr, str]] = [(node, _relative(node)) for node in _own_imports(tree)]
    elsewhere = {
        "from importlib import import_module": f"from .{_file(_OWN_NAME)} import import_module",
        f"importlib.metadata.version('{_PACKAGE}')": f'"{installed_version()}"',
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Call) and ast.unparse(node) in elsewhere:
            edits.append((node, elsewhere[ast.unparse(node)]))
    # Columns of the tree count bytes.
    lines = source.encode().splitlines(keepends=True)
    for node, text in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        lines[first : last + 1] = [before + text.encode() + after]
    return b"".join(lines).decode()
