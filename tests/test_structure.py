"""The house rules that a reader cannot see at a glance: import directions, sizes, packaging, and tests that do run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
FACE = "st_moe"
ORDER = (
    "st_moe.configuration",
    "st_moe.modeling.kernels",
    "st_moe.modeling.routing",
    "st_moe.modeling",
    "st_moe.conversion",
    "st_moe.finetune",
    FACE,
)
"""Rooms from the ground up: a room imports itself and the rooms before it."""

PUBLIC_NAMES = (
    "STMoEConfig",
    "STMoEModel",
    "STMoEForCausalLM",
    "STMoEForImageClassification",
    "STMoEForSequenceClassification",
    "STMoEForTokenClassification",
    "STMoETrainer",
    "upcycle",
    "prove_identity",
    "locate_ffns",
)
LONGEST_FUNCTION = 100
P90_FUNCTION = 45


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, for every module of the package."""
    files = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


def room_of(module: str) -> str:
    """The room that holds a module of the package; what is in no other room belongs to the face."""
    return max((room for room in ORDER if module == room or module.startswith(room + ".")), key=len)


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import anywhere in a file; relative ones start with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from st_moe import modeling` imports a room, `from st_moe import upcycle` the face: the name decides.
            yield from ((node.lineno, f"{module}.{alias.name}" if module in ORDER else module) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def import_faults(room: str, source: str) -> list[str]:
    """What a file of this room imports against the order, relatively, or by a name that only the root knows."""
    faults = []
    for line, module in imported_modules(ast.parse(source)):
        top = module.split(".")[0]
        if module.startswith("."):
            faults.append(f"line {line}: relative import {module}")
        elif top in PACKAGES.values() and top != FACE:
            faults.append(f"line {line}: {module} is importable in the repository root only, use {FACE}.{module}")
        elif top == FACE and ORDER.index(room_of(module)) > ORDER.index(room):
            faults.append(f"line {line}: {room} imports {module}")
    return faults


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    faults = [
        f"{path.relative_to(ROOT)} {fault}"
        for path in sorted((ROOT / PACKAGES[package]).glob("*.py"))
        for fault in import_faults(package, path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("st_moe.configuration", "from st_moe.modeling import STMoEModel"),
        ("st_moe.configuration", "def late():\n    import st_moe.modeling.routing"),
        ("st_moe.modeling.kernels", "from st_moe.modeling.routing import Routing"),
        ("st_moe.modeling", "if TYPE_CHECKING:\n    from st_moe.finetune import STMoETrainer"),
        ("st_moe.modeling", "from st_moe import conversion"),
        ("st_moe.conversion", "from st_moe import upcycle"),
        ("st_moe.conversion", "importlib.import_module('st_moe.finetune')"),
        ("st_moe.finetune", "import st_moe"),
        ("st_moe.finetune", "from .data import read"),
        ("st_moe", "from modeling.routing import Routing"),
    ],
)
def test_import_check_finds_faults(room: str, source: str) -> None:
    assert len(import_faults(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("st_moe.modeling", "from st_moe.modeling.kernels import grouped_mm"),
        ("st_moe.modeling", "from st_moe.configuration import STMoEConfig\nimport torch, transformers.modeling_utils"),
        ("st_moe.finetune", "from st_moe import conversion, modeling"),
        ("st_moe", "from st_moe.finetune import STMoETrainer\nfrom st_moe import upcycle"),
    ],
)
def test_import_check_lets_good_imports_pass(room: str, source: str) -> None:
    assert import_faults(room, source) == []


def test_packages_list_every_folder_with_code() -> None:
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(PACKAGES)
    assert sorted(ORDER) == sorted(PACKAGES)
    tops = {Path(folder).parts[0] for folder in PACKAGES.values()}
    folders = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("*.py")}
    assert folders == set(PACKAGES.values())
    unmarked = [folder for folder in PACKAGES.values() if not (ROOT / folder / "py.typed").is_file()]
    assert not unmarked, f"no py.typed in {unmarked}"


# One interpreter loads the libraries below the package and every child begins there: new for st_moe, and torch is paid
# for once.
FRESH_IMPORTS = """
import json, os, sys, traceback
import torch, transformers, transformers.modeling_utils, transformers.trainer
assert not any(name == "st_moe" or name.startswith("st_moe.") for name in sys.modules)
faults = {}
for statement in json.loads(sys.argv[1]):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            exec(statement)
        except BaseException as error:
            # A kernel module cannot do without Triton, which exists for some machines only.
            kernel = statement.startswith("import st_moe.modeling.kernels.")
            if not (kernel and getattr(error, "name", None) == "triton"):
                os.write(write, traceback.format_exc()[-4000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    code = os.waitpid(child, 0)[1]
    if text or code:
        faults[statement] = text or f"exit status {code}"
print(json.dumps(faults))
"""


# To know the families, the configs of all families of the host are imported: half a second, only when one is asked for.
NO_FAMILY_IS_IMPORTED = """
import st_moe.conversion.plan
from st_moe.configuration.configuration_st_moe import dense_model_types

assert not dense_model_types.cache_info().currsize
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_public_names_and_modules_import_alone(tmp_path: Path) -> None:
    statements = [f"from st_moe import {name}" for name in PUBLIC_NAMES] + [f"import {name}" for name in source_files()]
    statements.append(NO_FAMILY_IS_IMPORTED)
    command = [sys.executable, "-c", FRESH_IMPORTS, json.dumps(statements)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    faults = json.loads(run.stdout.splitlines()[-1])
    assert not faults, "\n\n".join(f"{statement}\n{fault}" for statement, fault in faults.items())


def function_lengths(source: str) -> dict[str, int]:
    """Function -> lines of its body without the docstring; a nested function counts in its parent and on its own."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            start = body[0].lineno if body else node.end_lineno
            lengths[f"{node.name}, line {node.lineno}"] = (node.end_lineno or 0) - (start or 0) + 1
    return lengths


def test_functions_fit_a_screen() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}: {function}": length
        for path in source_files().values()
        for function, length in function_lengths(path.read_text(encoding="utf-8")).items()
    }
    ordered = sorted(lengths.values())
    assert ordered, "no functions found"
    longest = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert not longest, f"longer than {LONGEST_FUNCTION} lines: {longest}"
    assert ordered[int(0.9 * (len(ordered) - 1))] <= P90_FUNCTION


def test_function_length_leaves_out_signature_and_docstring() -> None:
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    b = a\n    return b\n'
    assert list(function_lengths(source).values()) == [2]


def test_every_test_file_collects_a_test(tmp_path: Path) -> None:
    # The host's tests are fetched when they are imported: `make test-host` fails on its own when it finds none.
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    files = {name for name in files if not name.startswith("tests/host/")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    collected = {name for name, count in re.findall(r"^(\S+\.py): (\d+)$", run.stdout, re.MULTILINE) if int(count)}
    assert collected == files


def third_party_imports() -> set[str]:
    """Top-level names of what the package imports from outside the standard library, inside functions too."""
    names = {
        module.split(".")[0]
        for path in source_files().values()
        for _, module in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    }
    return names - set(sys.stdlib_module_names) - {FACE, ""}


def test_imported_packages_are_declared() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    declared = PYPROJECT["project"]["dependencies"] + [
        line for extra in ("trl", "gpu", "report") for line in extras[extra]
    ]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    undeclared = {name for name in third_party_imports() if canonicalize_name(name) not in names}
    assert not undeclared, f"imported, but in neither dependencies nor an extra: {sorted(undeclared)}"


def pins(name: str) -> dict[str, list[str]]:
    """Project -> pinned versions (one per marker) of a constraints file."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            version = str(requirement.specifier).removeprefix("==")
            found.setdefault(canonicalize_name(requirement.name), []).append(version)
    return found


def test_constraints_agree_with_ranges() -> None:
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    oldest["torch"] = re.findall(r"^OLDEST_TORCH \?= (\S+)$", makefile, re.MULTILINE)
    for line in PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["trl"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        operators = {specifier.operator: specifier.version for specifier in requirement.specifier}
        assert set(operators) == {">=", "<"}, f"{line}: a range needs both ends"
        assert all(requirement.specifier.contains(version) for version in newest[name]), f"{line}: {newest[name]}"
        lowest = Requirement(f"{name}=={operators['>=']}").specifier
        assert oldest[name], f"constraints-oldest.txt has no {name}"
        assert all(lowest.contains(version) for version in oldest[name]), f"{line}: lower end is not {oldest[name]}"


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    tree, wheels = tmp_path / "tree", tmp_path / "wheels"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in {Path(folder).parts[0] for folder in PACKAGES.values()}:
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert inside == expected
    assert "st-moe = st_moe.cli:main" in entry_points
