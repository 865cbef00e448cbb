"""The expert-choice router: who is taken, with which weight, and what padding and neighbours must not change.

Shape letters: T tokens, H hidden size, E experts, K choices, G sequences, S tokens of one.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from st_moe import STMoEConfig, STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel
from st_moe.modeling.routing import Routing, losses
from st_moe.modeling.routing.expert_choice import ExpertChoiceRouter
from tests.families import mixture, relative_difference, token_ids
from tests.modeling.reference import assert_close, difference, one_group, small_config

HIDDEN = 8
NEAR = 1e-5
SCOPES = ("sequence", "batch", "group")

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)
factors = st.none() | st.floats(0.2, 5)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """E and K <= E."""
    experts = draw(st.integers(1, 6))
    return experts, draw(st.integers(1, experts))


def router_of(experts: int, choices: int, seed: int = 0, training: bool = True, **fields: Any) -> ExpertChoiceRouter:
    torch.manual_seed(seed)
    size = {"num_experts": experts, "num_experts_per_tok": choices}
    config = small_config(router_type="expert_choice", allow_non_causal_routing=True, **size, **fields)
    router = ExpertChoiceRouter(config, HIDDEN).train(training)
    nn.init.normal_(router.weight)
    return router


def weights_by_expert(routing: Routing) -> Tensor:
    """Combine weights [T, E]."""
    return torch.zeros_like(routing.logits).scatter(1, routing.index, routing.weight)


def reference(
    p: Tensor, mask: Tensor, factor: float, least: int, scope: str = "sequence", group_size: int = 1024
) -> Tensor:
    """Combine weights [T, E]: each expert picks from a list of each group's real tokens."""
    tokens, experts = p.shape
    size = {"sequence": mask.shape[1], "batch": tokens, "group": group_size}[scope]
    weights = torch.zeros_like(p)
    for first in range(0, tokens, max(size, 1)):
        real = [t for t in range(first, min(first + size, tokens)) if mask.flatten()[t]]
        capacity = max(min(len(real), math.floor(len(real) * factor / experts)), least)
        for e in range(experts):
            for t in sorted(real, key=lambda t: (-p[t, e].item(), t))[:capacity]:
                weights[t, e] = p[t, e]
    return weights


def gate_gradient(model: nn.Module) -> Tensor:
    """Gradient of a model's only router."""
    (gradient,) = (p.grad for name, p in model.named_parameters() if name.endswith(".gate.weight"))
    assert gradient is not None
    return gradient


def test_a_known_choice() -> None:
    router = router_of(2, 1)
    router.weight.data = torch.eye(2, HIDDEN)
    x = torch.zeros(4, HIDDEN)
    x[:, 0] = torch.tensor([3.0, 1.0, 2.0, -1.0])
    routing = router(x, one_group(4))
    p = x[:, 0].sigmoid()
    # Four tokens, two experts, one each on average: an expert takes two.
    assert_close(weights_by_expert(routing)[:, 0], torch.stack([p[0], 0 * p[1], p[2], 0 * p[3]]), NEAR)
    assert_close(weights_by_expert(routing)[:, 1], torch.stack([0 * p[0], 1 - p[1], 0 * p[2], 1 - p[3]]), NEAR)
    assert routing.index.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert routing.dropped is None


@properties
@given(sizes(), st.integers(1, 3), st.integers(1, 7), st.sampled_from(SCOPES), factors, st.integers(1, 4), seeds)
def test_choices_against_lists(
    size: tuple[int, int], groups: int, length: int, scope: str, factor: float | None, least: int, seed: int
) -> None:
    experts, choices = size
    fields = {"capacity_factor": factor, "min_capacity": least, "capacity_scope": scope, "capacity_group_size": 4}
    router = router_of(experts, choices, seed, **fields)
    x = torch.randn(groups * length, HIDDEN)
    mask = torch.rand(groups, length) < 0.7
    routing = router(x, mask)
    by_config = (choices, 1) if factor is None else (factor, least)
    expected = reference(routing.probabilities, mask, *by_config, scope, 4)
    assert torch.equal(weights_by_expert(routing), expected)
    assert_close(routing.logits, x @ router.weight.t(), NEAR)
    assert_close(routing.probabilities, routing.logits.softmax(-1), NEAR)
    assert routing.index.shape == routing.weight.shape == (len(x), experts)
    assert routing.index.dtype == torch.int64
    assert [sorted(row) for row in routing.index.tolist()] == [list(range(experts))] * len(x)
    assert (routing.weight[:, 1:] <= routing.weight[:, :-1]).all(), "best first, the absent last"
    assert (routing.weight[~mask.flatten()] == 0).all(), "padding is never taken"
    if scope != "group" and mask.any():
        assert_close(losses.expert_load(routing), torch.full((experts,), 1 / experts), NEAR)


def test_lists_tell_other_rules() -> None:
    """Negative control: token choice, one token more, another scope and an ignored mask all differ."""
    router = router_of(4, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    routing = router(torch.randn(12, HIDDEN), mask)
    actual, p = weights_by_expert(routing), routing.probabilities
    assert torch.equal(actual, reference(p, mask, 2, 1))
    best = p.topk(2, dim=-1)
    assert not torch.equal(actual, torch.zeros_like(p).scatter(1, best.indices, best.values))
    for wrong in (
        reference(p, mask, 2.7, 1),
        reference(p, mask, 2, 4),
        reference(p, mask, 2, 1, "batch"),
        reference(p, torch.ones_like(mask), 2, 1),
    ):
        assert not torch.equal(actual, wrong)


def test_modes_have_their_own_capacity_factor() -> None:
    router = router_of(4, 1, capacity_factor=2.0, eval_capacity_factor=0.5, min_capacity=1)
    x = torch.randn(16, HIDDEN)
    assert (router(x, one_group(16)).weight > 0).sum() == 4 * 8
    assert (router.eval()(x, one_group(16)).weight > 0).sum() == 4 * 2


def test_least_capacity_counts_only_with_a_factor() -> None:
    x = torch.randn(8, HIDDEN)
    without, with_factor = router_of(8, 1), router_of(8, 1, capacity_factor=1.0)
    assert (without(x, one_group(8)).weight > 0).sum() == 8
    assert (with_factor(x, one_group(8)).weight > 0).sum() == 8 * 4
    few = with_factor(x, (torch.arange(8) < 2)[None])
    assert (few.weight > 0).sum() == 8 * 2, "no expert takes more tokens than there are"


def test_ties_go_to_the_lowest_position() -> None:
    mask = one_group(6)
    mask[0, 0] = False
    routing = router_of(3, 1)(torch.zeros(6, HIDDEN), mask)
    # Five real tokens, three experts: one each.
    assert (routing.weight > 0).nonzero()[:, 0].unique().tolist() == [1]
    assert routing.index.tolist() == [[0, 1, 2]] * 6


def test_as_many_choices_as_experts_is_the_whole_softmax() -> None:
    router = router_of(4, 4)
    x = torch.randn(7, HIDDEN)
    routing = router(x, one_group(7))
    assert_close(weights_by_expert(routing), (x @ router.weight.t()).softmax(-1), NEAR)


def test_weights_are_renormalised_only_if_asked() -> None:
    x = torch.randn(12, HIDDEN)
    raw = router_of(4, 1)(x, one_group(12)).weight
    scaled = router_of(4, 1, renormalize_after_drop=True)(x, one_group(12)).weight
    total = raw.sum(-1, keepdim=True)
    assert (total == 0).any(), "some token is taken by nobody"
    assert ((total > 0) & (total < 0.95)).any()
    assert_close(scaled, torch.where(total > 0, raw / total.clamp(min=1e-9), 0.0), NEAR)


@properties
@given(sizes(), st.integers(1, 3), st.integers(1, 6), factors, seeds)
def test_a_sequence_does_not_see_its_neighbours(
    size: tuple[int, int], groups: int, length: int, factor: float | None, seed: int
) -> None:
    router = router_of(*size, seed, capacity_factor=factor)
    x = torch.randn(groups, length, HIDDEN)
    mask = torch.rand(groups, length) < 0.7
    order = torch.randperm(groups)
    weights = weights_by_expert(router(x.flatten(0, 1), mask)).view(groups, length, -1)
    permuted = weights_by_expert(router(x[order].flatten(0, 1), mask[order])).view(groups, length, -1)
    assert_close(permuted, weights[order], NEAR)
    alone = [weights_by_expert(router(x[g], mask[g : g + 1])) for g in range(groups)]
    assert_close(torch.stack(alone), weights, NEAR)


@properties
@given(sizes(), st.integers(1, 6), st.integers(0, 5), st.booleans(), st.sampled_from(SCOPES[:2]), factors, seeds)
def test_padding_changes_nothing(
    size: tuple[int, int], length: int, padding: int, left: bool, scope: str, factor: float | None, seed: int
) -> None:
    router = router_of(*size, seed, capacity_factor=factor, capacity_scope=scope)
    x, pad = torch.randn(2, length, HIDDEN), torch.full((2, padding, HIDDEN), float("nan"))
    real, unreal = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, padding, dtype=torch.bool)
    mask = torch.cat([unreal, real] if left else [real, unreal], dim=1)
    padded = router(torch.cat([pad, x] if left else [x, pad], dim=1).flatten(0, 1), mask)
    plain = router(x.flatten(0, 1), real)
    assert_close(weights_by_expert(padded)[mask.flatten()], weights_by_expert(plain), NEAR)
    assert (padded.weight[~mask.flatten()] == 0).all()


def test_later_tokens_matter() -> None:
    router = router_of(4, 2)
    x = torch.randn(8, HIDDEN)
    before = weights_by_expert(router(x, one_group(8)))
    x[4:] = torch.randn(4, HIDDEN)
    assert difference(weights_by_expert(router(x, one_group(8)))[:4], before[:4]) > 0.1


def test_gradient_of_the_weights() -> None:
    router = router_of(5, 2)
    x = torch.randn(7, HIDDEN, requires_grad=True)
    cotangent = torch.randn(7, 5)
    routing = router(x, one_group(7))
    actual = torch.autograd.grad((weights_by_expert(routing) * cotangent).sum(), [x, router.weight])
    p = (x.double() @ router.weight.double().t()).softmax(-1)
    taken = reference(p.detach(), one_group(7), 2, 1) > 0
    expected = torch.autograd.grad((p * taken * cotangent).sum(), [x, router.weight], retain_graph=True)
    wrong = torch.autograd.grad((p * cotangent).sum(), [x, router.weight])
    for a, b, c in zip(actual, expected, wrong, strict=True):
        assert_close(a, b, NEAR)
        assert difference(a, c) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    router = router_of(4, 2)
    x = torch.randn(9, HIDDEN).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, one_group(9))
    expected = router(x.float(), one_group(9))
    assert routing.weight.dtype == torch.float32
    assert torch.equal(routing.index, expected.index)
    assert torch.equal(routing.weight, expected.weight)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("experts", "choices", "groups", "length"), [(4, 2, 0, 3), (4, 2, 2, 0), (4, 2, 1, 1), (3, 3, 2, 2), (1, 1, 2, 3)]
)
def test_edge_sizes(experts: int, choices: int, groups: int, length: int, scope: str) -> None:
    router = router_of(experts, choices, capacity_scope=scope, capacity_group_size=4)
    x = torch.randn(groups * length, HIDDEN)
    routing = router(x, torch.ones(groups, length, dtype=torch.bool))
    assert routing.index.shape == routing.weight.shape == (groups * length, experts)
    assert router.losses(routing) == {}
    if groups * length == 1 or experts == choices:
        assert_close(routing.weight.sum(-1), torch.ones(groups * length), NEAR)
    none = router(x, torch.zeros(groups, length, dtype=torch.bool))
    assert (none.weight == 0).all()


def test_experts_that_want_the_same_tokens_all_get_them() -> None:
    router = router_of(4, 1)
    router.weight.data[:] = router.weight.data[:1]
    router.weight.data[2] = 0.0
    routing = router(torch.randn(8, HIDDEN), one_group(8))
    taken = weights_by_expert(routing) > 0
    assert taken.sum(0).tolist() == [2, 2, 2, 2]
    assert torch.equal(taken[:, 0], taken[:, 1])
    assert torch.equal(taken[:, 0], taken[:, 3])
    assert not torch.equal(taken[:, 0], taken[:, 2])


def test_evaluation_is_deterministic() -> None:
    router = router_of(4, 2, training=False)
    x = torch.randn(8, HIDDEN)
    assert torch.equal(router(x, one_group(8)).weight, router(x, one_group(8)).weight)


@pytest.mark.parametrize("auto", [STMoEModel, STMoEForSequenceClassification])
def test_an_encoder_takes_it_freely(auto: type, tmp_path: Path) -> None:
    model = mixture("bert", auto, router_type="expert_choice", num_hidden_layers=1)
    name = "logits" if auto is STMoEForSequenceClassification else "last_hidden_state"
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    output = model(ids, attention_mask=mask)[name]
    short = model(ids[1:, :5])[name]
    assert relative_difference(output[1:] if name == "logits" else output[1:, :5], short) < NEAR
    model.train()(ids, attention_mask=mask)[name].square().sum().backward()
    assert gate_gradient(model).abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(auto.from_pretrained(tmp_path)(ids, attention_mask=mask)[name], output)


def test_a_causal_model_takes_it_only_if_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_non_causal_routing"):
        STMoEConfig(dense_model_type="llama", router_type="expert_choice")
    model = mixture(router_type="expert_choice", allow_non_causal_routing=True, num_hidden_layers=1)
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    assert output.aux_losses == {}
    assert torch.equal(output.loss, output.lm_loss)
    assert output.dropped_fraction.tolist() == [0]
    output.loss.backward()
    assert gate_gradient(model).abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(STMoEForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 15)
