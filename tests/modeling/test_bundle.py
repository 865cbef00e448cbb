"""The code bundle: it is the package's own source, and runs where the package is not, with equal results."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from st_moe import (
    STMoEForCausalLM,
    STMoEForImageClassification,
    STMoEForSequenceClassification,
    STMoEForTokenClassification,
    STMoEModel,
)
from st_moe.configuration import ROUTER_TYPES
from st_moe.modeling import bundle, concatenation
from tests.families import dense_model, mixture, tiny_tokenizer, token_ids
from tests.hub_stand_in import HubStandIn

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "st_moe_modeling.py"
#: Files of a bundle, and the room that each holds.
ROOMS = {
    "st_moe_configuration.py": "st_moe.configuration",
    "st_moe_kernels.py": "st_moe.modeling.kernels",
    "st_moe_modeling.py": "st_moe.modeling",
    "st_moe_routing.py": "st_moe.modeling.routing",
}
FOLDERS = {room: ROOT.joinpath(*room.split(".")[1:]) for room in ROOMS.values()}
#: Modules that a bundle may hold.
SOURCES = {
    room if path.stem == "__init__" else f"{room}.{path.stem}": path
    for room, folder in FOLDERS.items()
    for path in sorted(folder.glob("*.py"))
}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return bundle.bundle_files()


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# What the files say.


def room_of(module: str) -> str:
    return module if module in FOLDERS else module.rpartition(".")[0]


def sections(text: str) -> dict[str, str]:
    """Module -> its part of a file; what stands before the first has no name."""
    parts = re.split(r"^# -+ (st_moe[.\w]*)$", text, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


class _Neutral(ast.NodeTransformer):
    """Take the imports out of a module or of a part of a file, and write what a bundle says otherwise in one way.

    Attributes:
        top, inner: what the imports bind at the top and in functions, by the package's names; nothing for a name from
            the same room, which a file has anyway.
    """

    def __init__(self, room: str) -> None:
        self.room = room
        self.top: set[tuple[str, str]] = set()
        self.inner: set[tuple[str, str]] = set()
        self.depth = 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        self.depth += isinstance(node, ast.FunctionDef)
        visited = super().generic_visit(node)
        self.depth -= isinstance(node, ast.FunctionDef)
        return visited

    def bind(self, name: str, meaning: str) -> None:
        (self.inner if self.depth else self.top).add((name, meaning))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.bind(alias.asname or alias.name, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            place, bound = node.module or "", alias.asname or alias.name
            if node.level:
                name = f"all of {ROOMS[f'{alias.name}.py']}" if not place else f"{ROOMS[f'{place}.py']}.{alias.name}"
            elif f"{place}.{alias.name}" in SOURCES:
                name = f"all of {room_of(f'{place}.{alias.name}')}"
            elif place in SOURCES:
                name = f"{room_of(place)}.{alias.name}"
            else:
                name = f"{place}.{alias.name}"
            if name != f"{self.room}.{bound}":
                self.bind(bound, name)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        if ast.unparse(node.value) != "sys.modules[__name__]":
            return self.generic_visit(node)
        self.bind(ast.unparse(node.targets[0]), f"all of {self.room}")
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node) == "importlib.metadata.version('st_moe')":
            return ast.Constant(version("st_moe"))
        if ast.unparse(node) == "import_module(__name__ if module.startswith('st_moe.') else module)":
            return ast.parse("import_module(module)", mode="eval").body
        return self.generic_visit(node)


def neutral(source: str, room: str) -> tuple[str, _Neutral]:
    """What a source says apart from its imports, and what these bind."""
    visitor = _Neutral(room)
    return ast.dump(visitor.visit(ast.parse(source))), visitor


def differences(files: dict[str, str]) -> set[str]:
    """The modules of which a bundle says something else than their source, and the files with other imports."""
    found = set()
    for name, text in files.items():
        room = ROOMS[name]
        parts = sections(text)
        start = parts.pop("")
        docstring = ast.get_docstring(ast.parse(start), clean=False)
        top: set[tuple[str, str]] = set()
        for module, part in parts.items():
            if module == room:
                # What a package says first is what its file says first.
                part = f'"""{docstring}"""\n{part}'
            said, here = neutral(part, room)
            original, there = neutral(SOURCES[module].read_text(encoding="utf-8"), room)
            if said != original or here.inner != there.inner or not here.top <= there.top:
                found.add(module)
            top |= there.top - here.top
        imported = neutral(start, room)[1].top
        # Left out is what no section speaks of; that nothing is missing is for another test.
        unused = {("importlib.metadata", "importlib.metadata"), ("TYPE_CHECKING", "typing.TYPE_CHECKING")}
        if not top - unused <= imported <= top | {("sys", "sys")}:
            found.add(name)
    return found


def test_files_are_the_package_source(files: dict[str, str]) -> None:
    assert files.keys() == ROOMS.keys()
    assert differences(files) == set()


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("hidden_states: Tensor", "hidden_states: Any", "st_moe.modeling.experts"),
        ("_FEW_ASSIGNMENTS = 64", "_FEW_ASSIGNMENTS = 65", "st_moe.modeling.experts"),
        ("Modeling room: routers", "Modelling room: routers", "st_moe.modeling"),
        ('"LAYOUTS",', '"layouts",', "st_moe.modeling"),
        ("return family_of(config", "import re\n        return family_of(config", "st_moe.modeling.modeling_st_moe"),
        ("_OWN_INIT", "F = sys.modules[__name__]\n_OWN_INIT", "st_moe.modeling.modeling_st_moe"),
        ("import Any, ClassVar", "import ClassVar", ENTRY),
        ("import ACT2FN", "import ACT2CLS as ACT2FN", ENTRY),
        ("import ExpertParameters, sorted_experts", "import sorted_experts as ExpertParameters, sorted_experts", ENTRY),
        ("st_moe_kernels as activations", "st_moe_routing as activations", ENTRY),
    ],
)
def test_drift_is_seen(files: dict[str, str], before: str, after: str, place: str) -> None:
    assert before in files[ENTRY]
    assert differences({**files, ENTRY: files[ENTRY].replace(before, after, 1)}) == {place}


def test_files_have_header_and_fixed_names(files: dict[str, str]) -> None:
    for name, text in files.items():
        first = text.splitlines()[0]
        assert first.startswith(f"# Generated from {ROOMS[name]} of st_moe {version('st_moe')} ")
        assert "do not edit" in first
        tree = ast.parse(text)
        original = SOURCES[ROOMS[name]].read_text(encoding="utf-8")
        assert ast.get_docstring(tree) == ast.get_docstring(ast.parse(original))


def test_files_are_plain_source(files: dict[str, str]) -> None:
    calls = {
        ast.unparse(node.func)
        for text in files.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    }
    assert not calls & {"exec", "eval", "compile", "__import__", "b64decode", "decompress"}
    assert max(len(line) for text in files.values() for line in text.splitlines()) <= 120
    # Comments are as they were too: these are the only lines that are not.
    own = r'\w+ = sys\.modules\[__name__\]|return "[\w.]+"|return getattr\(import_module\(__name__ if .*'
    for text in files.values():
        for module, part in sections(text).items():
            before = SOURCES[module].read_text(encoding="utf-8").splitlines() if module else text.splitlines()
            new = [line.strip() for line in part.splitlines() if line not in before]
            assert not [line for line in new if not re.fullmatch(own, line)]


def test_names_of_files_are_all_bound_once(files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    rules = "E9,F401,F811,F821,F822,F823"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--output-format=concise", f"--select={rules}"]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    changed = tmp_path / ENTRY
    changed.write_text(changed.read_text(encoding="utf-8").replace("import re\n", ""), encoding="utf-8")
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert "F821 Undefined name `re`" in run.stdout


def test_bundle_holds_what_models_need_and_no_more(files: dict[str, str]) -> None:
    modules = {module for text in files.values() for module in sections(text)}
    assert modules >= {row.path.rpartition(".")[0] for row in ROUTER_TYPES.values()}
    assert modules >= {*FOLDERS, "st_moe.modeling.bundle"}
    assert not any(re.search("conversion|finetune|cli|concatenation", name) for name in modules)


def test_host_copies_every_file_and_finds_every_import(files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    copied = {Path(path).name for path in get_relative_import_files(tmp_path / ENTRY)} | {ENTRY}
    assert copied == set(files)
    imported = {name for file in files for name in get_imports(tmp_path / file)} - set(sys.stdlib_module_names)
    assert imported <= {"torch", "transformers", "huggingface_hub", "packaging"}


def test_operators_of_copies_have_names_of_their_own(files: dict[str, str]) -> None:
    named = [name for name, text in files.items() if re.search(r"""["']st_moe::|torch\.ops\.st_moe\b""", text)]
    assert not named


def modules_of(**sources: str) -> list[Any]:
    """Modules of the routing room with other sources, and with the room's own package last."""
    room = "st_moe.modeling.routing"
    made = [concatenation._parsed(f"{room}.{name}", source) for name, source in sources.items()]
    return [*made, concatenation._parsed(room, '"""A room."""\n')]


FIRST = '''"""First, é."""

from __future__ import annotations

import torch.distributed as dist
from typing import TYPE_CHECKING, Any

from st_moe.configuration import STMoEConfig as Config
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.record import Routing as Record

if TYPE_CHECKING:
    from st_moe.modeling.routing.router import Router

# Why.
_EACH = "é"; _ALL = dist.group


def first(router: Router, config: Config) -> Any:
    """What it does."""
    from st_moe.modeling.kernels import activations, sorted_experts
    from st_moe.modeling.routing import scope
    from st_moe.modeling.routing.top_k import TopKRouter

    return losses, Record, activations, sorted_experts, scope, TopKRouter
'''
SECOND = '''"""Second."""

from __future__ import annotations

from typing import Any

from st_moe.modeling.kernels import activations
from st_moe.modeling.routing.record import first

__all__ = ["second"]


def second() -> Any:
    return activations, first
'''
BOTH = '''# Generated from st_moe.modeling.routing of st_moe {version} (licence: Apache-2.0); do not edit.
# Saving a model with bundle_code=True makes it anew.
"""A room."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

from . import st_moe_kernels as activations
from .st_moe_configuration import STMoEConfig as Config


# ------------------------------------------------------------ st_moe.modeling.routing.record

"""First, é."""

losses = sys.modules[__name__]
Record = Routing

# Why.
_EACH = "é"; _ALL = dist.group


def first(router: Router, config: Config) -> Any:
    """What it does."""
    from . import st_moe_kernels as activations
    from .st_moe_kernels import sorted_experts
    import sys
    scope = sys.modules[__name__]

    return losses, Record, activations, sorted_experts, scope, TopKRouter


# ------------------------------------------------------------ st_moe.modeling.routing.top_k

"""Second."""

__all__ = ["second"]


def second() -> Any:
    return activations, first


# ------------------------------------------------------------ st_moe.modeling.routing
'''


def test_modules_of_a_room_become_one_file() -> None:
    text = concatenation._text("st_moe.modeling.routing", modules_of(record=FIRST, top_k=SECOND))
    assert text == BOTH.format(version=version("st_moe"))


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("_SIZE = 1", "_SIZE = 2", "_SIZE"),
        ("_CACHE = {}", "_CACHE = {}", "_CACHE"),
        ("def _sum():\n    return 1", "def _sum():\n    return 2", "_sum"),
        ("import math", "math = 1", "math"),
        ("from torch import nn as F", "from torch.nn import functional as F", "F"),
        ("from st_moe.modeling.routing import losses", "losses = []", "losses"),
        ("from torch import tensor", "for tensor in ():\n    pass", "tensor"),
        ("a = 1", "try:\n    import fast as a\nexcept ImportError:\n    a = None", "a"),
    ],
)
def test_one_name_for_two_things_is_refused(first: str, second: str, name: str) -> None:
    room = "st_moe.modeling.routing"
    with pytest.raises(ValueError, match=rf"{name}: must mean one thing .* in {room}\.a and another in {room}\.b"):
        concatenation._text(room, modules_of(a=first, b=second))


def test_what_only_one_file_would_mix_up_is_refused() -> None:
    room = "st_moe.modeling.routing"
    with pytest.raises(ValueError, match=rf"sum: must mean one thing .* in builtins and another in {room}\.a"):
        concatenation._text(room, modules_of(a="def sum():\n    return 0"))
    with pytest.raises(ValueError, match=rf"from __future__: must be the same .* between {room}\.a and {room}\.b"):
        concatenation._text(room, modules_of(a="from __future__ import annotations", b="x = 1"))


@pytest.mark.parametrize(
    "source",
    [
        "logger = logging.get_logger(__name__)",
        "import math",
        "from st_moe.modeling.routing import losses",
        "from st_moe.configuration import STMoEConfig as Config",
    ],
)
def test_one_name_for_one_thing_passes(source: str) -> None:
    assert concatenation._text("st_moe.modeling.routing", modules_of(a=source, b=source))
    # What functions and comprehensions call their own is theirs.
    local = "def {}():\n    size = 1\n    return [each for each in {}]"
    assert concatenation._text("st_moe.modeling.routing", modules_of(a=local.format("f", 1), b=local.format("g", 2)))


# Saving.


def test_saving_adds_code_and_nothing_else(files: dict[str, str], tmp_path: Path) -> None:
    model = mixture()
    plain, bundled = save(model, tmp_path / "plain"), save(model, tmp_path / "bundled", bundle_code=True)
    names = {path.name: path.read_bytes() for path in plain.iterdir()}
    assert {path.name for path in bundled.iterdir()} == set(names) | set(files)
    assert all((bundled / name).read_bytes() == content for name, content in names.items() if name != "config.json")
    assert {name: (bundled / name).read_text(encoding="utf-8") for name in files} == files
    config = saved_config(bundled)
    entries = config.pop("auto_map")
    assert config == saved_config(plain)
    assert (
        entries.items()
        >= {
            "AutoConfig": "st_moe_modeling.STMoEConfig",
            "AutoModel": "st_moe_modeling.STMoEModel",
            "AutoModelForCausalLM": "st_moe_modeling.STMoEForCausalLM",
            "AutoModelForSequenceClassification": "st_moe_modeling.STMoEForSequenceClassification",
        }.items()
    )


def test_existing_folder_gets_the_same_bundle(tmp_path: Path) -> None:
    model = mixture()
    bundled, plain = save(model, tmp_path / "bundled", bundle_code=True), save(model, tmp_path / "plain")
    bundle.write_bundle(plain)
    assert {p.name: p.read_bytes() for p in plain.iterdir()} == {p.name: p.read_bytes() for p in bundled.iterdir()}


@pytest.mark.parametrize("trust", [None, False, True])
def test_package_reads_a_bundled_folder_with_its_own_code(trust: bool | None, tmp_path: Path) -> None:
    model = mixture()
    folder = save(model, tmp_path / "bundled", bundle_code=True)
    with torch.no_grad():
        expected = model(token_ids()).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert torch.equal(loaded(token_ids()).logits, expected)
        assert torch.equal(STMoEForCausalLM.from_pretrained(folder)(token_ids()).logits, expected)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is type(model.config)
    assert isinstance(AutoModel.from_pretrained(folder, trust_remote_code=trust), STMoEModel)
    # What is saved without code names none, wherever it was loaded from.
    again = save(loaded, tmp_path / "again")
    assert "auto_map" not in saved_config(again)
    assert not list(again.glob("*.py"))


def test_base_and_classifier_are_bundled_too(tmp_path: Path) -> None:
    classifier = mixture(auto=STMoEForSequenceClassification, num_labels=3)
    folder = save(classifier, tmp_path / "classifier", bundle_code=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(loaded(token_ids()).logits, classifier(token_ids()).logits)


def test_other_code_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = ROUTER_TYPES["top_k"]._replace(path="elsewhere.routers.MyRouter")
    model = mixture()
    monkeypatch.setitem(ROUTER_TYPES, "top_k", row)
    with pytest.raises(ValueError, match=r"router_type: must be one of st_moe's own .* got 'top_k' from elsewhere"):
        save(model, tmp_path / "refused", bundle_code=True)
    monkeypatch.undo()
    monkeypatch.setattr(LlamaForCausalLM.config_class, "__module__", "elsewhere.llama")
    with pytest.raises(ValueError, match=r"dense_model_type: must be one of transformers's own .* from elsewhere"):
        save(model, tmp_path / "refused", bundle_code=True)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("adapters", [False, True])
def test_saving_that_cannot_carry_code_is_refused(adapters: bool, tmp_path: Path) -> None:
    model = mixture()
    model._hf_peft_config_loaded = adapters
    with pytest.raises(ValueError, match=r"bundle_code: must be False .*\.push_to_hub\(repo_id, bundle_code=True\)"):
        save(model, tmp_path / "refused", bundle_code=True, push_to_hub=not adapters)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("content", [None, '{"model_type": "llama"}'])
def test_folder_of_no_mixture_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"folder: must hold the config\.json of a saved mixture"):
        bundle.write_bundle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["config.json"])


def test_only_one_process_writes_the_code(tmp_path: Path) -> None:
    folder = save(mixture(), tmp_path / "other", bundle_code=True, is_main_process=False)
    assert not list(folder.glob("*.py"))


# Other processes: Python with -I (no PYTHON* variables, no current folder on the path) in a folder of its own.

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "st_moe":
            raise ModuleNotFoundError("No module named 'st_moe'", name="st_moe")
sys.meta_path.insert(0, Hide())
"""
RESULTS = """
import torch
torch.set_num_threads(1)
def results(model, ids):
    # Logits, generated ids, the losses and a gradient norm of three steps of plain training.
    model.eval()
    with torch.no_grad():
        found = {"logits": model(ids).logits, "ids": model.generate(ids, max_new_tokens=4, do_sample=False)}
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found["losses"] = torch.stack(losses)
    found["weights"] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {name: tensor.contiguous() for name, tensor in found.items()}
"""
ARGUMENTS = """
import json, sys
sources, out, ids = json.loads(sys.argv[1]), sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
"""
LOAD_PACKAGE = (
    RESULTS
    + ARGUMENTS
    + """
from st_moe.modeling import STMoEForCausalLM, bundle
before = set(sys.modules)
assert "class SoftRouter(" in bundle.bundle_files()["st_moe_routing.py"]
executed = sorted(name for name in set(sys.modules) - before if name.startswith("st_moe"))
assert "st_moe.modeling.routing.soft" not in sys.modules and executed == ["st_moe.modeling.concatenation"], executed
for name, path in sources.items():
    save_file(results(STMoEForCausalLM.from_pretrained(path), ids), f"{out}/{name}.safetensors")
"""
)
LOAD_HIDDEN = (
    HIDE
    + RESULTS
    + ARGUMENTS
    + """
import pickle
try:
    AutoModelForCausalLM.from_pretrained(sources["top_k"])
    sys.exit("loaded without trust_remote_code")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
models = {}
for name, path in sources.items():
    first = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(pickle.loads(pickle.dumps(first.config))) is type(first.config)
    # Code goes on: what is saved from here loads in the same way, as a copy of the code.
    first.save_pretrained(f"{out}/{name}-again")
    models[name] = AutoModelForCausalLM.from_pretrained(f"{out}/{name}-again", trust_remote_code=True)
    assert type(models[name]) is not type(first)
for name, model in models.items():
    save_file(results(model, ids), f"{out}/{name}.safetensors")
assert type(AutoConfig.from_pretrained(sources["top_k"], trust_remote_code=True)).__name__ == "STMoEConfig"
assert type(AutoModel.from_pretrained(sources["top_k"], trust_remote_code=True)).__name__ == "STMoEModel"
compiled = torch.compile(models["top_k"].eval(), backend="aot_eager", fullgraph=True)
compiled(ids, labels=ids).loss.backward()
assert not any(name.partition(".")[0] == "st_moe" for name in sys.modules)
"""
)
LOAD_BESIDE = (
    RESULTS
    + ARGUMENTS
    + """
models = {name: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for name, path in sources.items()}
assert not any(name.partition(".")[0] == "st_moe" for name in sys.modules)
import st_moe
for name, path in sources.items():
    models[f"{name}-package"] = st_moe.STMoEForCausalLM.from_pretrained(path)
    assert type(models[f"{name}-package"]).__module__ == "st_moe.modeling.families"
for name, model in models.items():
    save_file(results(model, ids), f"{out}/{name}.safetensors")
"""
)
#: Classifiers on what they read; sys.argv: folders by Auto class, inputs, and the file to write.
HEADS = """
import json, sys
import transformers
from safetensors.torch import load_file, save_file
from torch import no_grad
folders, inputs, logits = json.loads(sys.argv[1]), load_file(sys.argv[2]), {}
for name, folder in folders.items():
    auto = getattr(transformers, name)
    if "st_moe" not in sys.modules:
        try:
            auto.from_pretrained(folder)
            sys.exit(f"{name} loaded without trust_remote_code")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    place = "st_moe.modeling.families" if "st_moe" in sys.modules else "st_moe_modeling"
    assert type(model).__module__.endswith(place) and type(model).__name__ == f"STMoE{name.removeprefix('AutoModel')}"
    batch = {key: tensor for key, tensor in inputs.items() if key == model.main_input_name}
    with no_grad():
        logits[name] = model(**batch).logits.contiguous()
save_file(logits, sys.argv[3])
"""
PUSH = """
import sys
from st_moe import STMoEForCausalLM
from transformers import AutoTokenizer
model = STMoEForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("someone/plain")
print(model.push_to_hub("someone/mixture", bundle_code=True, commit_message="A mixture with its code", tags=["moe"]))
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("someone/mixture")
model.push_to_hub("someone/after")
"""
UPCYCLE = """
import sys
from st_moe.cli import main
sys.argv = ["st-moe", "upcycle", *sys.argv[1:], "--bundle-code", "--push-to-hub", "someone/mixture"]
main()
"""
LOAD_HUB = (
    HIDE
    + RESULTS
    + ARGUMENTS
    + """
from transformers import AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("someone/mixture", trust_remote_code=True)
assert AutoTokenizer.from_pretrained("someone/mixture", trust_remote_code=True)("the fox")["input_ids"]
save_file(results(model, ids), f"{out}/hub.safetensors")
"""
)


def run_python(code: str, *arguments: str, folder: Path, **environment: str) -> str:
    """Run code in another process, without input, and give what it printed."""
    folder.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "home"), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return run.stdout


Results = dict[str, torch.Tensor]


def results_of(code: str, sources: dict[str, Path], folder: Path, **environment: str) -> dict[str, Results]:
    """What a process that loads models from folders writes about each."""
    paths = json.dumps({name: str(path) for name, path in sources.items()})
    run_python(code, paths, str(folder), json.dumps(token_ids().tolist()), folder=folder / "cwd", **environment)
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def different(actual: Results, expected: Results) -> set[str]:
    """Names of what is not equal to the last bit."""
    assert actual.keys() == expected.keys()
    return {name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)}


def router_mixture(router_type: str) -> STMoEForCausalLM:
    sizes = {"mixture_of_depths": {"num_experts": 1, "num_experts_per_tok": 1}}
    return mixture(router_type=router_type, allow_non_causal_routing=True, **sizes.get(router_type, {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundled folders: one model per router, and families with other activations, biases and without gates."""
    torch.manual_seed(0)
    models = {name: router_mixture(name) for name in ROUTER_TYPES}
    models |= {"gpt2": mixture("gpt2", num_experts=[3, 5]), "nemotron": mixture("nemotron", num_shared_experts=1)}
    folder = tmp_path_factory.mktemp("bundled")
    return {name: save(model, folder / name, bundle_code=True) for name, model in models.items()}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """What the package computes from the same folders, in a process of its own, and so with the same rounding."""
    found = results_of(LOAD_PACKAGE, folders, tmp_path_factory.mktemp("package"))
    assert found.keys() == folders.keys()
    return found


@pytest.mark.slow
def test_fresh_interpreter_without_the_package(
    folders: dict[str, Path], expected: dict[str, Results], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folders["top_k"], changed)
    file, line = changed / "st_moe_modeling.py", "output = self.output_dropout(output)"
    text = file.read_text(encoding="utf-8")
    assert text.count(line) == 1
    file.write_text(text.replace(line, f"{line} * 1.001"), encoding="utf-8")
    found = results_of(LOAD_HIDDEN, {**folders, "changed": changed}, tmp_path)
    # It is the folder's code that runs.
    assert "logits" in different(found.pop("changed"), expected["top_k"])
    assert {name: different(found[name], expected[name]) for name in folders} == {name: set() for name in folders}
    for name, path in folders.items():
        again = {file.name: file.read_bytes() for file in (tmp_path / f"{name}-again").iterdir()}
        assert again == {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.slow
def test_classifiers_without_the_package(tmp_path: Path) -> None:
    models = {
        "AutoModelForSequenceClassification": mixture(auto=STMoEForSequenceClassification, num_labels=3),
        "AutoModelForTokenClassification": mixture("bert", auto=STMoEForTokenClassification, num_labels=3),
        "AutoModelForImageClassification": mixture("vit", auto=STMoEForImageClassification, num_labels=3),
    }
    folders = {name: str(save(model, tmp_path / name, bundle_code=True)) for name, model in models.items()}
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": token_ids(), "pixel_values": pixels}, tmp_path / "inputs")
    found = {}
    for name, start in {"package": "import st_moe", "hidden": HIDE}.items():
        arguments = (json.dumps(folders), str(tmp_path / "inputs"), str(tmp_path / name))
        run_python(start + HEADS, *arguments, folder=tmp_path / f"{name}-cwd")
        found[name] = load_file(tmp_path / name)
    assert found["package"].keys() == folders.keys()
    assert not different(found["hidden"], found["package"])
    assert [tuple(found["hidden"][name].shape) for name in folders] == [(2, 3), (2, 12, 3), (2, 3)]
    assert all(logits.std() > 0 for logits in found["hidden"].values())


@pytest.mark.slow
def test_bundles_and_the_package_in_one_process(
    folders: dict[str, Path], expected: dict[str, Results], tmp_path: Path
) -> None:
    names = ("top_k", "gpt2", "nemotron")
    found = results_of(LOAD_BESIDE, {name: folders[name] for name in names}, tmp_path)
    for name in names:
        assert not different(found[name], expected[name])
        assert not different(found[f"{name}-package"], expected[name])


@pytest.mark.slow
def test_upload_and_download(
    folders: dict[str, Path], expected: dict[str, Results], files: dict[str, str], tmp_path: Path
) -> None:
    path = folders["top_k"]
    local = {file.name: file.read_bytes() for file in path.iterdir()}
    source = save(AutoModelForCausalLM.from_pretrained(path), tmp_path / "source")
    tiny_tokenizer().save_pretrained(source)
    with HubStandIn() as hub:
        environment = hub.environment(str(tmp_path / "home"))
        printed = run_python(PUSH, str(source), folder=tmp_path / "push", **environment)
        assert f"{hub.endpoint}/someone/mixture" in printed
        uploaded = dict(hub.files["someone/mixture"])
        assert b"- moe" in uploaded.pop("README.md")
        assert uploaded.pop("tokenizer.json")
        assert uploaded.pop("tokenizer_config.json")
        assert uploaded == local
        assert {name: uploaded[name].decode() for name in files} == files
        assert hub.commits["someone/mixture"][0] == "A mixture with its code"
        # An upload that does not ask for code has none, after one that did too.
        for name in ("someone/plain", "someone/after"):
            assert not [file for file in hub.files[name] if file.endswith(".py")]
            assert "auto_map" not in json.loads(hub.files[name]["config.json"])
        found = results_of(LOAD_HUB, {}, tmp_path, **environment)
        assert hub.unknown == []
    assert not different(found["hub"], expected["top_k"])


@pytest.mark.slow
def test_upcycling_in_a_terminal_uploads_the_code(files: dict[str, str], tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    moe = tmp_path / "moe"
    with HubStandIn() as hub:
        environment = hub.environment(str(tmp_path / "home"))
        run_python(UPCYCLE, str(tmp_path / "dense"), str(moe), folder=tmp_path / "terminal", **environment)
        assert hub.files["someone/mixture"] == {path.name: path.read_bytes() for path in moe.iterdir()}
        assert {name: hub.files["someone/mixture"][name].decode() for name in files} == files
        found = results_of(LOAD_HUB, {}, tmp_path, **environment)["hub"]
        assert hub.unknown == []
    (tmp_path / "package").mkdir()
    assert not different(found, results_of(LOAD_PACKAGE, {"moe": moe}, tmp_path / "package")["moe"])
