"""Checkpoints are checked before anything is loaded from them; configs are read without their weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from st_moe import STMoEConfig, STMoEForCausalLM
from st_moe.conversion.checkpoint import check_checkpoint, dense_config, mixture_config
from tests.families import dense_model, mixture, tiny_config


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    mixture("qwen3", sparse_layers=[1]).save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def cut(size: int) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])

    return fault


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "must be a checkpoint folder or a name on the Hub, but .* does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "must hold config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json must be JSON"),
    "config is binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff"), r"config\.json must be JSON"),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json must be a JSON object, got list",
    ),
    "weights cut in the data": (cut(-10), r"model\.safetensors must be a whole safetensors file"),
    "weights cut in the header": (cut(100), r"model\.safetensors must be a whole safetensors file"),
    "weights cut to nothing": (cut(0), r"model\.safetensors must be a whole safetensors file"),
    "pickles": (pickled, r"must be safetensors, but .* holds pickles \(pytorch_model\.bin\), which can run code"),
}


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_it(dense: Path, fault: str, needs_weights: bool) -> None:
    make, message = FAULTS[fault]
    make(dense)
    with pytest.raises(ValueError, match=f"^source: .*{message}") as caught:
        check_checkpoint(dense, needs_weights=needs_weights)
    assert "\n" not in str(caught.value)


def test_weights_are_needed_unless_only_the_config_is(dense: Path) -> None:
    check_checkpoint(dense)
    (dense / "model.safetensors").unlink()
    check_checkpoint(dense, needs_weights=False)
    with pytest.raises(ValueError, match=r"source: must hold model\.safetensors or its index"):
        check_checkpoint(dense)


def test_every_shard_is_checked(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    save_file({"a": torch.zeros(4)}, dense / "one.safetensors")
    save_file({"b": torch.zeros(4)}, dense / "two.safetensors")
    index = dense / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}), encoding="utf-8")
    check_checkpoint(dense)
    (dense / "two.safetensors").write_bytes((dense / "two.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"two\.safetensors must be a whole safetensors file"):
        check_checkpoint(dense)
    index.write_text('{"weight_map": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json must name at least one file"):
        check_checkpoint(dense)


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_hub_names_pass_and_relative_folders_do_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_checkpoint(name)
    for path in (Path(name), f"./{name}", str(tmp_path / name), f"~/{name}"):
        with pytest.raises(ValueError, match="does not exist"):
            check_checkpoint(path)


def fields_of(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def test_dense_config_is_read(dense: Path) -> None:
    assert fields_of(dense_config(dense)) == fields_of(LlamaForCausalLM.from_pretrained(dense).config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "model_type in .* must be one of Transformers', got 'lama'; did you mean 'llama'"),
        ({"model_type": None}, "model_type in .* must be one of Transformers', got None; write"),
        ({"model_type": ""}, "model_type in .* must be one of Transformers', got ''; write"),
        ({"model_type": ["llama"]}, r"model_type in .* must be one of Transformers', got \['llama'\]; write"),
        # Code from a checkpoint is neither run nor asked about.
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}, "got 'mine'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "must not be quantised"),
    ],
)
def test_what_is_no_dense_config_is_refused(dense: Path, fields: dict[str, Any], message: str) -> None:
    change_config(dense, **fields)
    with pytest.raises(ValueError, match=f"^source: .*{message}"):
        dense_config(dense)


def test_code_in_a_checkpoint_is_not_run(dense: Path) -> None:
    change_config(dense, auto_map={"AutoConfig": "evil.EvilConfig"})
    (dense / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    assert type(dense_config(dense)) is type(tiny_config("llama"))


def test_a_mixture_is_not_dense_and_the_other_way_round(dense: Path, sparse: Path) -> None:
    with pytest.raises(ValueError, match=r"source: must be a dense model, but .* already is a mixture"):
        dense_config(sparse)
    with pytest.raises(ValueError, match=r"model: .* must be a mixture .* got model_type 'llama'; .* `st-moe upcycle`"):
        mixture_config(dense)


def test_mixture_config_is_read(sparse: Path) -> None:
    config = mixture_config(sparse)
    assert isinstance(config, STMoEConfig)
    assert fields_of(config) == fields_of(STMoEForCausalLM.from_pretrained(sparse).config)
    assert (config.dense_model_type, config.sparse_layer_indices) == ("qwen3", [1])


def test_mixture_config_with_a_broken_rule_is_refused(sparse: Path) -> None:
    change_config(sparse, num_experts_per_tok=9)
    with pytest.raises(ValueError, match="num_experts_per_tok: must be between 1 and num_experts=4, got 9"):
        mixture_config(sparse)


@pytest.mark.parametrize("read", [dense_config, mixture_config])
@pytest.mark.parametrize("name", ["org/nowhere", "nowhere", "two words", "a/b/c"])
def test_a_name_that_the_hub_does_not_give_is_one_line(read: Callable[[str], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"source: {name} is neither a folder") as caught:
        read(name)
    assert "\n" not in str(caught.value)
