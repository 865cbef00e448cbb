"""Capacity beyond the order of the ranks: who shares it, who is served first, and what is left of the weights.

Shape letters: T tokens, E experts, K choices, G groups, S tokens of one.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_moe.modeling.routing.capacity import Capacity
from tests.families import mixture, token_ids
from tests.modeling.reference import assert_close, make_router, reference_slots, small_config

HIDDEN = 8
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


def reference_keep(
    index: Tensor, asking: Tensor, mask: Tensor, priority: Tensor, factor: float, experts: int, **rule: Any
) -> Tensor:
    """Which assignments find room, group by group and slot by slot: bool [T, K]."""
    scope, size = rule.get("capacity_scope", "sequence"), rule.get("capacity_group_size", 1024)
    tokens = mask.numel()
    width = {"sequence": mask.shape[1], "batch": tokens, "group": size}[scope]
    real = mask.flatten()
    kept = torch.zeros_like(asking)
    for start in range(0, tokens, max(width, 1)):
        rows = list(range(start, min(start + width, tokens)))
        if rule.get("drop_priority") == "router_prob":
            rows.sort(key=lambda row: -priority[row].item())
        n = int(real[rows].sum())
        capacity = max(min(n, int(n * factor / experts)), rule.get("min_capacity", 4))
        kept[rows] = reference_slots(index[rows][None], asking[rows][None], [capacity])[0][0]
    return kept


def random_case(seed: int, groups: int, length: int, experts: int, choices: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    index = torch.rand(groups * length, experts).argsort(-1)[:, :choices]
    mask = torch.rand(groups, length) < 0.8
    asking = (torch.rand(groups * length, choices) < 0.8) & mask.view(-1, 1)
    # Coarse, so that there are ties.
    return index, asking, mask, torch.randint(1, 6, (groups * length,)) / 5


@properties
@given(
    st.sampled_from(["sequence", "batch", "group"]),
    st.sampled_from(["position", "router_prob"]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 3),
    st.floats(0.2, 2),
    st.integers(1, 7),
    seeds,
)
def test_scopes_and_priorities_against_the_loop(
    scope: str, priority: str, groups: int, length: int, experts: int, most: int, factor: float, size: int, seed: int
) -> None:
    index, asking, mask, first = random_case(seed, groups, length, experts, min(experts, most))
    rule: dict[str, Any] = {
        "capacity_scope": scope,
        "drop_priority": priority,
        "capacity_group_size": size,
        "min_capacity": 1,
    }
    config = small_config(num_experts=experts, num_experts_per_tok=1, **rule)
    kept = Capacity(config, experts).keep(index, asking, mask, first, factor)
    assert torch.equal(kept, reference_keep(index, asking, mask, first, factor, experts, **rule))


def test_every_rule_decides_differently_somewhere() -> None:
    """Negative control: with one rule in the place of another the comparison above would fail."""
    index, asking, mask, first = random_case(0, 3, 9, 2, 2)
    rules = [
        {},
        {"capacity_scope": "batch"},
        {"capacity_scope": "group", "capacity_group_size": 5},
        {"drop_priority": "router_prob"},
        {"capacity_scope": "batch", "drop_priority": "router_prob"},
    ]
    found = [reference_keep(index, asking, mask, first, 0.7, 2, min_capacity=1, **rule) for rule in rules]
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:i])


def test_the_most_certain_tokens_are_served_first() -> None:
    router = make_router(HIDDEN, num_experts=2, num_experts_per_tok=1, capacity_factor=1.0, min_capacity=1)
    router.weight.data.zero_()[1, 0] = 1.0
    # All go to expert 1, which takes two of four; the later ones are the more certain.
    x = torch.zeros(4, HIDDEN)
    x[:, 0] = torch.tensor([1.0, 2.0, 4.0, 3.0])
    everyone = torch.ones(1, 4, dtype=torch.bool)
    assert (router(x, everyone).weight[:, 0] > 0).tolist() == [True, True, False, False]
    router.capacity.by_probability = True
    assert (router(x, everyone).weight[:, 0] > 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("scope", ["sequence", "batch", "group"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_empty_and_single(scope: str, shape: tuple[int, int]) -> None:
    fields = {"capacity_scope": scope, "capacity_group_size": 2, "drop_priority": "router_prob"}
    router = make_router(HIDDEN, num_experts=3, num_experts_per_tok=2, capacity_factor=1.0, **fields)
    mask = torch.ones(shape, dtype=torch.bool)
    routing = router(torch.randn(mask.numel(), HIDDEN), mask)
    assert routing.weight.shape == (mask.numel(), 2)
    assert (routing.weight > 0).all()


def test_sequences_share_capacity_in_the_batch_scope_only() -> None:
    x = torch.randn(2, 6, HIDDEN)
    mask = torch.ones(2, 6, dtype=torch.bool)
    for scope, alone in (("sequence", True), ("batch", False)):
        torch.manual_seed(0)
        router = make_router(
            HIDDEN, num_experts=2, num_experts_per_tok=2, capacity_factor=0.5, min_capacity=1, capacity_scope=scope
        )
        both, second = router(x.flatten(0, 1), mask).weight[6:], router(x[1], mask[1:]).weight
        assert torch.equal(both > 0, second > 0) == alone


@properties
@given(st.integers(2, 5), st.integers(1, 8), st.floats(0.3, 1.5), st.booleans(), seeds)
def test_renormalized_weights_sum_to_one_where_anything_is_left(
    experts: int, length: int, factor: float, norm: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": norm}
    fields |= {"capacity_factor": factor, "min_capacity": 1}
    router = make_router(HIDDEN, **fields)
    x, mask = torch.randn(2 * length, HIDDEN), torch.ones(2, length, dtype=torch.bool)
    plain = router(x, mask)
    router.renormalize_after_drop = True
    routing = router(x, mask)
    left = plain.weight.sum(-1, keepdim=True)
    assert_close(routing.weight, torch.where(left > 0, plain.weight / left.clamp(min=1e-30), 0.0), 1e-5)
    assert torch.equal(routing.weight > 0, plain.weight > 0)


def test_a_later_token_can_take_an_earlier_ones_slot_but_not_with_one_choice() -> None:
    """The documented fact: with K of 2 or more capacity is not causal; first choices alone are."""
    ids = token_ids(1, 24)
    for choices, leaks in ((1, False), (2, True)):
        model = mixture(num_experts_per_tok=choices, eval_capacity_factor=1.0, min_capacity=1)
        before = model(input_ids=ids).logits[:, :12]
        changed = []
        for seed in range(8):
            after = torch.cat([ids[:, :12], token_ids(1, 12, seed=seed + 1)], dim=1)
            # A sequence of the same length, so that the capacity is the same.
            changed.append(not torch.allclose(before, model(input_ids=after).logits[:, :12], atol=1e-5))
        assert any(changed) == leaks


def test_one_renormalized_choice_still_teaches_the_router() -> None:
    found = []
    for renormalize in (False, True):
        torch.manual_seed(0)
        fields = {"norm_topk_prob": True, "capacity_factor": 8.0, "renormalize_after_drop": renormalize}
        router = make_router(HIDDEN, num_experts=4, num_experts_per_tok=1, **fields)
        weight = router(torch.randn(6, HIDDEN), torch.ones(1, 6, dtype=torch.bool)).weight
        assert_close(weight, torch.ones(6, 1), 1e-6)
        (gradient,) = torch.autograd.grad((weight * torch.arange(6.0)[:, None]).sum(), router.weight)
        found.append(gradient)
    assert found[0].abs().max() > 0.1
    assert_close(found[1], found[0], 1e-5)
