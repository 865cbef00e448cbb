"""Conversion of models that are mixtures in some layers, whose checkpoints hold each native expert apart."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from st_moe import STMoEForCausalLM, prove_identity, upcycle
from st_moe.conversion import export_dense, to_dense, upcycle_checkpoint
from tests.families import dense_model

FAMILIES = ("qwen3_moe", "deepseek_v3", "llama4_text", "granitemoehybrid")


def fields_of(family: str) -> dict[str, Any]:
    layers = None if family == "granitemoehybrid" else [0]
    return {"num_experts": 3, "num_experts_per_tok": 1, "sparse_layers": layers, "seed": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_what_the_model_becomes(family: str, tmp_path: Path) -> None:
    dense = dense_model(family)
    dense.save_pretrained(tmp_path / "dense")
    proof: Any = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **fields_of(family))
    assert proof.max_relative_difference <= 1e-5
    assert proof.sparse_loss == pytest.approx(proof.dense_loss)
    found = STMoEForCausalLM.from_pretrained(tmp_path / "moe")
    expected = upcycle(dense, verify=False, **fields_of(family))
    assert found.config.native_fields == expected.config.native_fields
    assert found.config.native_fields
    loaded, wanted = found.state_dict(), expected.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_goes_back_to_its_dense_model(family: str, tmp_path: Path) -> None:
    dense = dense_model(family)
    sparse = upcycle(dense, verify=False, **fields_of(family))
    back = to_dense(sparse, experts=1)
    assert type(back) is type(dense)
    assert back.config.to_dict() | {"dtype": None} == dense.config.to_dict() | {"dtype": None}
    assert all(back.state_dict()[name].equal(tensor) for name, tensor in dense.state_dict().items())
    sparse.save_pretrained(tmp_path / "moe")
    export_dense(tmp_path / "moe", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert prove_identity(dense, loaded).max_relative_difference <= 1e-5
