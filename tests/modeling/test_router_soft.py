"""The soft router: dispatch, combine and the experts between them against a restatement in float64.

Shape letters: T tokens, H hidden size, E experts, P slots per expert, N = E * P slots, G sequences, S tokens of one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from st_moe import STMoEConfig, STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel
from st_moe.modeling.experts import STMoEExperts
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.soft import SoftRouter
from tests.families import mixture, relative_difference, token_ids
from tests.modeling.reference import assert_close, difference, make_experts, one_group, reference_expert, small_config

HIDDEN = 8
NEAR = 1e-5

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)
counts = st.integers(1, 4)


def router_of(experts: int = 3, slots: int = 2, seed: int = 0, training: bool = True, **fields: Any) -> SoftRouter:
    """A router whose softmaxes are far from uniform."""
    torch.manual_seed(seed)
    size = {"num_experts": experts, "num_experts_per_tok": 1, "slots_per_expert": slots}
    config = small_config(router_type="soft", allow_non_causal_routing=True, **size, **fields)
    router = SoftRouter(config, HIDDEN).train(training)
    nn.init.normal_(router.weight)
    nn.init.constant_(router.scale, 3.0)
    return router


def experts_of(experts: int = 3, implementation: str = "st_moe") -> STMoEExperts:
    return make_experts(implementation=implementation, num_experts=experts, num_experts_per_tok=1)


def reference_weights(router: SoftRouter, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, dispatch and combine, each float64 [T, N], token by token and sequence by sequence."""
    mu = router.weight.double()
    mu = torch.stack([row / (row @ row + 1e-6).sqrt() for row in mu])
    rows = [row / (row @ row + 1e-6).sqrt() for row in x.double()]
    logits = torch.stack([router.scale.double() * (mu @ row) for row in rows])
    dispatch, combine = [], []
    for g in range(len(mask)):
        own = range(g * mask.shape[1], (g + 1) * mask.shape[1])
        total = sum((logits[t].exp() for t in own if mask.flatten()[t]), torch.zeros(len(mu)))
        dispatch += [logits[t].exp() / total if mask.flatten()[t] else logits[t] * 0 for t in own]
        combine += [logits[t].exp() / logits[t].exp().sum() for t in own]
    return logits, torch.stack(dispatch), torch.stack(combine)


def reference_layer(router: SoftRouter, experts: STMoEExperts, x: Tensor, mask: Tensor) -> Tensor:
    """The layer's output, float64 [T, H], slot by slot."""
    _, dispatch, combine = reference_weights(router, x, mask)
    parameters, length = experts.parameters_of_all().map(torch.Tensor.double), mask.shape[1]
    output = []
    for g in range(len(mask)):
        own = range(g * length, (g + 1) * length)
        slots = []
        for n in range(len(router.weight)):
            slot = sum((dispatch[t, n] * x[t].double() for t in own), torch.zeros(HIDDEN))
            slots.append(reference_expert(slot, parameters, n // router.slots_per_expert, experts.act_fn, True))
        output += [sum(combine[t, n] * slot for n, slot in enumerate(slots)) for t in own]
    return torch.stack(output)


def layer(router: SoftRouter, experts: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return router.mix(experts, x, router(x, mask))


@properties
@given(counts, counts, st.integers(1, 3), st.integers(1, 5), seeds)
def test_the_record_against_the_formulas(experts: int, slots: int, groups: int, length: int, seed: int) -> None:
    router = router_of(experts, slots, seed)
    x = torch.randn(groups * length, HIDDEN)
    mask = torch.rand(groups, length) < 0.7
    routing = router(x, mask)
    logits, dispatch, combine = reference_weights(router, x, mask)
    assert_close(routing.extras["dispatch"], dispatch, NEAR)
    assert_close(routing.extras["combine"], combine, NEAR)
    assert (routing.extras["dispatch"][~mask.flatten()] == 0).all()
    per_expert = combine.view(-1, experts, slots).sum(-1)
    assert_close(routing.logits, logits.view(-1, experts, slots).exp().sum(-1).log(), 1e-4)
    assert_close(routing.probabilities, per_expert, NEAR)
    assert_close(routing.probabilities, routing.logits.softmax(-1), NEAR)
    assert routing.index.dtype == torch.int64
    assert [sorted(row) for row in routing.index.tolist()] == [list(range(experts))] * len(x)
    assert torch.equal(routing.weight, routing.probabilities.gather(1, routing.index))
    assert (routing.weight[:, 1:] <= routing.weight[:, :-1]).all()
    assert routing.dropped is None
    assert router.losses(routing) == {}
    if mask.any():
        assert_close(losses.expert_load(routing), torch.full((experts,), 1 / experts), NEAR)


@pytest.mark.parametrize("implementation", ["st_moe", "eager"])
@pytest.mark.parametrize(("number", "slots"), [(3, 2), (4, 1), (1, 3)])
def test_mix_and_its_gradients_against_the_formulas(number: int, slots: int, implementation: str) -> None:
    router, experts = router_of(number, slots), experts_of(number, implementation)
    x = torch.randn(10, HIDDEN, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    actual, expected = layer(router, experts, x, mask), reference_layer(router, experts, x, mask)
    assert_close(actual, expected, NEAR)
    cotangent = torch.randn(10, HIDDEN)
    places = [x, *router.parameters(), *experts.parameters()]
    ours = torch.autograd.grad((actual * cotangent).sum(), places)
    theirs = torch.autograd.grad((expected * cotangent).sum(), places)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3, "too small to compare"
        assert_close(a, b, 1e-4)


def test_formulas_tell_other_routers() -> None:
    """Negative control: another scale, order of slots, mask, or cut of the tokens into sequences misses the output."""
    router, experts = router_of(), experts_of()
    x, mask = torch.randn(10, HIDDEN), torch.ones(2, 5, dtype=torch.bool)
    actual = layer(router, experts, x, mask)
    assert_close(actual, reference_layer(router, experts, x, mask), NEAR)
    fewer = mask.clone()
    fewer[0, 0] = False
    for other in (fewer, mask.view(1, 10)):
        assert difference(actual, reference_layer(router, experts, x, other)) > 0.01
    router.scale.data *= 1.1
    assert difference(actual, reference_layer(router, experts, x, mask)) > 0.005
    router.scale.data /= 1.1
    router.weight.data = router.weight.data.roll(1, dims=0)
    assert difference(actual, reference_layer(router, experts, x, mask)) > 0.01


def test_slots_go_to_their_experts_as_rows() -> None:
    router = router_of(3, 2)
    seen = {}

    def experts(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        seen.update(hidden=hidden, index=index, weight=weight)
        return hidden

    x, mask = torch.randn(8, HIDDEN), torch.ones(2, 4, dtype=torch.bool)
    routing = router(x, mask)
    output = router.mix(experts, x, routing)
    dispatch, combine = (routing.extras[name].view(2, 4, 6) for name in ("dispatch", "combine"))
    slots = torch.einsum("gsn,gsh->gnh", dispatch, x.view(2, 4, -1))
    assert_close(seen["hidden"], slots.flatten(0, 1), NEAR)
    assert seen["index"].tolist() == [[e] for e in (0, 0, 1, 1, 2, 2)] * 2
    assert (seen["weight"] == 1).all()
    assert_close(output, torch.einsum("gsn,gnh->gsh", combine, slots).flatten(0, 1), NEAR)


def test_fresh_routers() -> None:
    config = small_config(router_type="soft", allow_non_causal_routing=True, slots_per_expert=3, hidden_size=64)
    router = SoftRouter(config, 64)
    assert router.weight.shape == (12, 64)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert router.scale.tolist() == [1.0]


def test_the_length_of_a_token_does_not_matter() -> None:
    router = router_of()
    x = torch.randn(6, HIDDEN)
    assert_close(router(100 * x, one_group(6)).logits, router(x, one_group(6)).logits, NEAR)
    assert router(0 * x, one_group(6)).logits.isfinite().all()


@properties
@given(counts, counts, st.integers(1, 3), st.integers(1, 5), seeds)
def test_a_sequence_does_not_see_its_neighbours(number: int, slots: int, groups: int, length: int, seed: int) -> None:
    router, experts = router_of(number, slots, seed), experts_of(number)
    x, mask = torch.randn(groups, length, HIDDEN), torch.rand(groups, length) < 0.7
    order = torch.randperm(groups)
    output = layer(router, experts, x.flatten(0, 1), mask).view_as(x)
    permuted = layer(router, experts, x[order].flatten(0, 1), mask[order]).view_as(x)
    assert_close(permuted, output[order], NEAR)
    alone = [layer(router, experts, x[g], mask[g : g + 1]) for g in range(groups)]
    assert_close(torch.stack(alone), output, NEAR)


@properties
@given(counts, counts, st.integers(1, 5), st.integers(0, 4), st.booleans(), seeds)
def test_padding_changes_nothing(number: int, slots: int, length: int, padding: int, left: bool, seed: int) -> None:
    router, experts = router_of(number, slots, seed), experts_of(number)
    x, pad = torch.randn(2, length, HIDDEN), torch.full((2, padding, HIDDEN), float("nan"))
    real, unreal = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, padding, dtype=torch.bool)
    mask = torch.cat([unreal, real] if left else [real, unreal], dim=1)
    padded = layer(router, experts, torch.cat([pad, x] if left else [x, pad], dim=1).flatten(0, 1), mask)
    assert_close(padded[mask.flatten()], layer(router, experts, x.flatten(0, 1), real), NEAR)


def test_a_sequence_of_padding_is_finite_and_teaches_nothing() -> None:
    router, experts = router_of(), experts_of()
    x = torch.randn(6, HIDDEN, requires_grad=True)
    mask = torch.tensor([[True] * 3, [False] * 3])
    routing = router(x, mask)
    assert (routing.extras["dispatch"][3:] == 0).all()
    output = router.mix(experts, x, routing)
    assert output.isfinite().all()
    output[:3].sum().backward()
    assert x.grad is not None
    assert (x.grad[3:] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*router.parameters(), *experts.parameters()))


def test_later_tokens_matter() -> None:
    router, experts = router_of(), experts_of()
    x = torch.randn(8, HIDDEN)
    before = layer(router, experts, x, one_group(8))
    x[4:] = torch.randn(4, HIDDEN)
    assert difference(layer(router, experts, x, one_group(8))[:4], before[:4]) > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    router, experts = router_of(), experts_of()
    x = torch.randn(9, HIDDEN).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, one_group(9))
    expected = router(x.float(), one_group(9))
    for name in ("dispatch", "combine"):
        assert routing.extras[name].dtype == torch.float32
        assert torch.equal(routing.extras[name], expected.extras[name])
    output = router.mix(experts.to(dtype), x, routing)
    assert output.dtype == dtype
    wanted = reference_layer(router, experts, x, one_group(9))
    assert_close(output, wanted, 0.03 if dtype != torch.float64 else NEAR)


@pytest.mark.parametrize(
    ("number", "slots", "groups", "length"), [(4, 2, 0, 3), (4, 2, 2, 0), (4, 2, 1, 1), (1, 1, 2, 3), (1, 3, 1, 1)]
)
def test_edge_sizes(number: int, slots: int, groups: int, length: int) -> None:
    router, experts = router_of(number, slots), experts_of(number)
    x = torch.randn(groups * length, HIDDEN)
    output = layer(router, experts, x, torch.ones(groups, length, dtype=torch.bool))
    assert output.shape == x.shape
    assert output.isfinite().all()
    if length == 1:
        # Every slot is the only token.
        each = torch.stack([experts(x, torch.full((1, 1), e), torch.ones(1, 1)) for e in range(number)])
        weights = router(x, one_group(1)).probabilities
        assert_close(output, torch.einsum("te,eth->th", weights, each), NEAR)


def test_evaluation_is_deterministic() -> None:
    router, experts = router_of(training=False), experts_of()
    x = torch.randn(8, HIDDEN)
    assert torch.equal(layer(router, experts, x, one_group(8)), layer(router, experts, x, one_group(8)))


def gate_gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of a model's only router: slots and scale."""
    found = [p.grad for name, p in model.named_parameters() if ".gate." in name and p.grad is not None]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("auto", [STMoEModel, STMoEForSequenceClassification])
def test_an_encoder_takes_it_freely(auto: type, tmp_path: Path) -> None:
    model = mixture("bert", auto, router_type="soft", slots_per_expert=2, num_hidden_layers=1)
    name = "logits" if auto is STMoEForSequenceClassification else "last_hidden_state"
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    output = model(ids, attention_mask=mask)[name]
    short = model(ids[1:, :5])[name]
    assert relative_difference(output[1:] if name == "logits" else output[1:, :5], short) < NEAR
    model.train()(ids, attention_mask=mask)[name].square().sum().backward()
    assert all(gradient.abs().max() > 0 for gradient in gate_gradients(model))
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(auto.from_pretrained(tmp_path)(ids, attention_mask=mask)[name], output)


def test_a_causal_model_takes_it_only_if_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_non_causal_routing"):
        STMoEConfig(dense_model_type="llama", router_type="soft")
    model = mixture(router_type="soft", allow_non_causal_routing=True, num_hidden_layers=1)
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    assert output.aux_losses == {}
    assert torch.equal(output.loss, output.lm_loss)
    output.loss.backward()
    assert all(gradient.abs().max() > 0 for gradient in gate_gradients(model))
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(STMoEForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 15)
