"""Merging: experts from several models, everything else averaged or taken from the first; strangers are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from st_moe import STMoEForCausalLM, locate_ffns, upcycle
from st_moe.conversion.merge import merged
from st_moe.conversion.recipes import read_ffn
from tests.families import dense_model, perturb, relative_difference, token_ids


def models(family: str = "llama", count: int = 3, **fields: Any) -> list[PreTrainedModel]:
    """A model and others that were moved a little from it, as fine-tuning would."""
    made = [dense_model(family, **fields) for _ in range(count)]
    for number, model in enumerate(made[1:]):
        perturb(model, std=0.02, seed=10 + number)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_experts_go_round_and_the_rest_is_averaged(family: str) -> None:
    sources = models(family)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in sources]
    sparse = upcycle(sources, recipe="merge", num_experts=6, verify=False)
    for layer, block in enumerate(sparse.base_model.sparse_blocks):
        held = block.experts.parameters_of_all()
        for expert in range(6):
            theirs = read_ffn(locate_ffns(sources[expert % 3])[layer])
            for ours, source in zip((held.w_in, held.w_out, held.b_in, held.b_out), theirs, strict=True):
                assert (ours is None) == (source is None)
                assert ours is None or torch.equal(ours[expert], source)
    rest = dict(sparse.named_parameters())
    names = [name for name in before[0] if name in rest]
    assert len(names) > 5
    for name in names:
        mean = torch.stack([state[name].double() for state in before]).mean(0)
        assert (rest[name] - mean).abs().max() <= 1e-6
    assert all(
        torch.equal(model.state_dict()[name], state[name])
        for model, state in zip(sources, before, strict=True)
        for name in state
    )


def test_the_rest_of_the_first() -> None:
    sources = models()
    sparse = upcycle(sources, recipe="merge", recipe_options={"rest": "first"}, num_experts=3, verify=False)
    state = sources[0].state_dict()
    shared = [name for name in sparse.state_dict() if name in state]
    assert len(shared) > 5
    assert all(torch.equal(sparse.state_dict()[name], state[name]) for name in shared)
    assert sparse.lm_head.weight.data_ptr() != sources[0].lm_head.weight.data_ptr()


@pytest.mark.parametrize("rest", ["average", "first"])
def test_equal_models_keep_the_function_and_others_do_not(rest: str) -> None:
    def merged_of(sources: list[PreTrainedModel]) -> Any:
        return upcycle(sources, recipe="merge", recipe_options={"rest": rest}, num_experts=4).identity_proof

    equal = [dense_model("llama") for _ in range(2)]
    assert merged_of(equal).max_relative_difference <= 1e-6
    assert merged_of(equal[:1]).max_relative_difference <= 1e-6
    assert not merged_of(models(count=2)).holds


def test_ties_dtype_and_folders_are_kept(tmp_path: Path) -> None:
    sources = [model.to(torch.bfloat16) for model in models(count=2, tie_word_embeddings=True)]
    folders = []
    for number, model in enumerate(sources):
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
    sparse = upcycle(folders, recipe="merge", num_experts=4, verify=False)
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    direct = upcycle(sources, recipe="merge", num_experts=4, verify=False)
    state = direct.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in sparse.state_dict().items())
    sparse.save_pretrained(tmp_path / "mixture")
    loaded = STMoEForCausalLM.from_pretrained(tmp_path / "mixture")
    assert relative_difference(loaded(token_ids()).logits, sparse(token_ids()).logits) == 0


def test_constants_are_not_averaged() -> None:
    sources = models(count=3)
    sparse = upcycle(sources, recipe="merge", num_experts=3, verify=False)
    assert torch.equal(sparse.model.rotary_emb.inv_freq, sources[0].model.rotary_emb.inv_freq)


def test_means_are_taken_in_float32() -> None:
    tensors = [torch.tensor([1.0, 256.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])]
    half = merged([tensor.to(torch.bfloat16) for tensor in tensors], "average")
    assert torch.equal(half, torch.tensor([4 / 3, 86.0]).to(torch.bfloat16))
    assert torch.equal(merged(tensors, "first"), tensors[0])


def other_width() -> list[PreTrainedModel]:
    return [dense_model("llama"), dense_model("llama", intermediate_size=40)]


def other_head() -> list[PreTrainedModel]:
    return [dense_model("llama"), dense_model("llama", auto=AutoModelForSequenceClassification)]


def other_rope() -> list[PreTrainedModel]:
    theta = {"rope_type": "default", "rope_theta": 123.0}
    return [dense_model("llama"), dense_model("llama", rope_parameters=theta)]


def other_dtype() -> list[PreTrainedModel]:
    return [dense_model("llama"), dense_model("llama").to(torch.float64)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (other_width, r"model 1: intermediate_size is 40, not 48\n.*up_proj|model 1: intermediate_size is 40, not 48"),
        (other_head, r"model 1: lm_head.weight is missing, not float32 \[96, 32\]"),
        (other_rope, r"model 1: rope_parameters is .*123\.0"),
        (other_dtype, r"embed_tokens.weight is float64 \[96, 32\], not float32 \[96, 32\]"),
        (lambda: [dense_model("llama"), dense_model("qwen2")], r"model 1: model_type is qwen2, not llama"),
    ],
)
def test_strangers_are_refused(sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)models: must be fine-tuned from one model.*{message}"):
        upcycle(sources(), recipe="merge", num_experts=4)


def test_only_the_first_differences_are_shown() -> None:
    with pytest.raises(ValueError, match=r"- and \d+ more$") as error:
        upcycle(other_width(), recipe="merge", num_experts=4)
    assert str(error.value).count("\n- ") == 6


def test_tokens_that_mark_an_end_may_differ() -> None:
    upcycle([dense_model("llama"), dense_model("llama", eos_token_id=5)], recipe="merge", num_experts=2, verify=False)


def test_numbers_of_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="dense: must be one model with recipe 'copy', got 2; 'merge' takes several"):
        upcycle(models(count=2), num_experts=4)
    with pytest.raises(ValueError, match="dense: must be one model with recipe 'merge', got 0"):
        upcycle([], recipe="merge", num_experts=4)
    with pytest.raises(ValueError, match="num_experts: must be a multiple of the 3 models that are merged, got 4"):
        upcycle(models(), recipe="merge", num_experts=4)
