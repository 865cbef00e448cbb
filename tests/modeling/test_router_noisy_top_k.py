"""The noisy top-K router: gates, noise, importance and smooth load against plain restatements.

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

from st_moe import STMoEForCausalLM
from st_moe.modeling.routing import Routing, losses
from st_moe.modeling.routing.noisy_top_k import NoisyTopKRouter
from tests.families import gradients, mixture, token_ids
from tests.modeling.reference import assert_close, difference, one_group, small_config

HIDDEN = 8
NEAR = 1e-5

properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """E and K <= E."""
    experts = draw(st.integers(1, 6))
    return experts, draw(st.integers(1, experts))


def router_of(experts: int, choices: int, seed: int = 0, training: bool = True, **fields: Any) -> NoisyTopKRouter:
    torch.manual_seed(seed)
    config = small_config(router_type="noisy_top_k", num_experts=experts, num_experts_per_tok=choices, **fields)
    router = NoisyTopKRouter(config, HIDDEN).train(training)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return router


def routed(router: NoisyTopKRouter, x: Tensor, mask: Tensor, seed: int = 0) -> tuple[Routing, Tensor]:
    """A routing and the standard normal noise that it drew, float32 [T, E]."""
    torch.manual_seed(seed)
    noise = torch.randn(x.shape[0], router.num_experts)
    torch.manual_seed(seed)
    return router(x, mask), noise


def reference_variation(sums: list[Tensor]) -> Tensor:
    """CV^2: the mean squared distance from the mean, as a fraction of the squared mean."""
    mean = sum(sums) / len(sums)
    return sum((each - mean) ** 2 for each in sums) / len(sums) / (mean**2 + 1e-10)


def reference(router: NoisyTopKRouter, x: Tensor, mask: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Gates [T, E] and both losses of a training pass: equations 3 to 11, one number at a time in float64."""
    experts, choices = router.num_experts, router.top_k
    w, w_noise = router.weight.double(), router.noise_weight.double()
    x, noise = x.double(), noise.double()
    zero = (w * 0).sum()
    gates, importance, load = [], [zero] * experts, [zero] * experts
    for t, real in enumerate(mask.flatten().tolist()):
        z = [w[e] @ x[t] for e in range(experts)]
        scale = [torch.log1p(torch.exp(w_noise[e] @ x[t])) + 0.01 for e in range(experts)]
        h = [z[e] + noise[t, e] * scale[e] for e in range(experts)]
        best = sorted(range(experts), key=lambda e: (-h[e].item(), e))[:choices]
        total = sum(torch.exp(h[e] - h[best[0]]) for e in best)
        gates.append([torch.exp(h[e] - h[best[0]]) / total if e in best else zero for e in range(experts)])
        for e in range(experts) if real else ():
            importance[e] = importance[e] + gates[-1][e]
            others = sorted((h[j] for j in range(experts) if j != e), key=lambda value: -value.item())
            if choices == experts:
                load[e] = load[e] + 1
            else:
                distance = (z[e] - others[choices - 1]) / scale[e]
                load[e] = load[e] + 0.5 * (1 + torch.erf(distance / math.sqrt(2)))
    return {
        "gates": torch.stack([torch.stack(row) for row in gates]),
        "importance_loss": reference_variation(importance),
        "load_loss": reference_variation(load),
    }


def dense_gates(routing: Routing) -> Tensor:
    """Combine weights by expert, [T, E]."""
    return torch.zeros_like(routing.logits).scatter(1, routing.index, routing.weight)


@properties
@given(sizes(), st.integers(1, 3), st.integers(1, 5), seeds)
def test_gates_and_losses_against_the_equations(size: tuple[int, int], groups: int, length: int, seed: int) -> None:
    router = router_of(*size, seed)
    x = torch.randn(groups * length, HIDDEN)
    mask = torch.rand(groups, length) < 0.8
    routing, noise = routed(router, x, mask, seed)
    expected = reference(router, x, mask, noise)
    assert_close(dense_gates(routing), expected["gates"], NEAR)
    assert_close(routing.logits, x @ router.weight.t(), 0)
    assert_close(routing.probabilities.sum(-1), torch.ones(len(x)), NEAR)
    assert_close(routing.weight.sum(-1), torch.ones(len(x)), NEAR)
    assert (routing.weight[:, 1:] <= routing.weight[:, :-1]).all()
    found = router.losses(routing)
    assert set(found) == {"importance_loss", "load_loss", "router_z_loss"}
    for name in ("importance_loss", "load_loss"):
        assert found[name].dtype == torch.float32
        assert abs(found[name].item() - expected[name].item()) <= 1e-4 * max(expected[name].item(), 0.01), name
    assert_close(found["router_z_loss"], losses.router_z_loss(x @ router.weight.t(), mask), 0)


@pytest.mark.parametrize(("experts", "choices"), [(5, 2), (4, 1), (6, 5)])
def test_gradients_against_the_equations(experts: int, choices: int) -> None:
    router = router_of(experts, choices)
    x = torch.randn(12, HIDDEN, requires_grad=True)
    mask = torch.rand(3, 4) < 0.8
    routing, noise = routed(router, x, mask)
    expected = reference(router, x, mask, noise)
    places = [x, router.weight, router.noise_weight]
    cotangent = torch.randn(12, experts)
    pairs = [(router.load_loss(routing), expected["load_loss"])]
    if choices > 1:
        # With one choice the gate is the constant 1, see below.
        pairs.append((router.importance_loss(routing), expected["importance_loss"]))
        pairs.append(((dense_gates(routing) * cotangent).sum(), (expected["gates"] * cotangent).sum()))
    for actual, wanted in pairs:
        ours = torch.autograd.grad(actual, places, retain_graph=True)
        theirs = torch.autograd.grad(wanted, places, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert b.abs().max() > 1e-3, "too small to compare"
            assert_close(a, b, 1e-4)


def test_equations_tell_a_wrong_noise_from_the_right_one() -> None:
    """Negative control: another draw, another scale and an unmasked token all miss the reference."""
    router = router_of(5, 2)
    x, mask = torch.randn(12, HIDDEN), one_group(12)
    routing, noise = routed(router, x, mask)
    actual = {"gates": dense_gates(routing), **router.losses(routing)}
    fewer = mask.clone()
    fewer[0, 0] = False
    wrong_noise, wrong_mask = reference(router, x, mask, noise * 1.02), reference(router, x, fewer, noise)
    assert all(difference(actual[name], value) > 1e-3 for name, value in wrong_noise.items())
    assert all(difference(actual[name], wrong_mask[name]) > 1e-3 for name in ("importance_loss", "load_loss"))
    router.noise_weight.data *= 1.1
    wrong_scale = reference(router, x, mask, noise)
    assert all(difference(actual[name], value) > 1e-3 for name, value in wrong_scale.items())


def test_one_choice_weighs_one_and_still_teaches_the_router() -> None:
    router = router_of(4, 1, training=False)
    x = torch.randn(9, HIDDEN)
    routing = router(x, one_group(9))
    assert (routing.weight == 1).all()
    cotangent = torch.randn(9, 1)
    (actual,) = torch.autograd.grad((routing.weight * cotangent).sum(), router.weight)
    log_p = (x @ router.weight.t()).log_softmax(-1).gather(1, routing.index)
    (expected,) = torch.autograd.grad((log_p * cotangent).sum(), router.weight)
    assert_close(actual, expected, NEAR)


def test_smooth_load_is_the_chance_to_be_chosen() -> None:
    """Drawing one expert's noise anew, with the others' kept, chooses it as often as the load says."""
    torch.manual_seed(0)
    logits, scale, draws = torch.randn(6, 5), torch.rand(6, 5) + 0.1, 20000
    noisy = logits + scale * torch.randn(6, 5)
    index = noisy.argsort(-1, descending=True)[:, :2]
    load = losses.smooth_load(logits, noisy, scale, index)
    wrong = losses.smooth_load(logits, noisy, scale, noisy.argsort(-1, descending=True)[:, 3:])
    for e in range(5):
        again = noisy.repeat(draws, 1, 1)
        again[..., e] = logits[:, e] + scale[:, e] * torch.randn(draws, 6)
        rate = (again.argsort(-1, descending=True)[..., :2] == e).any(-1).float().mean(0)
        assert (rate - load[:, e]).abs().max() < 0.015
    assert (wrong - load).abs().max() > 0.05, "the threshold of the others matters"


def test_a_known_load() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    noisy = torch.tensor([[0.5, 1.5, -2.0]])
    scale = torch.tensor([[1.0, 2.0, 0.5]])
    # One choice: expert 1. The others have to beat its 1.5, and it has to beat 0.5.
    load = losses.smooth_load(logits, noisy, scale, torch.tensor([[1]]))
    phi = [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in (-0.5, -0.25, -5.0)]
    assert_close(load, torch.tensor([phi]), 1e-6)


@pytest.mark.parametrize(("experts", "choices"), [(4, 1), (4, 2), (6, 3)])
def test_losses_at_balance_and_at_collapse(experts: int, choices: int) -> None:
    everyone = one_group(2 * experts)
    balanced = (torch.arange(2 * experts)[:, None] + torch.arange(choices)) % experts
    for index, expected in ((balanced, 0.0), (torch.arange(choices).expand_as(balanced), experts / choices - 1)):
        load = torch.zeros(2 * experts, experts).scatter(1, index, 1.0)
        assert losses.load_loss(load, everyone).item() == pytest.approx(expected, abs=1e-6)
        sure = 20 * load
        smooth = losses.smooth_load(sure, sure, torch.ones_like(sure), index)
        assert losses.load_loss(smooth, everyone).item() == pytest.approx(expected, abs=1e-6)
    assert losses.load_loss(load, ~everyone).item() == 0


@pytest.mark.parametrize(("choices", "training"), [(2, False), (4, True), (4, False)])
def test_load_without_noise_or_choice_is_counted(choices: int, training: bool) -> None:
    router = router_of(4, choices, training=training)
    x = torch.randn(9, HIDDEN)
    mask = one_group(9)
    mask[0, 3] = False
    routing = router(x, mask)
    load = router.load_loss(routing)
    assert not load.requires_grad
    counts = [float((routing.index[mask[0]] == e).sum()) for e in range(4)]
    assert_close(load, reference_variation([torch.tensor(count) for count in counts]), NEAR)
    assert (load == 0) == (choices == 4)


def test_losses_count_the_gates_before_capacity() -> None:
    router = router_of(4, 2, capacity_factor=0.5, min_capacity=1)
    free = router_of(4, 2)
    x = torch.randn(16, HIDDEN)
    limited, _ = routed(router, x, one_group(16))
    unlimited, _ = routed(free, x, one_group(16))
    assert limited.dropped is not None
    assert limited.dropped.any()
    for name in ("importance_loss", "load_loss"):
        assert torch.equal(router.losses(limited)[name], free.losses(unlimited)[name])
    after = losses.importance_loss(limited.weight, limited.index, 4, limited.token_mask)
    assert difference(after, free.importance_loss(unlimited)) > 0.01, "what capacity leaves is another number"


def test_fresh_routers_are_zero_and_choose_by_noise_alone() -> None:
    router = NoisyTopKRouter(small_config(router_type="noisy_top_k", num_experts_per_tok=2), HIDDEN)
    assert all((parameter == 0).all() for parameter in router.parameters())
    x = torch.randn(4000, HIDDEN)
    routing = router.train()(x, one_group(4000))
    load = losses.expert_load(routing)
    assert (load - 0.25).abs().max() < 0.02
    spread = (routing.extras["noisy_logits"] - routing.logits).std().item()
    assert spread == pytest.approx(math.log(2) + 0.01, rel=0.03)
    assert router.eval()(x, one_group(4000)).index.tolist() == [[0, 1]] * 4000, "ties go to the lowest index"


def test_weights_of_the_whole_softmax() -> None:
    x = torch.randn(6, HIDDEN)
    routing = router_of(4, 2, training=False, norm_topk_prob=False)(x, one_group(6))
    assert_close(routing.weight, routing.logits.softmax(-1).gather(1, routing.index), 1e-6)


def test_choices_are_by_logit_where_probabilities_vanish() -> None:
    router = router_of(3, 2, training=False)
    router.weight.data = torch.eye(3, HIDDEN)
    x = torch.tensor([[300.0, 50.0, 90.0, 0, 0, 0, 0, 0]])
    assert router(x, one_group(1)).index.tolist() == [[0, 2]]


def test_evaluation_is_deterministic_and_training_draws() -> None:
    router = router_of(4, 2)
    x = torch.randn(8, HIDDEN)
    assert not torch.equal(router(x, one_group(8)).weight, router(x, one_group(8)).weight)
    router.eval()
    before = torch.get_rng_state()
    first, second = router(x, one_group(8)), router(x, one_group(8))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    router.noise_weight.data.fill_(9.0)
    assert torch.equal(first.weight, router(x, one_group(8)).weight)


@properties
@given(sizes(), st.integers(1, 3), st.integers(1, 5), seeds)
def test_rows_are_routed_alone(size: tuple[int, int], groups: int, length: int, seed: int) -> None:
    """Neither neighbours, padding nor later tokens matter: every row by itself routes the same."""
    router = router_of(*size, seed, training=False)
    x = torch.randn(groups * length, HIDDEN)
    routing = router(x, torch.rand(groups, length) < 0.5)
    for t in range(len(x)):
        alone = router(x[t : t + 1], one_group(1))
        assert torch.equal(alone.index[0], routing.index[t])
        assert_close(alone.weight[0], routing.weight[t], NEAR)


@properties
@given(sizes(), st.integers(1, 4), st.integers(0, 4), seeds)
def test_padding_moves_no_loss(size: tuple[int, int], length: int, padding: int, seed: int) -> None:
    router = router_of(*size, seed)
    x, junk = torch.randn(length, HIDDEN), torch.randn(padding, HIDDEN) * 9
    mask = torch.tensor([[True] * length + [False] * padding])
    padded, _ = routed(router, torch.cat([x, junk]), mask, seed)
    # A shorter batch would draw other noise, so the padding is cut out of the routing.
    cut = [part[:length] for part in padded[:4]]
    plain = Routing(*cut, one_group(length), extras={name: v[:length] for name, v in padded.extras.items()})
    for name, loss in router.losses(padded).items():
        assert_close(loss, router.losses(plain)[name], NEAR, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    router = router_of(4, 2)
    x = torch.randn(9, HIDDEN).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing, _ = routed(router, x, one_group(9))
    expected, _ = routed(router, x.float(), one_group(9))
    assert routing.weight.dtype == torch.float32
    assert torch.equal(routing.index, expected.index)
    assert torch.equal(routing.weight, expected.weight)
    low = router_of(4, 2).to(torch.bfloat16)
    assert routed(low, x, one_group(9))[0].extras["noise_scale"].dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("experts", "choices", "groups", "length"), [(4, 2, 0, 3), (4, 2, 2, 0), (4, 2, 1, 1), (3, 3, 2, 2), (1, 1, 2, 3)]
)
def test_edge_sizes(experts: int, choices: int, groups: int, length: int, training: bool) -> None:
    router = router_of(experts, choices, training=training, capacity_factor=1.0)
    routing = router(torch.randn(groups * length, HIDDEN), torch.ones(groups, length, dtype=torch.bool))
    assert routing.index.shape == (groups * length, choices)
    assert routing.weight.isfinite().all()
    for name, loss in router.losses(routing).items():
        assert loss.isfinite(), name
        assert name == "router_z_loss" or loss == 0 or (groups * length > 0 and experts > 1)


def test_all_tokens_to_one_expert() -> None:
    router = router_of(4, 1)
    router.weight.data.zero_()[2] = 9.0
    routing = router(torch.rand(8, HIDDEN) + 0.5, one_group(8))
    assert (routing.index == 2).all()
    assert router.importance_loss(routing).item() == pytest.approx(3, rel=1e-4)
    assert router.load_loss(routing).item() == pytest.approx(3, rel=1e-4)


def test_a_model_trains_generates_and_is_saved(tmp_path: Path) -> None:
    model = mixture(router_type="noisy_top_k", num_hidden_layers=1)
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    assert set(output.aux_losses) == {"importance_loss", "load_loss", "router_z_loss"}
    total = sum(model.config.loss_coefficients[name] * loss for name, loss in output.aux_losses.items())
    assert_close(output.loss, output.lm_loss + total, 1e-6)
    output.loss.backward()
    found = {name: gradient for name, gradient in gradients(model).items() if ".gate." in name}
    assert len(found) == 2
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    model.eval().save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (2, 16)
    assert torch.equal(model(written).logits[:, 11:-1].argmax(-1), written[:, 12:])
