"""Pruning: a smaller model with the same outputs, of every kind of expert and head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from st_moe import STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel, upcycle
from st_moe.modeling.experts import ModuleExperts
from tests.families import dense_model, mixture, perturb, relative_difference, token_ids

ACTIVE = ([True, False, True, True], [False, True, False, False])


def adapted(family: str = "llama", **fields: Any) -> Any:
    """A mixture whose first layer uses slots 0, 2 and 3, and whose second uses slot 1."""
    if family == "apertus":
        # Its FFN holds constants, which come from a dense model.
        model = upcycle(dense_model(family), num_experts=4, router_type="top_any", verify=False, **fields).eval()
        perturb(model)
    else:
        model = mixture(family, router_type="top_any", **fields)
    for block, active in zip(blocks_of(model), ACTIVE, strict=True):
        block.gate.active_experts.copy_(torch.tensor(active))
    return model


def blocks_of(model: nn.Module) -> list[Any]:
    return model.base_model.sparse_blocks


# Gated, ungated with biases and tied embeddings, and experts that are modules.
@pytest.mark.parametrize("family", ["llama", "gpt2", "arcee", "apertus"])
@pytest.mark.parametrize("fallback", ["best", "none"])
def test_outputs_are_the_same(family: str, fallback: str, tmp_path: Path) -> None:
    model = adapted(family, fallback=fallback)
    small = model.prune_experts()
    assert type(small) is type(model)
    assert small.config.num_experts == [3, 1]
    assert small.config.num_experts_per_tok == [2, 1]
    assert small.config.initial_experts is None
    assert model.config.num_experts == 4
    ids = token_ids()
    expected = model(ids, labels=ids)
    found = small(ids, labels=ids)
    assert relative_difference(found.logits, expected.logits) <= 1e-6
    assert not any(parameter.is_meta for parameter in (*small.parameters(), *small.buffers()))
    small.save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, found.logits)
    small.train()(ids, labels=ids).loss.backward()
    assert all(block.gate.weight.grad.any() for block in blocks_of(small)[:1])


def test_some_family_here_has_modules_as_experts() -> None:
    kinds = {
        family: isinstance(blocks_of(adapted(family))[0].experts, ModuleExperts) for family in ("llama", "apertus")
    }
    assert kinds == {"llama": False, "apertus": True}


def test_the_comparison_rejects_a_wrong_slot() -> None:
    model = adapted()
    small = model.prune_experts()
    with torch.no_grad():
        experts = blocks_of(small)[0].experts
        experts.down_proj.copy_(experts.down_proj.roll(1, 0))
    assert relative_difference(small(token_ids()).logits, model(token_ids()).logits) > 1e-4


def test_parts_are_smaller_and_shared_with_nothing() -> None:
    model = adapted(multiplicative_bias=True, num_shared_experts=1, ffn_before=True)
    before = model(token_ids()).logits
    small = model.prune_experts()
    for block, slots in zip(blocks_of(small), ACTIVE, strict=True):
        count = sum(slots)
        assert block.gate.num_experts == block.experts.num_experts == count
        for parameter in (*block.gate.parameters(), *block.experts.parameters()):
            assert parameter.shape[0] == count
        assert block.gate.active_experts.tolist() == [True] * count
    assert relative_difference(small(token_ids()).logits, before) <= 1e-6
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(model(token_ids()).logits, before)
    assert [block.gate.num_experts for block in blocks_of(model)] == [4, 4]


def test_layers_alike_get_one_number_and_state_is_kept() -> None:
    model = mixture(router_type="top_any", initial_experts=2, tie_word_embeddings=True).train()
    model.lm_head.weight.requires_grad_(False)
    blocks_of(model)[0].experts.requires_grad_(False)
    small = model.prune_experts()
    assert small.config.num_experts == 2
    assert small.config.num_experts_per_tok == 2
    assert small.training
    assert small.lm_head.weight is small.model.embed_tokens.weight
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, small)]
    assert frozen[0] == frozen[1] != set()


@pytest.mark.parametrize("auto", [STMoEModel, STMoEForSequenceClassification])
def test_other_kinds_of_models(auto: type, tmp_path: Path) -> None:
    model = adapted(auto=auto)
    small = model.prune_experts()
    assert isinstance(small, auto)
    found, expected = (m(token_ids())[0] for m in (small, model))
    assert relative_difference(found, expected) <= 1e-6
    small.save_pretrained(tmp_path)
    assert torch.equal(auto.from_pretrained(tmp_path)(token_ids())[0], found)  # type: ignore[attr-defined]


def test_without_inactive_experts_the_copy_is_equal() -> None:
    model = mixture(router_type="top_any")
    small = model.prune_experts()
    assert small is not model
    assert small.config.num_experts == 4
    for (name, ours), (_, theirs) in zip(small.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.data_ptr() != theirs.data_ptr(), name


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(ValueError, match="router_type: must be 'top_any' to prune experts, got 'top_k'"):
        mixture().prune_experts()
    with pytest.raises(ValueError, match="eval_capacity_factor: must be None to prune"):
        adapted(eval_capacity_factor=2.0).prune_experts()
