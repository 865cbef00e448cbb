"""Top-any routing against a loop over tokens and experts, against DynMoE's own figures, and its updates.

Shape letters: T tokens, H hidden size, E experts, G groups (sequences), S tokens of one.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from st_moe import STMoEForCausalLM, upcycle
from st_moe.modeling.routing import Routing, losses
from st_moe.modeling.routing.top_any import Adaptation, TopAnyRouter
from tests.families import dense_model, mixture, token_ids
from tests.modeling.reference import assert_close, one_group, small_config

HIDDEN = 8
NEAR = 1e-6
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "transformers_and_dynmoe.json").read_text(encoding="utf-8"))
CASE = next(case for case in GOLDEN["cases"] if case["name"] == "dynmoe_top_any_gate")
EVERY_LOSS = {f"{name}_coef": 0.1 for name in ("diversity_loss", "simplicity_loss")} | {
    "top_any_balance_loss_coef": 0.1,
    "efficiency_loss_coef": 0.1,
}

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


def top_any(
    experts: int = 4, seed: int = 0, hidden: int = HIDDEN, training: bool = True, **fields: Any
) -> TopAnyRouter:
    """A router with N(0, 1) rows and thresholds of which most tokens pass some."""
    torch.manual_seed(seed)
    fields = {"num_experts": experts, "num_experts_per_tok": 1, **fields}
    router = TopAnyRouter(small_config(router_type="top_any", **fields), hidden).train(training)
    with torch.no_grad():
        router.weight.normal_()
        router.thresholds.normal_(std=0.3)
    return router


def golden_router(**fields: Any) -> tuple[TopAnyRouter, Tensor]:
    """The golden case's router and inputs."""
    given_ = CASE["inputs"]
    router = top_any(4, hidden=4, initial_experts=3, **EVERY_LOSS, **fields)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(given_["sim_matrix"]).t())
        router.thresholds.copy_(torch.tensor(given_["thresholds"]))
    return router, torch.tensor(given_["x"])


def by_expert(values: Tensor, index: Tensor) -> Tensor:
    """[T, K] by rank -> [T, E] by expert."""
    return torch.zeros_like(values).scatter(1, index, values)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def reference(router: TopAnyRouter, x: Tensor, falls_back: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, gates and weights [T, E] in float64, one token and one expert at a time."""
    rows, inputs = router.weight.detach().double(), x.double()
    cosines, gates, weights = (torch.zeros(len(x), len(rows), dtype=torch.float64) for _ in range(3))
    for t, token in enumerate(inputs):
        best, most = None, -1.0
        for e, row in enumerate(rows):
            scale = math.sqrt(float(token @ token)) * math.sqrt(float(row @ row))
            cosines[t, e] = float(token @ row) / scale if scale else 0.0
            if not router.active_experts[e]:
                continue
            score = sigmoid(cosines[t, e].item())
            gates[t, e] = float(score > sigmoid(router.thresholds[e].item()))
            if score > most:
                best, most = e, score
        wants = gates[t].sum()
        if wants:
            weights[t] = gates[t] / wants
        elif falls_back:
            weights[t, best] = 1.0
    return cosines, gates, weights


@properties
@given(st.integers(1, 6), st.integers(0, 9), st.data(), st.booleans(), st.booleans(), seeds)
def test_routing_equals_the_loop(
    experts: int, tokens: int, data: st.DataObject, training: bool, best: bool, seed: int
) -> None:
    initial = data.draw(st.integers(1, experts))
    router = top_any(experts, seed, training=training, initial_experts=initial, fallback="best" if best else "none")
    x = torch.randn(tokens, HIDDEN)
    routing = router(x, one_group(tokens))
    cosines, gates, weights = reference(router, x, best or not training)
    assert routing.index.shape == routing.weight.shape == (tokens, experts)
    assert routing.index.dtype == torch.int64
    assert routing.logits.dtype == routing.weight.dtype == torch.float32
    assert_close(routing.logits, cosines, NEAR)
    assert torch.equal(routing.extras["open_gates"].double(), gates)
    assert_close(by_expert(routing.weight, routing.index), weights, NEAR)
    # Best first among the slots in use, which come before the others.
    scores = torch.where(router.active_experts, cosines.sigmoid().float(), 0.0).gather(1, routing.index)
    assert (scores[:, 1:] <= scores[:, :-1] + NEAR).all()
    shares = torch.where(router.active_experts, cosines.sigmoid(), 0.0)
    assert_close(routing.probabilities, shares / shares.sum(-1, keepdim=True), NEAR)


def test_the_loop_rejects_wrong_weights() -> None:
    router = top_any(4, seed=1)
    x = torch.randn(9, HIDDEN)
    routing = router(x, one_group(9))
    _, _, weights = reference(router, x, True)
    for wrong in (routing.weight.roll(1, 0), routing.weight * 0, routing.weight * 2):
        with pytest.raises(AssertionError):
            assert_close(by_expert(wrong, routing.index), weights, NEAR)


def test_golden_training_figures() -> None:
    expected = CASE["expected"]
    router, x = golden_router(fallback="none")
    router.start_recording()
    routing = router(x, one_group(len(x)))
    router.observe(x, routing)
    assert_close(routing.logits, torch.tensor(expected["cosine"]), 2e-5)
    assert routing.extras["open_gates"].tolist() == expected["gates_train"]
    assert (routing.weight > 0).sum(-1).tolist() == expected["k_train"]
    weights = by_expert(routing.weight, routing.index)
    assert weights.tolist() == expected["combine_weight_per_token_expert_train"]
    found = router.losses(routing)
    assert set(found) == {"diversity_loss", "simplicity_loss", "top_any_balance_loss", "efficiency_loss"}
    two = found["diversity_loss"] + found["simplicity_loss"]
    assert two.item() == pytest.approx(expected["diversity_plus_simplicity"], rel=2e-5)
    assert sum(found.values()).item() == pytest.approx(expected["l_aux_train"], rel=2e-5)
    record = router.stop_recording()
    assert record is not None
    assert record[0].tolist() == expected["routing_records"]
    assert_close(record[1], torch.tensor(expected["sample_records"]), NEAR)
    thresholds = router.thresholds.detach().clone()
    assert router.adapt(*record) == Adaptation([], 3)
    assert_close(router.weight[3], torch.tensor(expected["new_expert_row"]), 2e-5)
    assert router.active_experts.all()
    assert torch.equal(router.thresholds[:3], thresholds[:3])
    assert router.thresholds[3] == 0


def test_golden_evaluation_figures() -> None:
    expected = CASE["expected"]
    for fallback in ("best", "none"):
        router, x = golden_router(fallback=fallback)
        routing = router.eval()(x, one_group(len(x)))
        used = by_expert((routing.weight > 0).float(), routing.index)
        assert used.tolist() == expected["gates_eval"]
        assert (routing.weight > 0).sum(-1).tolist() == expected["k_eval"]
    gates, mask = torch.tensor(expected["gates_eval"]).float(), one_group(len(x))
    two = expected["diversity_plus_simplicity"]
    total = two + losses.top_any_balance_loss(gates, mask) + losses.efficiency_loss(gates, mask)
    assert total.item() == pytest.approx(expected["l_aux_eval"], rel=2e-5)


def test_unwanted_tokens_are_served_in_training_too_unless_asked_not_to() -> None:
    """Training and evaluation agree, which they do not in the reference."""
    for fallback, served in (("best", [1.0, 1.0]), ("none", [0.0, 1.0])):
        router = top_any(3, fallback=fallback)
        router.thresholds.data.fill_(50.0)
        x = torch.randn(6, HIDDEN)
        sums = [router.train(mode)(x, one_group(6)).weight.sum(-1) for mode in (True, False)]
        for total, expected in zip(sums, served, strict=True):
            assert total.tolist() == [expected] * 6


def test_ties_go_to_the_lowest_index_and_zeros_are_wanted_by_none() -> None:
    router = top_any(3)
    router.thresholds.data.zero_()
    routing = router(torch.zeros(2, HIDDEN), one_group(2))
    assert routing.index.tolist() == [[0, 1, 2]] * 2
    assert routing.extras["open_gates"].sum() == 0
    assert routing.weight.tolist() == [[1.0, 0.0, 0.0]] * 2


def test_gradient_at_a_zero_token_is_finite() -> None:
    router = top_any(3)
    x = torch.zeros(2, HIDDEN, requires_grad=True)
    router(x, one_group(2)).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 100


@pytest.mark.parametrize("mode", ["all", "active"])
def test_straight_through_gradients(mode: str) -> None:
    """The gradient of sum(c * weight) against the quotient rule written out, token by token."""
    router = top_any(5, seed=3, straight_through=mode, initial_experts=4)
    x = torch.randn(12, HIDDEN)
    routing = router(x, one_group(12))
    c = torch.randn(12, 5)
    (by_expert(routing.weight, routing.index) * c).sum().backward()
    _, gates, _ = reference(router, x, True)
    threshold = router.thresholds.detach().double().sigmoid()
    expected = torch.zeros(5, dtype=torch.float64)
    for t in range(12):
        served = gates[t].clone()
        if not served.any():
            served[routing.index[t, 0]] = 1.0
        k = served.sum()
        for e in range(4):
            if mode == "active" and not gates[t, e]:
                continue
            d_gate = (c[t, e] * k - (c[t] * served).sum()) / k**2
            expected[e] -= d_gate * threshold[e] * (1 - threshold[e])
    assert router.thresholds.grad is not None
    assert_close(router.thresholds.grad, expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(router.thresholds.grad * (gates.sum(0) > 3), expected, 1e-5)
    assert router.weight.grad is not None
    assert router.weight.grad[4].abs().max() == 0
    assert router.weight.grad[:4].abs().min(0).values.max() > 0


@pytest.mark.parametrize(("mode", "reached"), [("all", True), ("active", False)])
def test_only_the_full_gradient_reaches_an_expert_that_no_token_wants(mode: str, reached: bool) -> None:
    fields = {"router_type": "top_any", "straight_through": mode, "diversity_loss_coef": 0.0}
    model = mixture(**fields, simplicity_loss_coef=0.0).train()
    routers = [block.gate for block in model.model.sparse_blocks]
    for router in routers:
        router.thresholds.data[1] = 5.0
    model(token_ids(), labels=token_ids()).loss.backward()
    for router in routers:
        assert bool(router.thresholds.grad[1] != 0) == reached
        assert bool(router.weight.grad[1].any()) == reached
        assert router.thresholds.grad[[0, 2, 3]].abs().min() > 0


def test_slots_out_of_use_get_no_gradient() -> None:
    model = mixture(router_type="top_any", initial_experts=2, simplicity_loss_coef=0.0, top_any_balance_loss_coef=0.1)
    model.train()(token_ids(), labels=token_ids()).loss.backward()
    for block in model.model.sparse_blocks:
        for parameter in (*block.gate.parameters(), *block.experts.parameters()):
            assert parameter.grad[2:].abs().max() == 0
            assert parameter.grad[:2].abs().max() > 0


@properties
@given(st.integers(1, 6), st.integers(1, 9), st.data(), seeds)
def test_losses_equal_the_loop(experts: int, tokens: int, data: st.DataObject, seed: int) -> None:
    router = top_any(experts, seed, initial_experts=data.draw(st.integers(1, experts)), **EVERY_LOSS)
    x = torch.randn(tokens, HIDDEN)
    mask = torch.rand(1, tokens) < 0.7
    found = router.losses(router(x, mask))
    rows = router.weight.detach().double()
    unit = [row / row.norm() for row in rows]
    squares = 0.0
    for a in range(experts):
        for b in range(experts):
            if router.active_experts[a] and router.active_experts[b]:
                squares += float(unit[a] @ unit[b] - float(a == b)) ** 2
    assert found["diversity_loss"].item() == pytest.approx(math.sqrt(squares), abs=1e-5)
    assert found["simplicity_loss"].item() == pytest.approx(sum(float(r.norm()) for r in rows) / experts, rel=1e-5)
    _, gates, _ = reference(router, x, True)
    real = gates[mask[0]]
    wanting = [row for row in real if row.any()]
    share, mean = torch.zeros(experts).double(), torch.zeros(experts).double()
    for row in wanting:
        share += row / row.sum() / len(wanting)
        mean += row / len(wanting)
    assert found["top_any_balance_loss"].item() == pytest.approx(experts * float(share @ mean), rel=1e-5, abs=1e-7)
    efficiency = float(real.sum()) / (max(len(real), 1) * experts)
    assert found["efficiency_loss"].item() == pytest.approx(efficiency, rel=1e-5, abs=1e-7)


def test_losses_balanced_and_collapsed() -> None:
    mask = one_group(8)
    for k in (1, 2, 4):
        gates = torch.zeros(8, 4)
        for t in range(8):
            for n in range(k):
                gates[t, (t + n) % 4] = 1.0
        assert losses.top_any_balance_loss(gates, mask).item() == pytest.approx(k)
        assert losses.efficiency_loss(gates, mask).item() == pytest.approx(k / 4)
    collapsed = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(8, 4)
    assert losses.top_any_balance_loss(collapsed, mask).item() == pytest.approx(4)
    assert losses.top_any_balance_loss(collapsed * 0, mask).item() == 0
    active = torch.tensor([True, True, True, False])
    assert losses.diversity_loss(torch.eye(4) * 3, active).item() == pytest.approx(0, abs=1e-6)
    assert losses.diversity_loss(torch.ones(4, 6), active).item() == pytest.approx(math.sqrt(6))
    assert losses.simplicity_loss(torch.eye(4) * 3).item() == pytest.approx(3)


def test_losses_of_gates_carry_a_gradient_to_every_active_expert() -> None:
    for name in ("top_any_balance_loss", "efficiency_loss"):
        router = top_any(4, seed=2, initial_experts=3, **EVERY_LOSS)
        router.thresholds.data[1] = 40.0
        getattr(router, name)(router(torch.randn(9, HIDDEN), one_group(9))).backward()
        assert router.thresholds.grad is not None
        assert router.weight.grad is not None
        assert router.weight.grad[:3].abs().amax(1).min() > 0
        assert router.weight.grad[3].abs().max() == 0
        assert router.thresholds.grad[3] == 0


@properties
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 5), seeds)
def test_padding_and_neighbours_change_nothing(experts: int, length: int, padding: int, seed: int) -> None:
    router = top_any(experts, seed, **EVERY_LOSS)
    x = torch.randn(3, length, HIDDEN)
    alone = router(x.flatten(0, 1), torch.ones(3, length, dtype=torch.bool))
    padded = torch.cat([torch.randn(3, padding, HIDDEN) * 9, x], dim=1)
    mask = torch.arange(padding + length).expand(3, -1) >= padding
    beside = router(padded.flatten(0, 1), mask)
    rows = mask.flatten()
    assert torch.equal(beside.index[rows], alone.index)
    assert_close(beside.weight[rows], alone.weight, NEAR)
    for name, value in router.losses(alone).items():
        assert_close(router.losses(beside)[name], value, 1e-5, name)
    order = torch.tensor([2, 0, 1])
    moved = router(x[order].flatten(0, 1), torch.ones(3, length, dtype=torch.bool))
    assert torch.equal(moved.index.view(3, length, -1), alone.index.view(3, length, -1)[order])
    # Causal: what comes later changes nothing.
    x[:, -1] = torch.randn(3, HIDDEN)
    later = router(x.flatten(0, 1), torch.ones(3, length, dtype=torch.bool))
    assert torch.equal(later.index.view(3, length, -1)[:, :-1], alone.index.view(3, length, -1)[:, :-1])


def test_capacity_drops_assignments() -> None:
    router = top_any(2, capacity_factor=0.5, min_capacity=1)
    router.thresholds.data.fill_(-50.0)
    routing = router(torch.randn(8, HIDDEN), one_group(8))
    assert routing.dropped is not None
    assert (routing.weight > 0).sum() == 4
    assert routing.dropped.sum() == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_read_as_float32(dtype: torch.dtype) -> None:
    router = top_any(4)
    x = torch.randn(7, HIDDEN).to(dtype)
    expected = router(x.float(), one_group(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x, one_group(7))
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.logits, expected.logits)
    half = copy.deepcopy(router).to(dtype)(x, one_group(7))
    assert half.logits.dtype == half.weight.dtype == torch.float32


@pytest.mark.parametrize(("experts", "dtype"), [(4, torch.float32), (8, torch.float32), (4, torch.bfloat16)])
def test_first_rows_are_orthonormal(experts: int, dtype: torch.dtype) -> None:
    config = small_config(router_type="top_any", num_experts=experts, num_experts_per_tok=1, initial_experts=2)
    torch.set_default_dtype(dtype)
    try:
        router = TopAnyRouter(config, HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(router.weight.float() @ router.weight.float().t(), torch.eye(experts), tolerance)
    assert router.thresholds.abs().max() == 0
    assert router.active_experts.tolist() == [True] * 2 + [False] * (experts - 2)
    assert TopAnyRouter(config, 2).weight.isfinite().all()


def observed(router: TopAnyRouter, x: Tensor, mask: Tensor) -> Routing:
    routing = router(x, mask)
    router.observe(x, routing)
    return routing


def test_recording_counts_real_tokens_before_the_fallback() -> None:
    router = top_any(4, seed=5, initial_experts=3)
    router.thresholds.data += 0.5
    observed(router, torch.randn(5, HIDDEN), one_group(5))
    assert router.record is None
    router.start_recording()
    counts, unrouted = torch.zeros(4), torch.zeros(HIDDEN, dtype=torch.float64)
    for _ in range(3):
        x, mask = torch.randn(10, HIDDEN), torch.rand(2, 5) < 0.6
        _, gates, _ = reference(router, x, True)
        for t in range(10):
            if mask.flatten()[t]:
                counts += gates[t].float()
                unrouted += x[t].double() * float(not gates[t].any())
        # Padding may hold anything.
        x[~mask.flatten()] = float("nan")
        observed(router, x, mask)
    record = router.stop_recording()
    assert record is not None
    assert unrouted.abs().max() > 0
    assert record[0].tolist() == counts.tolist()
    assert_close(record[1], unrouted, 1e-5)
    assert router.record is None
    assert not any("record" in name for name in router.state_dict())


@pytest.mark.parametrize(
    ("active", "counts", "wanted", "most", "change", "after"),
    [
        ([1, 1, 1, 0], [3, 0, 2, 0], False, None, ([1], None), [1, 0, 1, 0]),
        ([1, 1, 1, 0], [3, 0, 2, 0], True, None, ([1], 1), [1, 1, 1, 0]),
        ([1, 1, 0, 0], [3, 1, 0, 0], True, None, ([], 2), [1, 1, 1, 0]),
        ([1, 1, 0, 0], [3, 1, 0, 0], True, 2, ([], None), [1, 1, 0, 0]),
        ([1, 1, 1, 0], [3, 0, 2, 0], True, 2, ([1], None), [1, 0, 1, 0]),
        ([1, 1, 1, 1], [3, 1, 1, 1], True, None, ([], None), [1, 1, 1, 1]),
        ([0, 1, 1, 0], [0, 0, 0, 0], True, None, ([2], 0), [1, 1, 0, 0]),
        ([0, 1, 1, 0], [0, 0, 0, 0], True, 1, ([2], None), [0, 1, 0, 0]),
        ([0, 1, 1, 0], [0, 0, 0, 0], False, None, ([], None), [0, 1, 1, 0]),
    ],
)
def test_adapt(
    active: list[int],
    counts: list[int],
    wanted: bool,
    most: int | None,
    change: tuple[list[int], int | None],
    after: list[int],
) -> None:
    router = top_any(4)
    router.active_experts.copy_(torch.tensor(active))
    before = copy.deepcopy(router)
    total = torch.randn(HIDDEN) * float(wanted)
    assert router.adapt(torch.tensor(counts), total, most) == Adaptation(*change)
    assert router.active_experts.tolist() == [bool(a) for a in after]
    added = change[1]
    for slot in range(4):
        if slot == added:
            assert_close(router.weight[slot], total / total.norm(), NEAR)
            assert router.thresholds[slot] == 0
        else:
            assert torch.equal(router.weight[slot], before.weight[slot])
            assert router.thresholds[slot] == before.thresholds[slot]


def test_a_new_expert_wants_the_tokens_that_none_wanted() -> None:
    router = top_any(4, initial_experts=2)
    router.thresholds.data.fill_(3.0)
    x = torch.randn(HIDDEN) + 0.1 * torch.randn(6, HIDDEN)
    router.start_recording()
    observed(router, x, one_group(6))
    record = router.stop_recording()
    assert record is not None
    assert router.adapt(*record) == Adaptation([1], 1)
    assert router(x, one_group(6)).extras["open_gates"].tolist() == [[0.0, 1.0, 0.0, 0.0]] * 6


def test_a_sum_that_is_not_finite_adds_nothing() -> None:
    router = top_any(3, initial_experts=2)
    assert router.adapt(torch.tensor([1, 1, 0]), torch.full((HIDDEN,), float("nan"))) == Adaptation([], None)
    assert router.weight.isfinite().all()


def test_model_trains_saves_and_generates(tmp_path: Path) -> None:
    model = mixture(router_type="top_any", initial_experts=3, **EVERY_LOSS).train()
    output = model(token_ids(), labels=token_ids())
    assert set(output.aux_losses) == {"diversity_loss", "simplicity_loss", "top_any_balance_loss", "efficiency_loss"}
    assert output.balance_loss is None
    output.loss.backward()
    for block in model.model.sparse_blocks:
        assert block.gate.weight.grad.abs().max() > 0
        assert block.gate.thresholds.grad.abs().max() > 0
    model.model.sparse_blocks[1].gate.active_experts.copy_(torch.tensor([False, True, False, True]))
    model.eval().save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert [b.gate.active_experts.tolist() for b in loaded.model.sparse_blocks] == [
        [True, True, True, False],
        [False, True, False, True],
    ]
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    cached = loaded.generate(token_ids(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(token_ids(), max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)


def test_upcycled_model_keeps_the_function() -> None:
    dense = dense_model("llama")
    for dtype in (torch.float32, torch.bfloat16):
        model = upcycle(dense.to(dtype), num_experts=4, router_type="top_any", initial_experts=2, verify=False)
        gate = model.model.sparse_blocks[0].gate
        assert gate.active_experts.tolist() == [True, True, False, False]
        assert gate.active_experts.dtype == torch.bool
        if dtype == torch.float32:
            assert_close(model.eval()(token_ids()).logits, dense(token_ids()).logits, 1e-5)


def test_a_missing_buffer_is_filled_on_loading(tmp_path: Path) -> None:
    mixture(router_type="top_any", initial_experts=3).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "active_experts" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    for block in STMoEForCausalLM.from_pretrained(tmp_path).model.sparse_blocks:
        assert block.gate.active_experts.tolist() == [True, True, True, False]
