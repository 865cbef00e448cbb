"""Coordinate descent: against a plain float64 loop and its own limit; and the router that takes its weights from it.

Shape letters: T tokens, H hidden size, E experts, K choices, n scores of one row.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_moe import STMoEForCausalLM
from st_moe.modeling.routing.coordinate_descent import CoordinateDescentRouter, coordinate_descent
from st_moe.modeling.routing.top_k import TopKRouter
from tests.families import gradients, mixture, token_ids
from tests.modeling.reference import assert_close, difference, one_group, small_config

HIDDEN = 8
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


def descend(
    scores: list[float],
    k: float,
    iterations: int = 20,
    epsilon: float = 0.1,
    first: float | None = None,
    decay: float = 1.0,
    mask: list[bool] | None = None,
) -> list[float]:
    """One row, number by number; entries that are masked are left out altogether."""
    places = [j for j in range(len(scores)) if mask is None or mask[j]]
    s = [scores[j] for j in places]
    e = max(epsilon if first is None else first, epsilon)
    a, b = 0.0, [-value for value in s]
    for _ in range(iterations):
        raised = [(value + lower) / e for value, lower in zip(s, b, strict=True)]
        top = max(raised)
        a = e * (math.log(k) - top - math.log(sum(math.exp(value - top) for value in raised)))
        b = [-max(value + a, 0.0) for value in s]
        e = max(e * decay, epsilon)
    result = [0.0] * len(scores)
    for j, value, lower in zip(places, s, b, strict=True):
        result[j] = math.exp((value + a + lower) / e)
    return result


def limit(scores: list[float], k: float, epsilon: float) -> list[float]:
    """min(1, exp((s + a) / epsilon)) with the a that makes the sum k, found by bisection."""
    low, high = -max(scores) - 100.0, -min(scores) + 100.0
    for _ in range(200):
        a = (low + high) / 2
        total = sum(math.exp(min(0.0, (value + a) / epsilon)) for value in scores)
        low, high = (a, high) if total < k else (low, a)
    return [math.exp(min(0.0, (value + low) / epsilon)) for value in scores]


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fractional": {"k": 2.25},
    "scaling": {"first": 4.0, "decay": 0.7},
    "one iteration": {"iterations": 1},
    "many iterations": {"iterations": 500},
    "k is n": {"k": 6},
    "warm": {"epsilon": 1.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_plain_loop(case: dict[str, Any], masked: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 6)
    mask = torch.rand(5, 6) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    wanted = {"k": 2, "iterations": 20, "epsilon": 0.1, "first": None, "decay": 1.0, **case}

    def plain(**changed: Any) -> Tensor:
        masks = [None] * 5 if mask is None else mask.tolist()
        rows = zip(scores.double().tolist(), masks, strict=True)
        return torch.tensor([descend(row, **{**wanted, **changed}, mask=m) for row, m in rows])

    k, iterations, epsilon, first, decay = wanted.values()
    actual = coordinate_descent(scores, k, iterations, epsilon, first, decay, mask)
    assert actual.dtype == torch.float32
    assert_close(actual, plain(), 3e-5)
    assert difference(actual, plain(k=k / 2)) > 1e-3
    assert difference(actual, plain(epsilon=epsilon * 1.1)) > 1e-3
    if "scaling" not in case and iterations == 20 and k < 6:
        assert difference(actual, plain(iterations=3)) > 1e-3


@properties
@given(st.integers(2, 7), st.floats(0.3, 6.5), st.sampled_from([0.3, 1.0]), seeds)
def test_the_limit(n: int, k: float, epsilon: float, seed: int) -> None:
    k = min(k, n - 0.5)
    torch.manual_seed(seed)
    scores = torch.rand(3, n, dtype=torch.float64)
    actual = coordinate_descent(scores, k, 500, epsilon)
    expected = torch.tensor([limit(row, k, epsilon) for row in scores.tolist()])
    assert actual.dtype == torch.float64
    assert_close(actual.sum(-1), torch.full((3,), k), 1e-4)
    assert_close(actual, expected, 1e-4)
    if (expected == 1).any():
        assert difference(actual, scores.softmax(-1) * k) > 1e-4, "the bound must show"


@properties
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0.25, 4), st.integers(1, 25), seeds)
def test_memberships_are_bounded_and_keep_the_order(n: int, rows: int, k: float, iterations: int, seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(rows, n)
    actual = coordinate_descent(scores, k, iterations)
    assert ((actual >= 0) & (actual <= 1 + 1e-5)).all()
    order = scores.argsort(-1, descending=True)
    # Entries at the bound are 1 up to rounding.
    ranked = actual.gather(-1, order)
    assert (ranked[:, 1:] <= ranked[:, :-1] + 1e-5).all()


def test_one_k_per_row() -> None:
    scores = torch.randn(2, 3, 6)
    k = torch.tensor([[1.0, 2.0, 3.5], [0.5, 6.0, 2.25]])
    actual = coordinate_descent(scores, k)
    for i in range(2):
        for j in range(3):
            assert_close(actual[i, j], coordinate_descent(scores[i, j], k[i, j].item()), 1e-6)
    assert difference(actual, coordinate_descent(scores, k.flip(0))) > 0.1
    assert torch.equal(coordinate_descent(scores, torch.tensor(2)), coordinate_descent(scores, 2))


@pytest.mark.parametrize("case", ["defaults", "fractional", "scaling"])
def test_gradients(case: str) -> None:
    torch.manual_seed(1)
    # Away from the kink at the bound finite differences hold.
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 2:4] = False
    options = {"defaults": {}, "fractional": {"k": 2.25}, "scaling": {"epsilon_init": 4.0, "epsilon_decay": 0.7}}[case]

    def of(s: Tensor) -> Tensor:
        return coordinate_descent(s, **{"k": 1.5, "num_iterations": 6, "epsilon": 0.3, "mask": mask, **options})

    assert torch.autograd.gradcheck(of, scores)
    (gradient,) = torch.autograd.grad((of(scores) * torch.arange(5)).sum(), scores)
    assert gradient.abs().max() > 0.01
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_entries_count_for_nothing(garbage: float) -> None:
    scores = torch.randn(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    scores[~mask] = garbage
    scores.requires_grad_()
    actual = coordinate_descent(scores, 2, mask=mask)
    assert (actual[~mask] == 0).all()
    assert_close(actual[1, :4], coordinate_descent(scores[1, :4], 2), 1e-6)
    assert difference(actual[1, :4], coordinate_descent(scores[1, :4].nan_to_num(0), 1)) > 0.01
    (actual * torch.arange(6)).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_read_as_float32(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 6).to(dtype)
    actual = coordinate_descent(scores, 2)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, coordinate_descent(scores.float(), 2))


def test_no_rows() -> None:
    assert coordinate_descent(torch.zeros(0, 4), 2).shape == (0, 4)


# The router.


def router_of(experts: int = 4, choices: int = 2, seed: int = 0, **fields: Any) -> CoordinateDescentRouter:
    torch.manual_seed(seed)
    config = small_config(router_type="coordinate_descent", num_experts=experts, num_experts_per_tok=choices, **fields)
    router = CoordinateDescentRouter(config, HIDDEN)
    torch.nn.init.normal_(router.weight)
    return router


def plain_weights(router: CoordinateDescentRouter, x: Tensor, ratio: float, normalize: bool) -> Tensor:
    """Combine weights [T, K], token by token in float64."""
    rows = []
    for p in (x.double() @ router.weight.double().t()).softmax(-1).tolist():
        membership = descend(p, min(ratio * router.top_k, len(p)))
        chosen = sorted(range(len(p)), key=lambda e, p=p: (-p[e], e))[: router.top_k]
        total = sum(membership[e] for e in chosen) if normalize else 1.0
        rows.append([membership[e] / total for e in chosen])
    return torch.tensor(rows)


@properties
@given(st.integers(1, 6), st.data(), st.sampled_from([1.0, 1.125, 4.0]), st.booleans(), seeds)
def test_weights_are_memberships_at_the_best_experts(
    experts: int, data: st.DataObject, ratio: float, normalize: bool, seed: int
) -> None:
    choices = data.draw(st.integers(1, experts))
    router = router_of(experts, choices, seed, coordinate_descent_k_ratio=ratio, norm_topk_prob=normalize)
    x = torch.randn(5, HIDDEN)
    routing = router(x, one_group(5))
    plain = TopKRouter(small_config(num_experts=experts, num_experts_per_tok=choices), HIDDEN)
    plain.weight = router.weight
    assert torch.equal(routing.index, plain(x, one_group(5)).index)
    assert torch.equal(routing.probabilities, routing.logits.softmax(-1))
    assert_close(routing.weight, plain_weights(router, x, ratio, normalize), 3e-5)


def test_weights_are_not_those_of_plain_top_k() -> None:
    """Negative control of the comparison above."""
    router, x = router_of(), torch.randn(20, HIDDEN)
    weight = router(x, one_group(20)).weight
    assert difference(weight, plain_weights(router, x, 4.0, True)) > 0.01
    assert difference(weight, TopKRouter.choose(router, router(x, one_group(20)).probabilities)[0]) > 0.01


def test_ties_go_to_the_lowest_index() -> None:
    routing = router_of(4, 2)(torch.zeros(3, HIDDEN), one_group(3))
    assert routing.index.tolist() == [[0, 1]] * 3
    assert_close(routing.weight, torch.full((3, 2), 0.5), 1e-6)


def test_the_policy_reads_the_memberships() -> None:
    fields = {"second_expert_policy_train": "threshold", "second_expert_threshold": 0.3}
    x = torch.randn(50, HIDDEN)
    every, some = router_of()(x, one_group(50)).weight, router_of(**fields)(x, one_group(50)).weight
    assert torch.equal(some[:, 1], torch.where(every[:, 1] > 0.3, every[:, 1], 0.0))
    assert 0 < (some[:, 1] == 0).sum() < 50
    probabilities = TopKRouter.choose(router_of(), router_of()(x, one_group(50)).probabilities)[0]
    assert ((probabilities[:, 1] > 0.3) != (every[:, 1] > 0.3)).any()


def test_one_choice_weighs_one() -> None:
    router = router_of(4, 1)
    assert (router(torch.randn(9, HIDDEN), one_group(9)).weight == 1).all()


def test_capacity_padding_and_types() -> None:
    router = router_of(capacity_factor=0.5, min_capacity=1)
    x = torch.randn(2, 6, HIDDEN)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    routing = router(x.flatten(0, 1), mask)
    alone = router(x[0, 2:], one_group(4))
    assert routing.dropped is not None
    assert routing.dropped.any()
    assert torch.equal(routing.index[2:6], alone.index)
    assert_close(routing.weight[2:6], alone.weight, 1e-5)
    low = router(x.flatten(0, 1).bfloat16(), mask)
    assert torch.equal(low.weight, router(x.flatten(0, 1).bfloat16().float(), mask).weight)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    routing = router_of()(torch.randn(tokens, HIDDEN), one_group(tokens))
    assert routing.weight.shape == (tokens, 2)


def test_a_model_trains_saves_and_generates(tmp_path: Path) -> None:
    model = mixture(router_type="coordinate_descent", num_experts_per_tok=2)
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert all(block.gate.weight.grad.abs().max() > 0 for block in model.model.sparse_blocks)
    assert {"balance_loss", "router_z_loss"} == set(output.aux_losses)
    model.eval().save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = model(ids).logits
        assert_close(loaded(ids).logits, logits, 1e-6)
        changed = ids.clone()
        changed[:, 8:] = 3
        assert_close(model(changed).logits[:, :8], logits[:, :8], 1e-5)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    uncached = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(generated, uncached)
