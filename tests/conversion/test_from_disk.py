"""Models that run with their weights on the disk."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from st_moe.conversion import from_disk, load_dense
from st_moe.conversion.from_disk import run_from_disk

IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def on_the_disk(model: PreTrainedModel) -> set[str]:
    """The top-level parts whose weights are not in memory."""
    names = (name.removeprefix("model.") for name, weight in model.named_parameters() if weight.is_meta)
    return {name.partition(".")[0] for name in names}


EVERYTHING = {"embed_tokens", "layers", "norm", "lm_head"}


@pytest.mark.parametrize(
    ("needed", "tried"),
    [
        (set(), [EVERYTHING]),
        ({"embed_tokens"}, [EVERYTHING, {"layers"}]),
        ({"layers"}, [EVERYTHING, {"layers"}, set()]),
    ],
    ids=["nothing", "embeddings", "layers"],
)
def test_no_more_is_in_memory_than_a_model_needs(
    needed: set[str],
    tried: list[set[str]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(from_disk.logger, "propagate", True)
    seen, models = [], []

    def run(model: PreTrainedModel) -> torch.Tensor:
        seen.append(on_the_disk(model))
        # One that has parts in memory is gone when another one needs room.
        assert not any(other() for other in models[1:])
        models.append(weakref.ref(model))
        if seen[-1] & needed:
            raise RuntimeError("a tensor is on device meta\nand so on")
        with torch.no_grad():
            return model.eval()(IDS).logits

    found = run_from_disk(partial(load_dense, folder), tmp_path, run)
    assert not any(other() for other in models[1:])
    with torch.no_grad():
        assert torch.equal(found, load_dense(folder).eval()(IDS).logits)
    assert seen == tried
    messages = [record.getMessage() for record in caplog.records if record.name == from_disk.logger.name]
    reason = "for it cannot run module by module: a tensor is on device meta."
    assert (
        messages
        == [f"Run with {part} in memory, {reason}" for part in ("all but the layers", "everything")][: len(tried) - 1]
    )
    assert not (tmp_path / "offload").exists()


@pytest.mark.parametrize(("message", "tries"), [("out of memory", 1), ("of meta\nand more", 3)])
def test_other_errors_are_raised_as_they_are(message: str, tries: int, folder: Path, tmp_path: Path) -> None:
    seen = []

    def run(model: PreTrainedModel) -> None:
        seen.append(NotImplementedError(message))
        raise seen[-1]

    with pytest.raises(NotImplementedError) as raised:
        run_from_disk(partial(load_dense, folder), tmp_path, run)
    assert raised.value is seen[-1]
    assert len(seen) == tries
    assert not (tmp_path / "offload").exists()


def test_every_tensor_has_one_place() -> None:
    """Transformers wants one for each in the state dict: Bart has a buffer beside its layers."""
    with torch.device("meta"):
        sizes = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 2}
        bart = BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, **sizes))
    places = dict(from_disk._layers_on_disk(bart))
    for name in bart.state_dict():
        (found,) = [places[part] for part in places if f"{name}.".startswith(f"{part}.")]
        assert found == ("disk" if ".layers." in name else "cpu")
