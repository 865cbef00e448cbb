"""Routing: choices, weights, capacity, and what neighbours and padding must not change.

Shape letters: T tokens, H hidden size, E experts, K choices, G groups (sequences), S tokens of one.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_moe.configuration import ROUTER_TYPES
from st_moe.modeling.routing import Router, Routing, TopKRouter, expert_capacity, keep_within_capacity, router_class
from tests.modeling.reference import assert_close, make_router, one_group, reference_slots

HIDDEN = 8
POLICIES = ("all", "none", "threshold", "random")
EXACT, NEAR = 0.0, 1e-6

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


@st.composite
def sizes(draw: st.DrawFn, most_experts: int = 6) -> tuple[int, int]:
    """E and K <= E."""
    experts = draw(st.integers(1, most_experts))
    return experts, draw(st.integers(1, experts))


def router_of(experts: int, choices: int, seed: int = 0, training: bool = True, **fields: Any) -> TopKRouter:
    torch.manual_seed(seed)
    return make_router(HIDDEN, num_experts=experts, num_experts_per_tok=choices, **fields).train(training)


def select(routing: Routing, rows: Tensor) -> list[Tensor]:
    """What a routing says of some tokens."""
    parts = [routing.logits[rows], routing.index[rows], routing.weight[rows]]
    return parts if routing.dropped is None else [*parts, routing.dropped[rows]]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Choices and refusals equal; numbers up to what the matrix product rounds differently for another batch."""
    for a, b in zip(actual, expected, strict=True):
        if a.is_floating_point():
            assert_close(a, b, 1e-5)
        else:
            assert torch.equal(a, b)


def test_a_known_routing() -> None:
    router = make_router(2, num_experts=3, num_experts_per_tok=2)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    tokens = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)]])
    routing = router(tokens, one_group(2))
    assert_close(routing.logits, tokens @ router.weight.t(), EXACT)
    assert routing.index.tolist() == [[0, 1], [1, 0]]
    # exp(logits) are (3, 1, 1/3) and (1, 4, 1/4): the two largest, divided by their sum.
    assert_close(routing.weight, torch.tensor([[3 / 4, 1 / 4], [4 / 5, 1 / 5]]), NEAR)
    assert routing.dropped is None
    router.normalize = False
    raw = router(tokens, one_group(2)).weight
    assert_close(raw, torch.tensor([[9 / 13, 3 / 13], [16 / 21, 4 / 21]]), NEAR)


@properties
@given(sizes(), st.integers(0, 9), seeds)
def test_indices_are_distinct_and_weights_sum_to_one(size: tuple[int, int], tokens: int, seed: int) -> None:
    experts, choices = size
    router = router_of(experts, choices, seed)
    x = torch.randn(tokens, HIDDEN)
    routing = router(x, one_group(tokens))
    assert routing.logits.dtype == routing.weight.dtype == torch.float32
    assert routing.index.dtype == torch.int64
    assert routing.logits.shape == (tokens, experts)
    assert routing.index.shape == routing.weight.shape == (tokens, choices)
    assert ((routing.index >= 0) & (routing.index < experts)).all()
    assert all(len(set(row)) == choices for row in routing.index.tolist())
    assert_close(routing.weight.sum(-1), torch.ones(tokens), NEAR)
    # Best first, and nothing better left behind.
    probabilities = routing.logits.softmax(-1)
    chosen = probabilities.gather(1, routing.index)
    assert (chosen[:, 1:] <= chosen[:, :-1]).all()
    left = probabilities.scatter(1, routing.index, -1.0).amax(1)
    assert (left <= chosen[:, -1]).all()
    assert_close(routing.weight, chosen / chosen.sum(-1, keepdim=True), NEAR)


@properties
@given(sizes(), st.integers(1, 5), seeds)
def test_ties_go_to_the_lowest_index(size: tuple[int, int], tokens: int, seed: int) -> None:
    experts, choices = size
    routing = router_of(experts, choices, seed)(torch.zeros(tokens, HIDDEN), one_group(tokens))
    assert routing.index.tolist() == [list(range(choices))] * tokens
    assert_close(routing.weight, torch.full((tokens, choices), 1 / choices), NEAR)


def test_ties_among_a_few_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    _, index = router_of(6, 4).choose(logits.softmax(-1))
    assert index.tolist() == [[1, 3, 5, 2], [0, 2, 1, 3]]


@properties
@given(sizes(), st.integers(1, 6), st.integers(1, 3), st.floats(0.1, 3), st.integers(1, 4), seeds)
def test_slots_in_order_of_the_ranks(
    size: tuple[int, int], length: int, groups: int, factor: float, least: int, seed: int
) -> None:
    experts, choices = size
    torch.manual_seed(seed)
    index = torch.rand(groups, length, experts).argsort(-1)[..., :choices]
    routed = torch.rand(groups, length, choices) < 0.7
    tokens = torch.randint(0, length + 1, (groups,))
    capacity = expert_capacity(tokens, factor, experts, least)
    kept = keep_within_capacity(index, routed, capacity, experts)
    expected, _ = reference_slots(index, routed, capacity.tolist())
    assert kept.dtype == torch.bool
    assert kept.tolist() == expected.tolist()
    assert not (kept & ~routed).any()
    load = torch.stack([((index == e) & kept).flatten(1).sum(1) for e in range(experts)], dim=1)
    assert (load <= capacity[:, None]).all()
    # Nothing is refused while there is room.
    asked = torch.stack([((index == e) & routed).flatten(1).sum(1) for e in range(experts)], dim=1)
    assert torch.equal(load, torch.minimum(asked, capacity[:, None]))


def test_slot_reference_is_told_from_other_orders() -> None:
    """Negative control: token-major slots, and promotion of second choices, differ on this input."""
    index = torch.tensor([[[0, 1], [1, 0], [0, 1], [1, 0]]])
    routed = torch.ones_like(index, dtype=torch.bool)
    kept, slots = reference_slots(index, routed, [2])
    assert kept.tolist() == [[[True, False]] * 4]
    assert slots.tolist() == [[[0, -1], [0, -1], [1, -1], [1, -1]]]
    token_major = [[[True, True], [True, True], [False, False], [False, False]]]
    assert kept.tolist() != token_major
    assert torch.equal(keep_within_capacity(index, routed, torch.tensor([2]), 2), kept)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "expected"),
    # The first six are st-moe-pytorch's; the others sit where 32-bit arithmetic rounds to the wrong side.
    [
        (1, 16, 1.25, 4),
        (64, 16, 1.25, 5),
        (100, 7, 1.25, 17),
        (1024, 16, 1.25, 80),
        (1024, 16, 2.0, 128),
        (3, 2, 2.0, 4),
        (90, 3, 1.3, 39),
        (50, 5, 2.3, 22),
        (90, 3, 0.7, 20),
        (0, 4, 1.25, 4),
        (33554433, 1, 1.0, 33554433),
    ],
)
def test_capacity_formula(tokens: int, experts: int, factor: float, expected: int) -> None:
    assert expected == max(min(tokens, math.floor(tokens * factor / experts)), 4)
    capacity = expert_capacity(torch.tensor([tokens]), factor, experts, 4)
    assert capacity.dtype == torch.int64
    assert capacity.tolist() == [expected]


@properties
@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 400), st.integers(1, 8))
def test_capacity_formula_is_pythons(tokens: int, experts: int, hundredths: int, least: int) -> None:
    factor = hundredths / 100
    expected = max(min(tokens, math.floor(tokens * factor / experts)), least)
    assert expert_capacity(torch.tensor([tokens]), factor, experts, least).tolist() == [expected]


@properties
@given(sizes(), st.integers(1, 4), st.integers(1, 6), st.sampled_from(POLICIES), st.floats(0.3, 2), seeds)
def test_a_sequence_does_not_see_its_neighbours(
    size: tuple[int, int], groups: int, length: int, policy: str, factor: float, seed: int
) -> None:
    """Capacity counts per sequence, so permuting the sequences permutes the routing (nothing is drawn at random)."""
    experts, choices = size
    deterministic = "threshold" if policy == "random" else policy
    router = router_of(
        experts, choices, seed, capacity_factor=factor, min_capacity=1, second_expert_policy_train=deterministic
    )
    x = torch.randn(groups, length, HIDDEN)
    mask = torch.rand(groups, length) < 0.8
    order = torch.randperm(groups)
    routing = router(x.flatten(0, 1), mask)
    permuted = router(x[order].flatten(0, 1), mask[order])
    rows = torch.arange(groups * length).view(groups, length)[order].flatten()
    everything = torch.arange(len(rows))
    assert_same(select(routing, rows), select(permuted, everything))
    alone = [select(router(x[g], mask[g : g + 1]), torch.arange(length)) for g in range(groups)]
    assert_same([torch.cat(parts) for parts in zip(*alone, strict=True)], select(routing, everything))


@properties
@given(sizes(), st.integers(1, 6), st.integers(0, 5), st.booleans(), st.floats(0.3, 2), seeds)
def test_padding_changes_nothing(
    size: tuple[int, int], length: int, padding: int, left: bool, factor: float, seed: int
) -> None:
    router = router_of(*size, seed, capacity_factor=factor, min_capacity=1)
    x = torch.randn(2, length, HIDDEN)
    pad = torch.randn(2, padding, HIDDEN)
    real, unreal = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, padding, dtype=torch.bool)
    mask = torch.cat([unreal, real] if left else [real, unreal], dim=1)
    padded = router(torch.cat([pad, x] if left else [x, pad], dim=1).flatten(0, 1), mask)
    plain = router(x.flatten(0, 1), real)
    assert_same(select(padded, mask.flatten()), select(plain, real.flatten()))
    assert padded.dropped is not None
    assert not padded.dropped[~mask.flatten()].any(), "padding asks for nothing, so nothing of it is refused"


@pytest.mark.parametrize("policy", POLICIES)
def test_second_expert_policies(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_of(4, 3, second_expert_policy_train=policy, second_expert_threshold=[0.3, 0.1])
    weight = torch.tensor([[0.5, 0.4, 0.1], [0.7, 0.25, 0.05], [0.4, 0.3, 0.3]])
    draws = torch.tensor([[0.99, 0.99], [0.83, 0.51], [0.0, 0.0]])
    monkeypatch.setattr(torch, "rand_like", lambda like: draws)
    expected = {
        "all": [[True, True, True]] * 3,
        "none": [[True, False, False]] * 3,
        # Strictly above: 0.1 and 0.3 are not, as float32 of the same numbers.
        "threshold": [[True, True, False], [True, False, False], [True, False, True]],
        # draw < weight / threshold: 4/3 and 1, 5/6 = 0.8333 and 1/2, 1 and 3.
        "random": [[True, True, True], [True, True, False], [True, True, True]],
    }
    assert router.second_expert_policy(weight).tolist() == expected[policy]


def test_random_policy_routes_at_the_stated_rate() -> None:
    router = router_of(2, 2, second_expert_policy_train="random", second_expert_threshold=0.2)
    weight = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.7, 0.3]]).repeat(4000, 1)
    used = router.second_expert_policy(weight)[:, 1].view(4000, 3).float().mean(0)
    assert (used - torch.tensor([0.25, 0.75, 1.0])).abs().max() < 0.03
    router.thresholds = [0.0]
    assert router.second_expert_policy(weight).all(), "a threshold of 0 takes every second choice"


def test_policies_differ_between_training_and_evaluation() -> None:
    router = router_of(4, 2, second_expert_policy_train="none", second_expert_policy_eval="all")
    x = torch.randn(6, HIDDEN)
    assert (router(x, one_group(6)).weight[:, 1] == 0).all()
    assert (router.eval()(x, one_group(6)).weight[:, 1] > 0).all()


def test_a_choice_not_taken_keeps_its_index_and_the_others_their_weights() -> None:
    x = torch.randn(6, HIDDEN)
    every = router_of(4, 2)(x, one_group(6))
    first = router_of(4, 2, second_expert_policy_train="none")(x, one_group(6))
    assert torch.equal(first.index, every.index)
    assert torch.equal(first.weight[:, 0], every.weight[:, 0]), "nothing is renormalised afterwards"
    assert (first.weight[:, 1] == 0).all()


@properties
@given(sizes(), st.sampled_from(("all", "none", "threshold")), seeds)
def test_evaluation_is_deterministic(size: tuple[int, int], policy: str, seed: int) -> None:
    router = router_of(
        *size,
        seed,
        training=False,
        router_jitter_noise=0.5,
        second_expert_policy_train="random",
        second_expert_policy_eval=policy,
        capacity_factor=1.0,
    )
    x = torch.randn(8, HIDDEN)
    before = torch.get_rng_state()
    first, second = router(x, one_group(8)), router(x, one_group(8))
    assert torch.equal(before, torch.get_rng_state()), "evaluation draws no random number"
    assert first.dropped is None, "capacity_factor is for training"
    for a, b in zip(select(first, torch.arange(8)), select(second, torch.arange(8)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_leaves_the_input_as_it_is(dtype: torch.dtype) -> None:
    router = router_of(4, 2, router_jitter_noise=0.5)
    x = torch.randn(50, HIDDEN, dtype=dtype)
    before = x.clone()
    noisy, again = router(x, one_group(50)), router(x, one_group(50))
    assert torch.equal(x, before)
    assert not torch.equal(noisy.probabilities, again.probabilities)
    clean = x.float() @ router.weight.t()
    assert torch.equal(noisy.logits, clean), "the z-loss reads clean logits"
    # Every input is scaled by a factor in [0.5, 1.5] of its own.
    bound = 0.5 * x.float().abs() @ router.weight.abs().t()
    assert ((router.with_noise(x.float(), clean) - clean).abs() <= bound * (1 + NEAR)).all()


def test_one_choice_weighs_one_and_still_teaches_the_router() -> None:
    router = router_of(4, 1)
    x = torch.randn(9, HIDDEN)
    routing = router(x, one_group(9))
    assert (routing.weight == 1).all()
    cotangent = torch.randn(9, 1)
    (routing.weight * cotangent).sum().backward()
    assert router.weight.grad is not None
    actual = router.weight.grad.clone()
    # d log p, because p / constant p has the gradient dp / p (Switch, up to that constant).
    router.weight.grad = None
    log_p = (x @ router.weight.t()).log_softmax(-1).gather(1, routing.index)
    (log_p * cotangent).sum().backward()
    assert_close(actual, router.weight.grad, 1e-5)
    assert actual.abs().max() > 0.1


@pytest.mark.parametrize("choices", [2, 3])
def test_gradient_of_the_weights(choices: int) -> None:
    router = router_of(5, choices)
    x = torch.randn(7, HIDDEN, requires_grad=True)
    cotangent = torch.randn(7, choices)
    routing = router(x, one_group(7))
    actual = torch.autograd.grad((routing.weight * cotangent).sum(), [x, router.weight])
    chosen = (x @ router.weight.t()).gather(1, routing.index).softmax(-1)
    expected = torch.autograd.grad((chosen * cotangent).sum(), [x, router.weight])
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    router = router_of(4, 2)
    x = torch.randn(9, HIDDEN).to(dtype)
    routing, expected = router(x, one_group(9)), router(x.float(), one_group(9))
    for a, b in zip(select(routing, torch.arange(9)), select(expected, torch.arange(9)), strict=True):
        assert torch.equal(a, b)
    low = router_of(4, 2)
    low.weight.data = router.weight.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = low(x, one_group(9))
    assert torch.equal(inside.logits, low(x, one_group(9)).logits)
    assert inside.logits.dtype == torch.float32
    assert torch.equal(inside.logits, x.float() @ low.weight.float().t())


@pytest.mark.parametrize(
    ("experts", "choices", "groups", "length", "factor"),
    [
        (4, 2, 0, 3, 1.0),
        (4, 2, 2, 0, 1.0),
        (4, 2, 1, 0, None),
        (4, 2, 1, 1, 1.0),
        (4, 4, 2, 3, 1.0),
        (1, 1, 2, 3, 1.0),
        (1, 1, 2, 3, None),
    ],
)
def test_edge_sizes(experts: int, choices: int, groups: int, length: int, factor: float | None) -> None:
    router = router_of(experts, choices, capacity_factor=factor)
    x = torch.randn(groups * length, HIDDEN)
    routing = router(x, torch.ones(groups, length, dtype=torch.bool))
    assert routing.index.shape == (groups * length, choices)
    assert routing.weight.isfinite().all()
    if experts == choices:
        assert all(sorted(row) == list(range(experts)) for row in routing.index.tolist())
    if factor is not None:
        assert routing.dropped is not None
        assert routing.dropped.shape == routing.index.shape


def test_all_tokens_to_one_expert_fill_it_from_the_left() -> None:
    router = router_of(4, 2, capacity_factor=1.0, min_capacity=1, second_expert_policy_train="none")
    router.weight.data.zero_()[2] = 1.0
    x = torch.rand(2 * 8, HIDDEN) + 0.1
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :2] = False
    routing = router(x, mask)
    assert (routing.index[:, 0] == 2).all()
    # 8 tokens and 6 tokens over 4 experts: capacities 2 and 1.
    expected = torch.zeros(2, 8, dtype=torch.bool)
    expected[0, :2] = expected[1, 2:3] = True
    assert torch.equal(routing.weight[:, 0].view(2, 8) > 0, expected)
    assert routing.dropped is not None
    assert torch.equal(routing.dropped[:, 0].view(2, 8), mask & ~expected)
    assert not routing.dropped[:, 1].any(), "a choice that the policy did not take was not refused by capacity"


def test_refused_assignments_give_the_router_no_gradient_through_their_weight() -> None:
    router = router_of(3, 2, capacity_factor=0.5, min_capacity=1)
    x = torch.randn(12, HIDDEN)
    routing = router(x, one_group(12))
    assert routing.dropped is not None
    assert routing.dropped.any()
    refused = routing.weight[routing.dropped]
    assert (refused == 0).all()
    refused.sum().backward()
    assert router.weight.grad is not None
    assert (router.weight.grad == 0).all()


def test_registry_resolves_every_router() -> None:
    assert ROUTER_TYPES
    for name in ROUTER_TYPES:
        assert issubclass(router_class(name), Router)
    assert router_class("top_k") is TopKRouter
