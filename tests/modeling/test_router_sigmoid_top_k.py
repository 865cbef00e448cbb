"""The sigmoid top-K router against plain restatements and DeepSeek-V3's own; its bias, counts and their update.

Shape letters: T tokens, H hidden size, E experts, K choices, G sequences, S tokens of one.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from st_moe import STMoEForCausalLM, upcycle
from st_moe.modeling.routing import Routing, losses
from st_moe.modeling.routing.sigmoid_top_k import SigmoidTopKRouter, update_biases
from tests.families import dense_model, gradients, mixture, token_ids
from tests.modeling.reference import assert_close, difference, one_group, small_config

HIDDEN = 8
NEAR = 1e-5
CASTS = [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()]

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


@st.composite
def shapes(draw: st.DrawFn, least: int = 1) -> dict[str, Any]:
    """E of at least `least`, K, groups and what else decides of a router."""
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(least if groups == 1 else 2, 4))
    kept = draw(st.integers(1, groups))
    return {
        "num_experts": groups * size,
        "num_experts_per_tok": draw(st.integers(1, kept * size)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def router_of(seed: int = 0, training: bool = True, bias: float = 0.3, **fields: Any) -> SigmoidTopKRouter:
    """A router with N(0, 0.5) rows and a bias of N(0, `bias`)."""
    torch.manual_seed(seed)
    config = small_config(router_type="sigmoid_top_k", **{"num_experts_per_tok": 2, **fields})
    router = SigmoidTopKRouter(config, HIDDEN).train(training)
    nn.init.normal_(router.weight, std=0.5)
    nn.init.normal_(router.e_score_correction_bias, std=bias)
    return router


def reference_row(row: list[float], bias: list[float], fields: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Choices and weights of one token's logits, in Python's floats."""
    s = [1 / (1 + math.exp(-z)) for z in row]
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    size = len(row) // fields["n_group"]
    groups = [biased[g * size : (g + 1) * size] for g in range(fields["n_group"])]
    scores = [sum(sorted(group)[-2:]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-scores[g], g))[: fields["topk_group"]]
    open_experts = [e for e in range(len(row)) if e // size in best]
    index = sorted(open_experts, key=lambda e: (-biased[e], e))[: fields["num_experts_per_tok"]]
    total = sum(s[e] for e in index) if fields["norm_topk_prob"] else 1.0
    return index, [s[e] / total * fields["routed_scaling_factor"] for e in index]


@properties
@given(shapes(), seeds)
def test_routing_is_the_formula(fields: dict[str, Any], seed: int) -> None:
    router = router_of(seed, **fields)
    x = torch.randn(6, HIDDEN)
    routing = router(x, one_group(6))
    bias = router.e_score_correction_bias.tolist()
    logits = (x.double() @ router.weight.double().T).tolist()
    expected = [reference_row(row, bias, fields) for row in logits]
    assert routing.index.tolist() == [index for index, _ in expected]
    assert_close(routing.weight, torch.tensor([weight for _, weight in expected]), NEAR)
    s = torch.tensor(logits).sigmoid()
    assert_close(routing.probabilities, s / s.sum(-1, keepdim=True), NEAR)


@properties
@given(shapes(least=2), seeds)  # the host asks for two experts in every group
def test_routing_is_that_of_the_host(fields: dict[str, Any], seed: int) -> None:
    router = router_of(seed, **fields)
    config = DeepseekV3Config(hidden_size=HIDDEN, n_routed_experts=fields["num_experts"], **fields)
    theirs = modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    theirs.load_state_dict(router.state_dict())
    x = torch.randn(20, HIDDEN)
    logits, weight, index = theirs(x)
    routing = router(x, one_group(20))
    assert_close(routing.logits, logits, NEAR)
    assert torch.equal(routing.index.sort(-1).values, index.sort(-1).values)
    dense = torch.zeros_like(logits)
    # With one choice the host divides s by itself too.
    assert_close(dense.scatter(1, routing.index, routing.weight), dense.scatter(1, index, weight), NEAR)


def test_comparisons_reject_what_is_wrong() -> None:
    fields = {"num_experts": 8, "n_group": 4, "topk_group": 2}
    x = torch.randn(50, HIDDEN)
    router = router_of(**fields)
    routing = router(x, one_group(50))
    for other in (router_of(num_experts=8), router_of(bias=0.0, **fields)):
        assert not torch.equal(other(x, one_group(50)).index.sort(-1).values, routing.index.sort(-1).values)
    scores = routing.logits.sigmoid()
    biased = (scores + router.e_score_correction_bias).gather(1, routing.index)
    for wrong in (
        biased / biased.sum(-1, keepdim=True),  # weights with the bias
        scores.gather(1, routing.index),  # not divided by their sum
        routing.logits.gather(1, routing.index).softmax(-1),  # softmax over the chosen
    ):
        assert difference(wrong, routing.weight) > 0.05
    assert difference(routing.logits.softmax(-1), routing.probabilities) > 0.05


def test_ties_go_to_the_lowest_index() -> None:
    router = router_of(num_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, bias=0.0)
    router.weight.data.zero_()
    assert router(torch.randn(5, HIDDEN), one_group(5)).index.tolist() == [[0, 1, 2]] * 5
    # The last group wins by its best two; the first of the others, which are equal, is the second.
    router.e_score_correction_bias[6] = 0.1
    assert router(torch.randn(5, HIDDEN), one_group(5)).index.tolist() == [[6, 0, 1]] * 5
    # One good expert does not make a good group.
    router.e_score_correction_bias[7] = -0.2
    assert router(torch.randn(5, HIDDEN), one_group(5)).index.tolist() == [[0, 1, 2]] * 5


def test_gradients_are_those_of_the_formula() -> None:
    router = router_of(num_experts=6, routed_scaling_factor=1.5)
    x, pull = torch.randn(5, HIDDEN), torch.randn(5, 2)
    routing = router(x, one_group(5))
    (routing.weight * pull).sum().backward()
    weight = router.weight.detach().double().requires_grad_()
    s = (x.double() @ weight.T).sigmoid().gather(1, routing.index)
    (1.5 * s / s.sum(-1, keepdim=True) * pull).sum().backward()
    assert router.weight.grad is not None
    assert_close(router.weight.grad, weight.grad, NEAR)
    assert difference(router.weight.grad, weight.grad.flip(0)) > 0.1
    assert not router.e_score_correction_bias.requires_grad


def test_a_single_choice_has_weight_one_and_learns() -> None:
    router = router_of(num_experts_per_tok=1)
    x = torch.randn(7, HIDDEN)
    routing = router(x, one_group(7))
    assert_close(routing.weight, torch.ones(7, 1), 1e-6)
    routing.weight.sum().backward()
    z = routing.logits.detach().requires_grad_()
    z.gather(1, routing.index).sigmoid().log().sum().backward()  # d s / s = d ln s
    assert z.grad is not None
    assert router.weight.grad is not None
    assert_close(router.weight.grad, z.grad.T @ x, NEAR)


def test_scores_too_small_for_float32_give_numbers() -> None:
    router = router_of()
    router.weight.data.fill_(-60.0)
    routing = router(torch.ones(3, HIDDEN, requires_grad=True), one_group(3))
    assert routing.weight.abs().max() == 0
    assert_close(routing.probabilities, torch.full((3, 4), 0.25), NEAR)
    (routing.weight.sum() + router.balance_loss(routing)).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


def test_what_capacity_leaves_keeps_its_scale() -> None:
    tight: dict[str, Any] = {"capacity_factor": 0.5, "min_capacity": 1, "routed_scaling_factor": 2.5}
    x = torch.randn(16, HIDDEN)
    plain, again = (router_of(**tight, renormalize_after_drop=flag)(x, one_group(16)) for flag in (False, True))
    assert plain.dropped is not None
    partly = plain.dropped.any(-1) & ~plain.dropped.all(-1)
    assert partly.any()
    assert_close(again.weight[partly].sum(-1), torch.full((int(partly.sum()),), 2.5), NEAR)
    assert (plain.weight[partly].sum(-1) < 2.4).all()
    assert (again.weight[plain.dropped] == 0).all()


# ------------------------------------------------------------------------------------------------------------ losses


def reference_sequence_loss(logits: Tensor, index: Tensor, mask: Tensor) -> float:
    """DeepSeek-V3, equations 17 to 20 with alpha = 1, per sequence of real tokens and then the mean."""
    experts, choices = logits.shape[-1], index.shape[-1]
    values = []
    for row, chosen, real in zip(logits.double().view(*mask.shape, -1), index.view(*mask.shape, -1), mask, strict=True):
        length = int(real.sum())
        if length == 0:
            continue
        value = 0.0
        for e in range(experts):
            f = experts / (choices * length) * sum(float((chosen[t] == e).any()) for t in range(len(row)) if real[t])
            s = [row[t].sigmoid() for t in range(len(row)) if real[t]]
            value += f * sum(float(each[e] / each.sum()) for each in s) / length
        values.append(value)
    return sum(values) / max(len(values), 1)


@properties
@given(shapes(), seeds)
def test_sequence_loss_is_the_formula(fields: dict[str, Any], seed: int) -> None:
    router = router_of(seed, **fields)
    mask = torch.rand(3, 5) < 0.7
    routing = router(torch.randn(15, HIDDEN), mask)
    expected = reference_sequence_loss(routing.logits.detach(), routing.index, mask)
    assert router.sequence_balance_loss(routing).item() == pytest.approx(expected, rel=NEAR)
    if mask.any():
        shorter = routing._replace(token_mask=mask & (torch.arange(15) != mask.flatten().nonzero()[0]).view(3, 5))
        changed = router.sequence_balance_loss(shorter).item()
        assert changed != pytest.approx(expected, rel=NEAR) or fields["num_experts"] == fields["num_experts_per_tok"]


@pytest.mark.parametrize(("experts", "choices"), [(4, 1), (4, 2), (6, 3)])
def test_losses_at_balance_and_at_collapse(experts: int, choices: int) -> None:
    router = router_of(num_experts=experts, num_experts_per_tok=choices, sequence_balance_loss_coef=0.1)
    assert set(router.loss_names) == {"balance_loss", "sequence_balance_loss"}
    tokens = 2 * experts
    balanced = (torch.arange(tokens)[:, None] + torch.arange(choices)) % experts
    for index, first, every in ((balanced, 1, 1), (torch.arange(choices).expand_as(balanced), experts, 1)):
        # Scores of 1 at the choices and 0 elsewhere; collapsed, the best choice alone has a score.
        scored = index if every == first else index[:, :1]
        p = torch.zeros(tokens, experts).scatter(1, scored, 1.0)
        p = p / p.sum(-1, keepdim=True)
        found = router.losses(Routing(p, p, index, p.gather(1, index), one_group(tokens)))
        assert found["balance_loss"].item() == pytest.approx(first)
        assert found["sequence_balance_loss"].item() == pytest.approx(1 if first == 1 else experts / choices)


def test_the_loss_balances_what_the_bias_does_not() -> None:
    router = router_of(num_experts=4, num_experts_per_tok=1, bias=0.0)
    x = torch.randn(64, HIDDEN) + 1.0
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    before = router.balance_loss(router(x, one_group(64))).item()
    for _ in range(60):
        optimizer.zero_grad()
        router.balance_loss(router(x, one_group(64))).backward()
        optimizer.step()
    assert router.balance_loss(router(x, one_group(64))).item() < 1 + (before - 1) / 4


# ------------------------------------------------------------------------------------------------- counts and biases


def violation(counts: Tensor) -> float:
    return (counts.max() / counts.float().mean() - 1).item()


def test_counts_are_the_choices_of_real_tokens() -> None:
    router = router_of(capacity_factor=0.5, min_capacity=1)
    mask = torch.rand(3, 6) < 0.5
    expected = torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        x = torch.randn(18, HIDDEN)
        x[~mask.flatten()] = float("nan")
        routing = router(x, mask)
        assert routing.dropped is not None
        assert routing.dropped.any()
        router.observe(x, routing)
        for e in range(4):
            expected[e] += sum(int((routing.index[t] == e).sum()) for t in range(18) if mask.flatten()[t])
    assert router.counts is not None
    assert torch.equal(router.counts, expected)
    with torch.no_grad():
        router.observe(x, routing)
    assert torch.equal(router.counts, expected)


def test_update_is_the_formula() -> None:
    routers = [router_of(seed, num_experts=experts) for seed, experts in enumerate((4, 6))]
    before = [router.e_score_correction_bias.clone() for router in routers]
    routers[0].counts = torch.tensor([5, 1, 3, 3])
    update_biases(routers, 0.01)
    assert_close(routers[0].e_score_correction_bias - before[0], torch.tensor([-0.01, 0.01, 0, 0]), NEAR)
    assert torch.equal(routers[1].e_score_correction_bias, before[1])
    assert all(router.counts is None for router in routers)
    after = [router.e_score_correction_bias.clone() for router in routers]
    update_biases(routers, 0.01)
    routers[1].counts = torch.tensor([1, 0, 0, 0, 0, 0])
    update_biases(routers, 0)
    assert routers[1].counts is None
    assert all(torch.equal(r.e_score_correction_bias, old) for r, old in zip(routers, after, strict=True))


def test_updates_balance_a_fixed_batch() -> None:
    router = router_of(num_experts=8, n_group=4, topk_group=2, bias=0.0)
    x, mask = torch.randn(1024, HIDDEN) + 1.0, one_group(1024)

    def load() -> Tensor:
        return torch.bincount(router(x, mask).index.flatten(), minlength=8)

    before = violation(load())
    for _ in range(400):
        router.observe(x, router(x, mask))
        update_biases([router], 0.001)
    assert before > 1
    assert violation(load()) < 0.05


@pytest.mark.parametrize("cast", CASTS, ids=["to", "half", "bfloat16", "double"])
def test_bias_stays_float32(cast: Any) -> None:
    router = router_of()
    bias = router.e_score_correction_bias.clone()
    dtype = cast(router).weight.dtype
    assert dtype != torch.float32
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, bias)
    assert bias.to(torch.bfloat16).float().ne(bias).any(), "a cast would have rounded"
    assert router.to_empty(device="meta").e_score_correction_bias.is_meta
    assert router.to_empty(device="cpu").e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_keeps_its_bias(dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixture(router_type="sigmoid_top_k")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = model.get_buffer(name)
    bias.normal_()
    for low in (copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(device="cpu", dtype=dtype)):
        assert low.get_buffer(name).dtype == torch.float32
        assert torch.equal(low.get_buffer(name), bias)
    low.save_pretrained(tmp_path / "low")
    model.save_pretrained(tmp_path / "full")
    for folder, wanted in (("low", dtype), ("low", "auto"), ("full", dtype)):
        loaded = STMoEForCausalLM.from_pretrained(tmp_path / folder, dtype=wanted)
        assert loaded.dtype == dtype
        assert loaded.get_buffer(name).dtype == torch.float32
        assert torch.equal(loaded.get_buffer(name), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upcycled_models_compute_the_dense_function(dtype: torch.dtype) -> None:
    dense = dense_model("llama").to(dtype)
    model = upcycle(dense, num_experts=4, num_experts_per_tok=2, router_type="sigmoid_top_k", n_group=2)
    assert model.identity_proof.holds
    for block in model.model.sparse_blocks:
        assert torch.equal(block.gate.e_score_correction_bias, torch.zeros(4))
        assert block.gate.weight.dtype == dtype
        assert block.gate.weight.float().std() > 0.005


# -------------------------------------------------------------------------------------------------------- invariants


@properties
@given(shapes(), st.integers(1, 3), st.integers(1, 5), seeds)
def test_rows_are_routed_alone(fields: dict[str, Any], groups: int, length: int, seed: int) -> None:
    """Neither neighbours, padding nor later tokens matter, in training too: a row by itself routes the same."""
    router = router_of(seed, **fields)
    x = torch.randn(groups * length, HIDDEN)
    routing = router(x, torch.rand(groups, length) < 0.5)
    for t in range(len(x)):
        alone = router(x[t : t + 1], one_group(1))
        assert torch.equal(alone.index[0], routing.index[t])
        assert_close(alone.weight[0], routing.weight[t], NEAR)


@properties
@given(shapes(), st.integers(1, 4), st.integers(0, 4), seeds)
def test_padding_moves_no_loss(fields: dict[str, Any], length: int, padding: int, seed: int) -> None:
    router = router_of(seed, **fields, sequence_balance_loss_coef=0.1)
    x, junk = torch.randn(length, HIDDEN), torch.full((padding, HIDDEN), float("nan"))
    mask = torch.tensor([[True] * length + [False] * padding])
    padded, plain = router(torch.cat([x, junk]), mask), router(x, one_group(length))
    for name, loss in router.losses(padded).items():
        assert_close(loss, router.losses(plain)[name], NEAR, name)
    assert_close(losses.expert_load(padded), losses.expert_load(plain), NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    router = router_of()
    x = torch.randn(9, HIDDEN).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, one_group(9))
    expected = router(x.float(), one_group(9))
    assert routing.weight.dtype == routing.logits.dtype == torch.float32
    assert torch.equal(routing.index, expected.index)
    assert torch.equal(routing.weight, expected.weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("experts", "choices", "groups", "length"), [(4, 2, 0, 3), (4, 2, 2, 0), (4, 2, 1, 1), (4, 4, 2, 2), (1, 1, 2, 3)]
)
def test_edge_sizes(experts: int, choices: int, groups: int, length: int, training: bool) -> None:
    sizes = {"num_experts": experts, "num_experts_per_tok": choices}
    cut = {"n_group": 2, "topk_group": 2} if experts > 1 else {}
    router = router_of(**sizes, **cut, training=training, capacity_factor=1.0)
    x = torch.randn(groups * length, HIDDEN)
    routing = router(x, torch.ones(groups, length, dtype=torch.bool))
    router.observe(x, routing)
    update_biases([router], 0.1)
    assert routing.index.shape == (groups * length, choices)
    assert routing.weight.isfinite().all()
    assert router.e_score_correction_bias.isfinite().all()
    assert all(loss.isfinite() for loss in router.losses(routing).values())


def test_all_tokens_to_one_expert() -> None:
    router = router_of(num_experts_per_tok=1)
    router.e_score_correction_bias[2] = 9.0
    x = torch.randn(8, HIDDEN)
    routing = router(x, one_group(8))
    assert (routing.index == 2).all()
    router.observe(x, routing)
    before = router.e_score_correction_bias.clone()
    update_biases([router], 0.5)
    assert_close(router.e_score_correction_bias - before, torch.tensor([0.5, 0.5, -0.5, 0.5]), NEAR)


def test_a_model_trains_generates_and_is_saved(tmp_path: Path) -> None:
    model = mixture(router_type="sigmoid_top_k", num_hidden_layers=1, n_group=2, sequence_balance_loss_coef=0.1)
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    assert set(output.aux_losses) == {"balance_loss", "sequence_balance_loss"}
    assert output.router_z_loss is None
    total = sum(model.config.loss_coefficients[name] * loss for name, loss in output.aux_losses.items())
    assert_close(output.loss, output.lm_loss + total, 1e-6)
    output.loss.backward()
    found = {name: gradient for name, gradient in gradients(model).items() if ".gate." in name}
    assert len(found) == 1
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    model.update_router_bias()
    model.eval().save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert model.get_buffer(name).abs().max() > 0
    assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (2, 16)
    assert torch.equal(model(written).logits[:, 11:-1].argmax(-1), written[:, 12:])
