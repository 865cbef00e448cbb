"""Streaming: the bytes of the way in memory, one layer at a time, and the same bytes after any number of kills."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Model

from benchmarks import tiny_models
from benchmarks.families import dense_of
from st_moe import locate_ffns, upcycle
from st_moe.conversion import folder as folder_module
from st_moe.conversion import from_disk, streaming, tensor_files, upcycle_checkpoint, writing
from st_moe.conversion import plan as plan_module
from st_moe.conversion import stored as stored_module
from st_moe.conversion.card import plan_table
from st_moe.conversion.folder import plan_checkpoint
from st_moe.conversion.from_disk import compare_folder, run_dense
from st_moe.conversion.proof import PROOF_TEXT, IdentityProof, prove_identity
from st_moe.conversion.tensor_files import header_of, read_header, read_into
from tests.conversion.conftest import contents
from tests.families import FAMILIES, dense_model, perturb, tiny_tokenizer

RECIPES: dict[str, dict[str, Any]] = {
    "noise": {"recipe": "noise", "recipe_options": {"scale": 0.1}},
    "drop": {"recipe": "drop", "recipe_options": {"ratio": 0.3}},
    "split": {"recipe": "split"},
    "granular": {"recipe": "granular", "recipe_options": {"granularity": 2}, "num_experts_per_tok": 2},
    "shared": {"recipe": "shared"},
}
FIELDS: dict[str, dict[str, Any]] = {
    "one layer": {"sparse_layers": [1]},
    "extra FFNs": {"num_shared_experts": 1, "shared_expert_gate": True, "ffn_before": True, "ffn_after": True},
    "experts per layer": {"num_experts": [4, 3], "num_experts_per_tok": [1, 2], "multiplicative_bias": True},
    "selection bias": {"router_type": "sigmoid_top_k"},
    "noisy router": {"router_type": "noisy_top_k"},
}


def assert_same_as_in_memory(dense: Path, tmp_path: Path, shard: str = "40KB", **fields: Any) -> None:
    """The files that hold the model are those that the host would write for the model made in memory."""
    fields = {"num_experts": 4, "seed": 3, **fields}
    upcycle(dense, verify=False, **fields).save_pretrained(tmp_path / "memory", max_shard_size=shard)
    upcycle_checkpoint(dense, tmp_path / "disk", verify=False, max_shard_size=shard, **fields)
    expected, found = contents(tmp_path / "memory"), contents(tmp_path / "disk")
    assert expected.keys() <= found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    assert len([name for name in expected if name.endswith(".safetensors")]) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_as_in_memory(family: str, tmp_path: Path) -> None:
    dense_model(family).save_pretrained(tmp_path / "dense")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_recipe_is_written_as_in_memory(recipe: str, family: str, tmp_path: Path) -> None:
    dense_model(family).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, **RECIPES[recipe])


@pytest.mark.parametrize("fields", FIELDS)
def test_every_part_of_a_block_is_written_as_in_memory(fields: str, tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, **FIELDS[fields])


def test_experts_held_as_modules_and_classifiers(tmp_path: Path) -> None:
    dense_model("apertus").save_pretrained(tmp_path / "a")
    assert_same_as_in_memory(tmp_path / "a", tmp_path / "modules")
    dense_model("llama", AutoModelForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "c")
    assert_same_as_in_memory(tmp_path / "c", tmp_path / "classifier")


def test_half_precision_is_kept_tensor_by_tensor(tmp_path: Path) -> None:
    dense_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, recipe="noise")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, path, metadata={"format": "pt"})
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "mixed", num_experts=2)
    written = read_header(tmp_path / "mixed" / "model.safetensors")
    assert written["model.norm.weight"].dtype == "F32"
    assert written["model.layers.0.mlp.experts.down_proj"].dtype == "BF16"
    assert json.loads((tmp_path / "mixed" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    dtypes = (torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float64)
    tensors = {f"{name}.é": torch.ones(3, 2).to(dtype) for name, dtype in enumerate(dtypes)} | {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    stored = read_header(tmp_path / "file.safetensors")
    header, order = header_of({name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    assert (tmp_path / "file.safetensors").read_bytes().startswith(header)
    assert order == sorted(stored, key=lambda name: (stored[name].offset, stored[name].num_bytes > 0, name))
    for name, tensor in tensors.items():
        read = torch.empty_like(tensor)
        read_into(read, stored[name])
        assert read.equal(tensor)


# ------------------------------------------------------------------------------------------------ names


def test_prefixes_ties_and_old_names(tmp_path: Path) -> None:
    model = dense_model("gpt2")
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    assert_same_as_in_memory(tmp_path / "dense", tmp_path / "0")
    # A base model's checkpoint lacks the prefix; old ones hold buffers that nobody reads any more.
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    bare["ln_f.gamma"] = bare.pop("ln_f.weight")
    save_file(bare, path)
    assert isinstance(GPT2Model.from_pretrained(tmp_path / "dense"), GPT2Model)
    # The tied embedding may be stored twice, as long as both are equal.
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    plan_checkpoint(tmp_path / "dense")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, path, {"format": "pt"})
    message = r"transformer\.wte\.weight and lm_head\.weight are tied by the config of .* and differ"
    with pytest.raises(ValueError, match=rf'^source: {message} in its files; set "tie_word_embeddings": false'):
        plan_checkpoint(tmp_path / "dense")
    with pytest.raises(
        ValueError, match=r"^dense: lm_head\.weight is tied to transformer\.wte\.weight by its config and"
    ):
        upcycle(tmp_path / "dense", num_experts=2)


def test_base_checkpoints(tmp_path: Path) -> None:
    model = dense_model("gpt2")
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path)
    assert_same_as_in_memory(tmp_path / "dense", tmp_path)


@pytest.mark.parametrize("family", ["hrm_text", "olmo_hybrid", "deepseek_v3", "jamba", "kimi_linear"])
def test_tensors_that_files_hold_otherwise_are_computed_first(family: str, tmp_path: Path) -> None:
    """Fused ones that the model splits, split ones that it fuses, and experts that are stored one by one."""
    dense = dense_of(family)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    fields = {"recipe": "noise", "sparse_layers": [ffn.layer for ffn in locate_ffns(dense) if ffn.storage != "none"]}
    plan = plan_checkpoint(tmp_path / "dense", num_experts=4, max_shard_size="40KB", **fields)  # type: ignore[arg-type]
    stored = {name for path in (tmp_path / "dense").glob("*.safetensors") for name in read_header(path)}
    assert sum(plan.computed) > 0
    assert plan.largest_bytes >= 3 * max(plan.computed)
    assert not dense.state_dict().keys() <= stored
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, **fields)
    assert plan.num_bytes == sum(path.stat().st_size for path in (tmp_path / "disk").glob("*.safetensors"))
    assert not (tmp_path / "disk.partial").exists()


def test_a_full_disk_while_tensors_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense_model("hrm_text").save_pretrained(tmp_path / "dense")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stored_module, "write_all", full)
        with pytest.raises(OSError, match=r"destination: the disk of .* is full; make room and run"):
            convert(tmp_path / "dense", tmp_path / "moe")
        assert [path.name for path in (tmp_path / "moe.partial").iterdir()] == ["fresh"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=r"bytes are to be computed first, but the disk of .* has 9 free"):
            convert(tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    convert(tmp_path / "dense", tmp_path / "moe")


def test_a_full_disk_during_the_proof(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(from_disk, "outputs_of", full)
        with pytest.raises(OSError, match=r"destination: the disk of .* is full; make room and run"):
            convert(stock, tmp_path / "moe", verify=True)
    convert(stock, tmp_path / "moe", verify=True)


@pytest.mark.parametrize("fault", ["missing", "fused missing", "shape", "quantised", "one too many"])
def test_faults_of_tensors_that_are_computed_show_in_the_plan(fault: str, tmp_path: Path) -> None:
    dense_model("hrm_text").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    name, plain = "model.H_module.layers.0.mlp.gate_up_proj.weight", "model.H_module.layers.0.mlp.down_proj.weight"
    if fault == "shape":
        tensors[name] = tensors[name][:-3].clone()
    elif fault == "quantised":
        tensors[name] = tensors[name].to(torch.int8)
    elif fault == "one too many":
        tensors["model.H_module.layers.77.mlp.gate_up_proj.weight"] = tensors[name].clone()
    else:
        del tensors[plain if fault == "missing" else name]
    save_file(tensors, path, {"format": "pt"})
    message = {
        "missing": "missing keys: .*down_proj",
        "fused missing": "missing keys: .*gate_proj",
        "shape": "source: .* (must have the shape|cannot be made of)",
        "quantised": rf"must not be quantised, but '{name}' in .* is stored as I8",
        "one too many": "unexpected keys: .*layers.77",
    }[fault]
    with pytest.raises(ValueError, match=message) as plan:
        plan_checkpoint(tmp_path / "dense", num_experts=3, recipe="noise", max_shard_size="60KB")
    with pytest.raises(ValueError, match=message) as run:
        convert(tmp_path / "dense", tmp_path / "moe")
    assert str(plan.value) == str(run.value)
    assert [each.name for each in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["hrm_text", "deepseek_v3"])
def test_computed_tensors_keep_the_dtype_of_the_files(family: str, kept: torch.dtype, tmp_path: Path) -> None:
    """Whatever the config says."""
    dense = dense_of(family)
    dense.to(kept).save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32" if kept == torch.bfloat16 else "bfloat16"
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sparse = [ffn.layer for ffn in locate_ffns(dense) if ffn.storage != "none"]
    convert(tmp_path / "dense", tmp_path / "moe", sparse_layers=sparse)
    before = {tensor.dtype for tensor in read_header(tmp_path / "dense" / "model.safetensors").values()}
    written = [each for path in (tmp_path / "moe").glob("*.safetensors") for each in read_header(path).values()]
    assert {tensor.dtype for tensor in written} == before


def test_a_source_that_changes_while_tensors_are_computed(
    tmp_path: Path, stop_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tmp_path / "dense"
    dense_model("hrm_text").save_pretrained(dense)
    stop_at(2, lambda: os.utime(dense / "model.safetensors", ns=(1, 1)))
    with pytest.raises(ValueError, match=r"source: .* has changed while it was read; run the command again"):
        convert(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_one_tensor_under_two_names_is_refused(stock: Path, tmp_path: Path) -> None:
    dense_model("gpt2").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"ln_f.weight": tensors["transformer.ln_f.weight"].clone()}, path, {"format": "pt"})
    message = r"source: a tensor must be stored once, but .ln_f\.weight. and .transformer\.ln_f\.weight. in"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "dense", tmp_path / "moe")


def test_an_ffn_of_several_dtypes_is_refused(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"source: an FFN must be stored in one dtype, got .*up_proj\.weight BF16"):
        convert(tmp_path / "dense", tmp_path / "moe")


# ------------------------------------------------------------------------------------------------ killed and resumed


class Stop(BaseException):
    """Ends a run as abruptly as Python can."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], list[str]]:
    """Do something at the n-th step that changes the disk; returns the steps so far."""

    def install(number: int, action: Callable[[], None]) -> list[str]:
        events: list[str] = []

        def step(event: str) -> None:
            events.append(event)
            if len(events) == number:
                action()

        for module in (streaming, folder_module, from_disk, stored_module, writing):
            monkeypatch.setattr(module, "checkpoint_of_progress", step)
        return events

    return install


def prove_folder(source: Path, folder: Path, text: str | None = None) -> IdentityProof:
    return compare_folder(run_dense(source, folder.parent, text), folder)


def convert(dense: Path, target: Path, **fields: Any) -> Any:
    wanted = {"num_experts": 3, "recipe": "noise", "max_shard_size": "60KB", "verify": False, **fields}
    return upcycle_checkpoint(dense, target, **wanted)


def killed(dense: Path, target: Path, stop_at: Any, number: int, **fields: Any) -> bool:
    """Convert in a process of its own that is killed at its n-th step; whether that happened."""
    child = os.fork()
    if child == 0:
        try:
            stop_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            convert(dense, target, **fields)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_any_kill_is_followed_by_the_same_bytes(stock: Path, tmp_path: Path, stop_at: Any, overwrite: bool) -> None:
    events = stop_at(0, lambda: None)
    convert(stock, tmp_path / "straight")
    expected, steps = contents(tmp_path / "straight"), len(events)
    if overwrite:
        convert(stock, tmp_path / "old", num_experts=2)
        before = contents(tmp_path / "old")
        steps += 1
    points = random.Random(0).sample(range(1, steps - 3), 15) + list(range(steps - 3, steps + 1))
    for number in sorted(points):
        target = tmp_path / f"at {number}"
        if overwrite:
            shutil.copytree(tmp_path / "old", target)
        assert killed(stock, target, stop_at, number, overwrite=overwrite)
        stop_at(0, lambda: None)
        if overwrite and target.exists():
            assert contents(target) in (before, expected)
        elif target.exists():
            assert contents(target) == expected
        if overwrite or not target.exists():
            convert(stock, target, overwrite=overwrite)
        assert contents(target) == expected
        shutil.rmtree(target)
        shutil.rmtree(tmp_path / f"at {number}.partial", ignore_errors=True)


def test_a_run_that_is_killed_again_and_again_arrives(stock: Path, tmp_path: Path, stop_at: Any) -> None:
    stop_at(0, lambda: None)
    convert(stock, tmp_path / "straight")
    kills = 0
    while killed(stock, tmp_path / "moe", stop_at, 14 + kills):
        kills += 1
        assert kills < 50
    assert kills > 3
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")
    assert not (tmp_path / "moe.partial").exists()


def test_finished_shards_are_not_written_again(stock: Path, tmp_path: Path, stop_at: Any) -> None:
    events = stop_at(0, lambda: None)
    convert(stock, tmp_path / "straight")
    last = len(events) - events[::-1].index("rename")

    def stop() -> None:
        raise Stop

    stop_at(last, stop)
    with pytest.raises(Stop):
        convert(stock, tmp_path / "moe")
    whole = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "moe.partial" / "model").glob("*.safetensors")}
    assert len(whole) > 2
    events = stop_at(0, lambda: None)
    convert(stock, tmp_path / "moe")
    assert events.count("rename") == 1
    assert whole.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}.items()


@pytest.mark.parametrize("change", ["seed", "source", "journal", "shard"])
def test_another_plan_starts_anew_and_says_so(
    stock: Path, tmp_path: Path, stop_at: Any, change: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(streaming.logger, "propagate", True)
    dense = tmp_path / "dense"
    shutil.copytree(stock, dense)
    assert killed(dense, tmp_path / "moe", stop_at, 40)
    partial = tmp_path / "moe.partial"
    finished = sorted((partial / "model").glob("*.safetensors"))
    assert finished
    seed = 0
    if change == "seed":
        seed = 1
    elif change == "source":
        os.utime(next(dense.glob("*.safetensors")), ns=(1, 1))
    elif change == "journal":
        (partial / "journal.jsonl").write_bytes(b"\xff{")
    else:
        finished[0].write_bytes(b"cut")
    stop_at(0, lambda: None)
    convert(dense, tmp_path / "moe", seed=seed)
    assert ("of another plan or another source" in caplog.text) == (change in ("seed", "source"))
    convert(dense, tmp_path / "straight", seed=seed)
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")


def test_a_source_that_changes_while_it_is_read(stock: Path, tmp_path: Path, stop_at: Any) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(stock, dense)
    stop_at(30, lambda: os.utime(next(dense.glob("*.safetensors")), ns=(1, 1)))
    with pytest.raises(ValueError, match=r"source: .* has changed while it was read; run the command again"):
        convert(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_folder_of_someone_else_is_no_workshop(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "moe.partial").mkdir()
    (tmp_path / "moe.partial" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"destination: .*moe\.partial is needed for work and holds something else"):
        convert(stock, tmp_path / "moe")
    assert contents(tmp_path / "moe.partial") == {"thesis.txt": b"years of work"}


# ------------------------------------------------------------------------------------------------ the proof


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that a proof runs, whole or from the disk."""
    models: list[Any] = []
    real = from_disk.outputs_of

    def watched(model: Any, *inputs: Any) -> Any:
        models.append(model)
        return real(model, *inputs)

    monkeypatch.setattr(from_disk, "outputs_of", watched)
    return models


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "phi3", "apertus", "cpmant", "mpt", "hrm_text"])
def test_the_proof_runs_both_models_from_the_disk(
    family: str, tmp_path: Path, proven: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    dense_model(family).save_pretrained(tmp_path / "dense")
    proof = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=4)
    assert [set(model.hf_device_map.values()) for model in proven] == [{"disk"}, {"disk"}]
    assert {parameter.device.type for model in proven for parameter in model.parameters()} == {"meta"}
    assert proof.max_relative_difference < 1e-5
    assert proof.num_tokens == 64
    assert str(proof) in capsys.readouterr().out
    assert str(proof) in (tmp_path / "moe" / "README.md").read_text(encoding="utf-8")
    dense, moe = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "moe"))
    whole = prove_identity(dense, moe)
    assert proof.sparse_loss == pytest.approx(whole.sparse_loss, rel=1e-6)
    assert proof.dense_loss == pytest.approx(whole.dense_loss, rel=1e-6)


@pytest.mark.parametrize("fault", ["swapped", "zeroed", "nan", "norm"])
def test_a_wrong_tensor_fails_the_proof(stock: Path, tmp_path: Path, fault: str) -> None:
    assert upcycle_checkpoint(stock, tmp_path / "moe", num_experts=2).holds
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.{}.mlp.experts.down_proj"
    if fault == "norm":
        tensors["model.norm.weight"] += 0.1
    elif fault == "swapped":
        tensors[name.format(1)][0] = tensors[name.format(2)][0]
    else:
        tensors[name.format(0)][1] = 0 if fault == "zeroed" else float("nan")
    save_file(tensors, path)
    assert not prove_folder(stock, tmp_path / "moe").holds
    assert not (tmp_path / "offload").exists()


def test_what_cannot_run_from_the_disk_has_only_its_layers_there(
    tmp_path: Path, proven: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prophetnet's attention reads the tensors of another module."""
    monkeypatch.setattr(from_disk.logger, "propagate", True)
    dense_model("prophetnet").save_pretrained(tmp_path / "dense")
    proof = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=2)
    assert proof.max_relative_difference < 1e-5
    assert caplog.text.count("Run with all but the layers in memory, for it cannot run module by module: ") == 2
    whole = [model.hf_device_map == {"": "disk"} for model in proven]
    assert whole == [True, False, True, False]
    for model in proven[1::2]:
        decoder = model.prophetnet.decoder
        assert all(weight.is_meta for weight in decoder.layers.parameters())
        assert not decoder.ngram_embeddings.weight.is_meta


def test_the_proof_reads_text(stock: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    random = upcycle_checkpoint(stock, tmp_path / "moe", num_experts=2)
    dense, moe = (AutoModelForCausalLM.from_pretrained(folder) for folder in (stock, tmp_path / "moe"))
    # As many tokens as the model has positions.
    assert random.num_tokens == 64
    assert random.sparse_loss == pytest.approx(
        prove_identity(dense, moe, tokenizer(PROOF_TEXT, return_tensors="pt")["input_ids"][:, :64]).sparse_loss
    )
    given = prove_folder(stock, tmp_path / "moe", "the lazy dog jumps over the fox")
    assert given.num_tokens == len(tokenizer("the lazy dog jumps over the fox")["input_ids"])
    assert given.dense_loss != pytest.approx(random.dense_loss, rel=1e-3)
    with pytest.raises(ValueError, match="proof_text: must be two or more tokens below 96, got"):
        prove_folder(stock, tmp_path / "moe", "")
    shutil.copytree(stock, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"proof_text: needs a tokenizer, and .* has none"):
        prove_folder(tmp_path / "mute", tmp_path / "moe", "the fox")
    assert prove_folder(tmp_path / "mute", tmp_path / "moe").num_tokens == 64
    # A tokenizer with more tokens than the model has embeddings is another model's.
    small = tmp_path / "small"
    dense_model("llama", vocab_size=60).save_pretrained(small)
    tokenizer.save_pretrained(small)
    assert upcycle_checkpoint(small, tmp_path / "other", num_experts=2).num_tokens == 64
    with pytest.raises(ValueError, match="proof_text: must be two or more tokens below 60"):
        upcycle_checkpoint(small, tmp_path / "third", num_experts=2, proof_text=PROOF_TEXT)
    assert not (tmp_path / "third").exists()


def test_a_kill_during_the_proof_is_gone_on_from(stock: Path, tmp_path: Path, stop_at: Any) -> None:
    events = stop_at(0, lambda: None)
    convert(stock, tmp_path / "straight", verify=True)
    assert events.count("run") == 2
    for number in (index + 1 for index, event in enumerate(events) if event == "run"):
        target = tmp_path / str(number)
        assert killed(stock, target, stop_at, number, verify=True)
        assert (tmp_path / f"{number}.partial" / "offload").is_dir()
        assert not target.exists()
        stop_at(0, lambda: None)
        convert(stock, target, verify=True)
        assert contents(target) == contents(tmp_path / "straight")


def test_identity_is_required_before_anything_is_called_done(stock: Path, tmp_path: Path) -> None:
    upcycle_checkpoint(stock, tmp_path / "moe", num_experts=2, require_identity=1e-4)
    before = contents(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"require_identity: must be at most 0\.0001, but step 0.*NOT equal"):
        upcycle_checkpoint(stock, tmp_path / "moe", recipe="drop", num_experts=2, require_identity=1e-4, overwrite=True)
    assert contents(tmp_path / "moe") == before
    assert not (tmp_path / "moe.partial").exists()
    for fields in ({"verify": False, "require_identity": 1.0}, {"require_identity": -1.0}):
        with pytest.raises(ValueError, match="require_identity: must not be negative, and needs verify=True"):
            upcycle_checkpoint(stock, tmp_path / "new", **fields)


# ------------------------------------------------------------------------------------------------ several models, text


MERGES: dict[str, dict[str, Any]] = {
    "averaged": {},
    "the first's rest": {"recipe_options": {"rest": "first"}},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_are_merged_as_in_memory(family: str, merge: str, tmp_path: Path) -> None:
    """Of bfloat16, whose means are rounded, in shards that differ, with one that is stored in old names."""
    fields = dict(MERGES[merge])
    ties = {"tie_word_embeddings": fields.pop("tie_word_embeddings")} if "tie_word_embeddings" in fields else {}
    folders = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        model = dense_model(family, **ties)
        perturb(model, std=0.02, seed=number)
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB" if number else "1MB")
    fields |= {"recipe": "merge", "num_experts": 6}
    upcycle(folders, verify=False, **fields).save_pretrained(tmp_path / "memory", max_shard_size="40KB")
    proof = upcycle_checkpoint(folders, tmp_path / "disk", max_shard_size="40KB", **fields)
    expected, found = contents(tmp_path / "memory"), contents(tmp_path / "disk")
    assert [name for name in expected if expected[name] != found[name]] == []
    assert len([name for name in expected if name.endswith(".safetensors")]) > 1
    assert proof.max_relative_difference > 0
    assert "upcycled from 0, 1, 2" in found["README.md"].decode()


def test_a_killed_merge_goes_on(stock: Path, tmp_path: Path, stop_at: Any) -> None:
    model = dense_model("llama", num_hidden_layers=3)
    perturb(model, std=0.02, seed=9)
    model.save_pretrained(tmp_path / "other")
    fields = {"recipe": "merge", "num_experts": 4}
    sources: Any = [stock, tmp_path / "other"]
    events = stop_at(0, lambda: None)
    convert(sources, tmp_path / "straight", **fields)
    assert killed(sources, tmp_path / "moe", stop_at, len(events) // 2, **fields)
    assert list((tmp_path / "moe.partial" / "model").glob("*.safetensors"))
    events = stop_at(0, lambda: None)
    convert(sources, tmp_path / "moe", **fields)
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")


def test_strangers_are_not_merged(stock: Path, tmp_path: Path) -> None:
    dense_model("llama", num_hidden_layers=3, intermediate_size=40).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be fine-tuned from one model[^$]*intermediate_size is 40, not 48"):
        convert([stock, tmp_path / "other"], tmp_path / "moe", recipe="merge")  # type: ignore[arg-type]
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("fields", [{}, {"recipe": "granular", "num_experts_per_tok": 2}], ids=["copy", "granular"])
@pytest.mark.parametrize("init", ["zeros", "normal", "prompts", "cluster"])
def test_routers_start_as_in_memory(
    init: str, fields: dict[str, Any], stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = init in ("prompts", "cluster")
    texts = ["the quick brown fox", "the lazy dog sleeps on", "jumps over", "and the dog"]
    fields = fields | {
        "num_experts": 8 if fields else 4,
        "router_init": init,
        "router_options": {"std": 0.3} if init == "normal" else {"scale": 2.0} if reads else {},
        "router_texts": texts if reads else None,
    }
    ran: list[Any] = []
    real = plan_module.inputs_of_ffns

    def watched(dense: Any, *arguments: Any) -> Any:
        ran.append(dense.hf_device_map)
        return real(dense, *arguments)

    monkeypatch.setattr(plan_module, "inputs_of_ffns", watched)
    dense = stock
    upcycle(dense, verify=False, tokenizer=tiny_tokenizer(), **fields).save_pretrained(tmp_path / "memory")
    proof = upcycle_checkpoint(dense, tmp_path / "disk", **fields)
    assert proof.holds
    expected, found = contents(tmp_path / "memory"), contents(tmp_path / "disk")
    assert [name for name in expected if expected[name] != found[name]] == []
    assert ran == ([{"": "disk"}] if reads else [])
    # The plan alone runs nothing.
    assert plan_checkpoint(dense, **fields).num_bytes == plan_checkpoint(dense, **fields | {"router_init": "zeros",
        "router_texts": None, "router_options": {}}).num_bytes  # fmt: skip


@pytest.mark.parametrize("change", [{"router_std": 0.5}, {"router_init": "zeros"}])
def test_other_routers_are_another_plan(stock: Path, tmp_path: Path, stop_at: Any, change: dict[str, Any]) -> None:
    assert killed(stock, tmp_path / "moe", stop_at, 40)
    assert list((tmp_path / "moe.partial" / "model").glob("*.safetensors"))
    stop_at(0, lambda: None)
    convert(stock, tmp_path / "moe", **change)
    convert(stock, tmp_path / "straight", **change)
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")


# ------------------------------------------------------------------------------------------------ leftovers


def test_a_kill_while_or_after_tensors_are_computed_is_gone_on_from(tmp_path: Path, stop_at: Any) -> None:
    dense = tmp_path / "dense"
    dense_model("hrm_text").save_pretrained(dense)
    events = stop_at(0, lambda: None)
    convert(dense, tmp_path / "straight")
    last = len(events) - events[::-1].index("compute")
    assert last > 5
    for number in (last // 2, last, *random.Random(0).sample(range(last + 1, len(events)), 4)):
        assert killed(dense, tmp_path / str(number), stop_at, number)
        stop_at(0, lambda: None)
        convert(dense, tmp_path / str(number))
        assert contents(tmp_path / str(number)) == contents(tmp_path / "straight")


def test_files_that_the_source_no_longer_has_are_not_kept(stock: Path, tmp_path: Path, stop_at: Any) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(stock, dense)
    (dense / "LICENSE").write_text("mine", encoding="utf-8")
    events = stop_at(0, lambda: None)
    convert(dense, tmp_path / "first", verify=True)
    assert killed(dense, tmp_path / "moe", stop_at, events.index("run") + 1, verify=True)
    assert (tmp_path / "moe.partial" / "model" / "LICENSE").exists()
    (dense / "LICENSE").unlink()
    stop_at(0, lambda: None)
    convert(dense, tmp_path / "moe", verify=True)
    assert contents(tmp_path / "moe").keys() == contents(tmp_path / "first").keys() - {"LICENSE"}


def test_texts_for_a_model_whose_files_hold_tensors_otherwise(tmp_path: Path) -> None:
    dense_model("hrm_text").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    fields = {"num_experts": 2, "router_init": "cluster", "router_texts": ["the quick brown fox jumps"]}
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **fields)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    expected = upcycle(tmp_path / "dense", tokenizer=tiny_tokenizer(), verify=False, **fields)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["cpmant", "prophetnet"])
def test_routers_that_see_other_tokens_do_not_start_from_text(family: str, tmp_path: Path) -> None:
    dense_model(family).save_pretrained(tmp_path / "dense")
    texts = [torch.randint(3, 90, (2, 12))]
    with pytest.raises(ValueError, match=r"router_init: .* routes other tokens than those of the text"):
        convert(tmp_path / "dense", tmp_path / "moe", recipe="copy", router_init="cluster", router_texts=texts)


def test_more_layers_than_tensors_in_a_part_of_the_config_are_refused_at_once(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense_of("siglip").save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["num_hidden_layers"] = 10**8
    (dense / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"source: vision_config\.num_hidden_layers in .* must fit the weights"):
        convert(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_ties_between_layers_are_kept(tmp_path: Path) -> None:
    tiny_models.dense_model("zamba").save_pretrained(tmp_path / "dense")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, shard="20KB", sparse_layers=[1, 3])


def test_running_out_of_memory_is_no_reason_to_take_more(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(from_disk, "outputs_of", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        convert(stock, tmp_path / "moe", verify=True)
    assert not (tmp_path / "moe").exists()


def test_a_proof_that_is_not_a_number_fails(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = IdentityProof(float("nan"), 1.0, 1.0, 64, 1e-4)
    monkeypatch.setattr(from_disk, "compare_folder", lambda *arguments: proof)
    with pytest.raises(RuntimeError, match="should compute the dense function and does not"):
        convert(stock, tmp_path / "moe", recipe="copy", verify=True)
    assert not (tmp_path / "moe").exists()


def test_faults_of_the_proofs_inputs_show_before_anything_is_written(stock: Path, tmp_path: Path) -> None:
    for fields, message in (
        ({"proof_text": "the fox", "verify": False}, "proof_text: needs verify=True"),
        ({"proof_text": ""}, "proof_text: must be two or more tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle_checkpoint(stock, tmp_path / "moe", num_experts=2, **fields)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ around it


def test_the_plan_is_shown_and_nothing_written(stock: Path, tmp_path: Path) -> None:
    plan = plan_checkpoint(stock, num_experts=4, num_experts_per_tok=1)
    console = Console(width=200, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(plan_table(plan, tmp_path / "not" / "there"))
    text = console.export_text()
    upcycle_checkpoint(stock, tmp_path / "moe", num_experts=4, num_experts_per_tok=1)
    size = (tmp_path / "moe" / "model.safetensors").stat().st_size
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config
    for wanted in ("3 of 3", f"{size:,} in 1 files", "4, of which 1 per token", f"{config.num_parameters():,}"):
        assert wanted in text
    # One layer: 4 experts of 3 matrices 32 x 48 and a router, in float32.
    assert plan.largest_bytes == 4 * (4 * 3 * 32 * 48 + 4 * 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


def test_a_finished_folder_is_uploaded(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append(("create", name))

        def upload_folder(self, folder_path: Path, repo_id: str, **options: Any) -> None:
            calls.append(("upload", repo_id, sorted(contents(folder_path))))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    convert(stock, tmp_path / "moe", push_to_hub="me/moe")
    assert calls == [("create", "me/moe"), ("upload", "me/moe", sorted(contents(tmp_path / "moe")))]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no way\nto the Hub")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(ValueError, match=r"push_to_hub: .* is complete, but 'me/moe' could not be uploaded: no way$"):
        convert(stock, tmp_path / "again", push_to_hub="me/moe")
    assert contents(tmp_path / "again") == contents(tmp_path / "moe")


def test_a_model_of_the_hub(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files lie in the cache as links into the folder `blobs`, and only those that are needed are fetched."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in stock.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    real = plan_module.dense_config
    monkeypatch.setattr(plan_module, "dense_config", lambda source: real(stock if source == "org/name" else source))
    convert("org/name", tmp_path / "moe")
    convert(stock, tmp_path / "straight")
    assert "model*.safetensors" in asked["org/name"]
    assert not any(pattern in ("*", "*.bin", "*.py") for pattern in asked["org/name"])
    expected, found = contents(tmp_path / "straight"), contents(tmp_path / "moe")
    assert [name for name in expected if expected[name] != found[name]] == ["README.md"]
    assert b"base_model: [org/name]" in found["README.md"]


def test_tokenizer_files_are_kept_as_they_are(stock: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(stock, dense)
    (dense / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "preprocessor_config.json", "LICENCE", "additional_chat_templates/tool.jinja"):
        (dense / name).write_text("{ }  ", encoding="utf-8")
    (dense / "secret.txt").write_text("not mine", encoding="utf-8")
    (dense / "LICENSE").symlink_to("/etc/hostname")
    convert(dense, tmp_path / "moe")
    found = contents(tmp_path / "moe")
    kept = ["chat_template.jinja", "preprocessor_config.json", "LICENCE", "additional_chat_templates/tool.jinja"]
    for name in (*kept, "tokenizer.json", "tokenizer_config.json"):
        assert found[name] == (dense / name).read_bytes()
    assert not {"secret.txt", "LICENSE"} & found.keys()


def test_writing_needs_no_model_classes() -> None:
    code = "import sys, st_moe.conversion.folder; print('transformers.modeling_utils' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == "False\n"


def test_a_buffer_is_not_used_again_before_it_is_written(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied tensors of many chunks, and a disk that is slower than what reads them."""
    write_all = writing.write_all

    def late(file: Any, data: Any) -> None:
        time.sleep(0.002)
        write_all(file, data)

    monkeypatch.setattr(tensor_files, "_CHUNK", 1024)
    monkeypatch.setattr(writing, "write_all", late)
    convert(stock, tmp_path / "moe", recipe="copy")
    expected, found = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (stock, tmp_path / "moe")
    )
    kept = expected.keys() & found.keys()
    assert max(expected[name].nbytes for name in kept) > 4 * 1024
    assert all(torch.equal(found[name], expected[name]) for name in kept)


@pytest.mark.parametrize("recipe", ["merge", "split", "drop"])
def test_a_layer_is_made_when_the_one_before_is_written(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Pieces that wait would keep a layer in memory, where it is there as a whole."""
    writers: list[Any] = []
    waiting: list[int] = []
    make = streaming._LayerMaker._make

    class Watched(writing.WriteBehind):
        def __enter__(self) -> Any:
            writers.append(self)
            return self

    def watched(self: Any, layer: Any) -> Any:
        waiting.append(len(writers[-1]._waiting))
        return make(self, layer)

    monkeypatch.setattr(streaming, "WriteBehind", Watched)
    monkeypatch.setattr(streaming._LayerMaker, "_make", watched)
    convert(stock, tmp_path / "moe", recipe=recipe)
    assert len(waiting) >= 3
    assert any(waiting[1:]) == (recipe == "drop"), "the first finds none before it"


def test_one_layer_is_made_at_a_time(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = streaming._LayerMaker._make

    def watched(self: Any, layer: Any) -> Any:
        assert self.made == {}
        made.append(layer.num_experts)
        return make(self, layer)

    monkeypatch.setattr(streaming._LayerMaker, "_make", watched)
    upcycle_checkpoint(stock, tmp_path / "moe", num_experts=[2, 3, 4], num_experts_per_tok=[1, 1, 1], verify=False)
    assert made == [2, 3, 4]


def test_a_recipe_that_makes_something_else_is_refused(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(self: Any, layer: Any) -> Iterator[Any]:
        made = run(self, layer)
        return made._replace(experts=made.experts._replace(w_out=made.experts.w_out[:, :, :-1]))

    run = streaming._LayerMaker._run_recipe
    monkeypatch.setattr(streaming._LayerMaker, "_run_recipe", narrow)
    with pytest.raises(RuntimeError, match=r"recipe 'copy' made .* where the config asks for"):
        upcycle_checkpoint(stock, tmp_path / "moe", num_experts=2)
    assert not (tmp_path / "moe").exists()
