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
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from st_moe import STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel
from st_moe.configuration import ROUTER_TYPES
from st_moe.modeling import bundle
from tests.families import mixture, tiny_tokenizer, token_ids
from tests.hub_stand_in import HubStandIn

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "st_moe_bundle.py"
#: Rooms whose modules a bundle may hold, and the folder of each.
ROOMS = {
    "st_moe.configuration": "configuration",
    "st_moe.modeling": "modeling",
    "st_moe.modeling.routing": "modeling/routing",
    "st_moe.modeling.kernels": "modeling/kernels",
}
PACKAGE_FILES = {
    package if path.stem == "__init__" else f"{package}.{path.stem}": path
    for package, folder in ROOMS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
}
FLAT = {module.replace(".", "_"): module for module in PACKAGE_FILES}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return bundle.bundle_files()


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# What the files say.


class _Neutral(ast.NodeTransformer):
    """Take the imports out of a module, and write the version as what a bundle has in its place."""

    def __init__(self) -> None:
        self.bound: set[tuple[int, str, str]] = set()
        self.depth = 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        self.depth += isinstance(node, ast.FunctionDef)
        visited = super().generic_visit(node)
        self.depth -= isinstance(node, ast.FunctionDef)
        return visited

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            place = node.module or ""
            if node.level:
                place = FLAT[place] if place else ""
            name = f"{place}.{alias.name}" if place else FLAT[alias.name]
            if name == "st_moe.modeling.bundle.import_module":
                name = "importlib.import_module"
            self.bound.add((self.depth, alias.asname or alias.name, name))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node) == "importlib.metadata.version('st_moe')":
            return ast.Constant(version("st_moe"))
        return self.generic_visit(node)


def neutral(source: str) -> tuple[str, set[tuple[int, str, str]]]:
    """What a module says apart from where it imports from, and what its imports bind, by the package's names."""
    neutral = _Neutral()
    tree = neutral.visit(ast.parse(source))
    return ast.dump(tree), neutral.bound


def test_files_are_the_package_source(files: dict[str, str]) -> None:
    assert set(files) - {ENTRY} <= {f"{name}.py" for name in FLAT}
    for name in set(files) - {ENTRY}:
        original = PACKAGE_FILES[FLAT[name.removesuffix(".py")]].read_text(encoding="utf-8")
        assert neutral(files[name]) == neutral(original), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("hidden_states: Tensor", "hidden_states: Any"),
        ("_FEW_ASSIGNMENTS = 64", "_FEW_ASSIGNMENTS = 65"),
        ("from .st_moe_modeling_ffn import FFNLocation", "from .st_moe_modeling_ffn import FFNLayout as FFNLocation"),
        ("from . import st_moe_modeling_kernels_activations", "from . import st_moe_modeling_outputs"),
    ],
)
def test_drift_is_seen(files: dict[str, str], before: str, after: str) -> None:
    text = files["st_moe_modeling_experts.py"]
    assert before in text
    original = PACKAGE_FILES["st_moe.modeling.experts"].read_text(encoding="utf-8")
    assert neutral(text.replace(before, after)) != neutral(original)


def test_files_have_header_and_fixed_names(files: dict[str, str]) -> None:
    assert next(iter(files)) == ENTRY
    for name, text in files.items():
        assert re.fullmatch(r"st_moe_[a-z_]+\.py", name)
        first = text.splitlines()[0]
        assert first.startswith("# Generated from ")
        assert f"of st_moe {version('st_moe')} " in first
        assert "do not edit" in first


def test_bundle_holds_what_models_need_and_no_more(files: dict[str, str]) -> None:
    modules = {FLAT[name.removesuffix(".py")] for name in files if name != ENTRY}
    assert modules >= {row.path.rpartition(".")[0] for row in ROUTER_TYPES.values()}
    assert modules >= {"st_moe.configuration", "st_moe.modeling", "st_moe.modeling.bundle"}
    assert not any(re.search("conversion|finetune|cli", name) for name in files)


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
            "AutoConfig": "st_moe_bundle.STMoEConfig",
            "AutoModel": "st_moe_bundle.STMoEModel",
            "AutoModelForCausalLM": "st_moe_bundle.STMoEForCausalLM",
            "AutoModelForSequenceClassification": "st_moe_bundle.STMoEForSequenceClassification",
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
assert "st_moe_modeling_routing_soft.py" in bundle.bundle_files()
executed = sorted(name for name in set(sys.modules) - before if name.startswith("st_moe"))
assert "st_moe.modeling.routing.soft" not in sys.modules and not executed, executed
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
    file, line = changed / "st_moe_modeling_sparse_block.py", "output = self.output_dropout(output)"
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
