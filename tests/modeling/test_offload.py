"""Offloading: a mixture whose weights accelerate brings in module by module computes what it computes in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from tests.families import mixture, relative_difference, token_ids

# Activations with and without a row of derivatives, biases, experts as modules, a head of its own.
FAMILIES = ("llama", "gpt2", "cpmant", "mpt", "apertus", "gemma2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_mixture_computes_the_same(family: str, place: str, tmp_path: Path) -> None:
    model: Any = mixture(family).eval()
    ids = token_ids(2, 7)
    with torch.no_grad():
        expected = model(ids).logits
    text = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    model.save_pretrained(tmp_path / "moe")
    if place == "disk":
        offload = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
        moved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", **offload).eval()
        assert not any((tmp_path / "offload").iterdir())  # read where they are
    else:
        moved = cpu_offload(AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval())
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    with torch.no_grad():
        assert relative_difference(moved(ids).logits, expected) <= 1e-6
    assert torch.equal(moved.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None), text)
    other: Any = mixture(family, seed=1).eval()
    with torch.no_grad():
        assert relative_difference(other(ids).logits, expected) > 1e-2
