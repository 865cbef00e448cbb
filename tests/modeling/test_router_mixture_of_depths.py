"""Mixture of depths: who passes, with which weight, and the loss that brings the share of them about.

Shape letters: T tokens, H hidden size, G groups (sequences), S tokens of one.
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
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.mixture_of_depths import MixtureOfDepthsRouter, foremost
from tests.families import HIDDEN as MODEL_HIDDEN
from tests.families import gradients, mixture, token_ids
from tests.modeling.reference import assert_close, difference, make_experts, one_group, small_config

HIDDEN = 8
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)
fractions = st.sampled_from([0.01, 0.125, 0.3, 0.5, 1.0])
ONE = {"router_type": "mixture_of_depths", "num_experts": 1, "num_experts_per_tok": 1}


def router_of(seed: int = 0, **fields: Any) -> MixtureOfDepthsRouter:
    torch.manual_seed(seed)
    router = MixtureOfDepthsRouter(small_config(**{**ONE, **fields}), HIDDEN)
    torch.nn.init.normal_(router.weight)
    return router


def plain_foremost(scores: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Sequence by sequence, with a sort of pairs: largest score first, then lowest position."""
    passes = torch.zeros_like(mask)
    for g in range(mask.shape[0]):
        real = [s for s in range(mask.shape[1]) if mask[g, s]]
        room = max(1, math.floor(fraction * len(real)))
        for s in sorted(real, key=lambda s, g=g: (-scores[g, s].item(), s))[:room]:
            passes[g, s] = True
    return passes


def plain_loss(scores: Tensor, passes: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, token by token in float64."""
    terms = []
    for g in range(mask.shape[0]):
        for s in range(mask.shape[1]):
            if mask[g, s]:
                p = 1 / (1 + torch.exp(-scores[g, s].double()))
                terms.append(-torch.log(p) if passes[g, s] else -torch.log(1 - p))
    return torch.stack(terms).mean() if terms else scores.double().sum() * 0


@pytest.mark.parametrize("training", [True, False])
def test_tokens_pass_above_one_half(training: bool) -> None:
    router = router_of().train(training)
    x = torch.randn(40, HIDDEN)
    routing = router(x, one_group(40))
    r = x @ router.weight.t()
    expected = torch.where(r.sigmoid() > 0.5, r.sigmoid(), torch.zeros(()))
    assert torch.equal(routing.logits, r)
    assert torch.equal(routing.weight, expected)
    assert 5 < (expected > 0).sum() < 35
    assert difference(routing.weight, r.sigmoid()) > 0.1, "negative control: nobody skips"
    assert torch.equal(routing.index, torch.zeros(40, 1, dtype=torch.int64))
    assert torch.equal(routing.probabilities, torch.ones(40, 1))
    assert routing.dropped is None


def test_a_score_of_zero_skips() -> None:
    assert (router_of()(torch.zeros(3, HIDDEN), one_group(3)).weight == 0).all()


@properties
@given(st.integers(0, 3), st.integers(0, 9), fractions, st.integers(1, 5), seeds)
def test_the_foremost_of_each_sequence(groups: int, length: int, fraction: float, values: int, seed: int) -> None:
    torch.manual_seed(seed)
    # Few values, so many ties.
    scores = torch.randint(-values, values + 1, (groups, length)).float()
    mask = torch.rand(groups, length) < 0.7
    scores[~mask] = math.nan
    actual = foremost(scores, mask, fraction)
    assert torch.equal(actual, plain_foremost(scores, mask, fraction))


@pytest.mark.parametrize(("tokens", "fraction", "expected"), [(8, 0.125, 1), (16, 0.125, 2), (15, 0.125, 1), (3, 1, 3)])
def test_how_many_pass(tokens: int, fraction: float, expected: int) -> None:
    router = router_of(allow_non_causal_routing=True, depth_fraction=fraction)
    routing = router(torch.randn(tokens, HIDDEN), one_group(tokens))
    assert (routing.weight > 0).sum() == expected
    assert (router(torch.zeros(tokens, HIDDEN), one_group(tokens)).weight[:expected] > 0).all()


@properties
@given(st.integers(1, 3), st.integers(1, 8), fractions, st.booleans(), st.booleans(), seeds)
def test_non_causal_weights(
    groups: int, length: int, fraction: float, training: bool, by_rank: bool, seed: int
) -> None:
    router = router_of(seed, allow_non_causal_routing=by_rank, depth_fraction=fraction).train(training)
    x, mask = torch.randn(groups, length, HIDDEN), torch.rand(groups, length) < 0.8
    routing = router(x.flatten(0, 1), mask)
    r = (x.double() @ router.weight.double().t())[..., 0]
    passes = plain_foremost(r, mask, fraction) if by_rank else (r > 0) & mask
    assert_close(routing.weight.view(groups, length), torch.where(passes, r.sigmoid(), 0.0), 1e-5)
    # Neighbours do not matter.
    order = torch.randperm(groups)
    permuted = router(x[order].flatten(0, 1), mask[order])
    assert_close(permuted.weight.view(groups, length), routing.weight.view(groups, length)[order], 1e-5)


@properties
@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.booleans(), seeds)
def test_padding_changes_nothing(length: int, padding: int, left: bool, by_rank: bool, seed: int) -> None:
    router = router_of(seed, allow_non_causal_routing=by_rank, depth_fraction=0.4)
    x, pad = torch.randn(2, length, HIDDEN), torch.randn(2, padding, HIDDEN) * 100
    real, unreal = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, padding, dtype=torch.bool)
    mask = torch.cat([unreal, real] if left else [real, unreal], dim=1)
    padded = router(torch.cat([pad, x] if left else [x, pad], dim=1).flatten(0, 1), mask)
    plain = router(x.flatten(0, 1), real)
    assert_close(padded.weight[mask.flatten()], plain.weight, 1e-5)
    assert (padded.weight[~mask.flatten()] == 0).all(), "padding is not computed"
    assert_close(router.depth_loss(padded), router.depth_loss(plain), 1e-5)


def test_only_the_threshold_is_causal() -> None:
    x = torch.randn(1, 12, HIDDEN)
    changed = x.clone()
    changed[:, 6:] = torch.randn(1, 6, HIDDEN) * 10
    for by_rank in (False, True):
        router = router_of(allow_non_causal_routing=by_rank, depth_fraction=0.25)
        before, after = (router(each[0], one_group(12)).weight[:6] for each in (x, changed))
        assert torch.equal(before, after) is not by_rank


@properties
@given(st.integers(0, 3), st.integers(0, 8), fractions, seeds)
def test_depth_loss_and_its_gradient(groups: int, length: int, fraction: float, seed: int) -> None:
    router = router_of(seed, depth_fraction=fraction)
    x, mask = torch.randn(groups * length, HIDDEN), torch.rand(groups, length) < 0.8
    loss = router.depth_loss(router(x, mask))
    r = (x.double() @ router.weight.double().t()).view(groups, length)
    passes = plain_foremost(r, mask, fraction)
    expected = plain_loss(r, passes, mask)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 1e-5)
    actual, wanted = (torch.autograd.grad(each, router.weight)[0] for each in (loss, expected))
    assert_close(actual, wanted, 1e-5)
    if mask.any():
        assert difference(loss, plain_loss(r, ~passes, mask)) > 1e-3


def test_values_of_the_depth_loss() -> None:
    passes = torch.zeros(2, 8, dtype=torch.bool)
    passes[:, 3] = True
    mask = torch.ones_like(passes)

    def loss(r: Tensor) -> float:
        return losses.depth_loss(r.reshape(-1, 1), passes, mask).item()

    assert loss(torch.zeros(2, 8)) == pytest.approx(math.log(2))
    assert loss(torch.where(passes, 30.0, -30.0)) == pytest.approx(0, abs=1e-6)
    entropy = -(1 / 8) * math.log(1 / 8) - (7 / 8) * math.log(7 / 8)
    assert loss(torch.full((2, 8), math.log(1 / 7))) == pytest.approx(entropy)
    assert entropy == pytest.approx(0.377, abs=1e-3)
    wrong = loss(torch.where(passes, -1e4, 1e4))
    assert wrong == pytest.approx(1e4), "no overflow"


def test_depth_loss_ignores_what_padding_holds() -> None:
    passes, mask = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[True, True, False, False]])
    r = torch.tensor([[1.0], [-2.0], [math.nan], [math.inf]], requires_grad=True)
    loss = losses.depth_loss(r, passes, mask)
    assert_close(loss, losses.depth_loss(r[:2], passes[:, :2], mask[:, :2]), 1e-6)
    loss.backward()
    assert r.grad is not None
    assert r.grad.isfinite().all()
    assert losses.depth_loss(r, passes, torch.zeros_like(mask)).item() == 0


def test_the_loss_makes_the_threshold_pass_the_share() -> None:
    router = router_of(depth_fraction=0.25)
    x, mask = torch.randn(8 * 16, HIDDEN), torch.ones(8, 16, dtype=torch.bool)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    # A constant input is what centres the threshold.
    x[:, 0] = 1.0
    before = (router(x, mask).weight > 0).float().mean()
    for _ in range(300):
        optimizer.zero_grad()
        router.depth_loss(router(x, mask)).backward()
        optimizer.step()
    after = (router(x, mask).weight > 0).float().mean()
    assert abs(after - 0.25) < 0.05 < abs(before - 0.25)


def test_skipped_tokens_are_not_computed() -> None:
    router = router_of()
    experts = make_experts(num_experts=1, num_experts_per_tok=1)
    x = torch.randn(12, HIDDEN)
    routing = router(x, one_group(12))
    skips = routing.weight[:, 0] == 0
    assert 0 < skips.sum() < 12
    poisoned = x.masked_fill(skips[:, None], math.nan)
    output = router.mix(experts, poisoned, routing)
    assert (output[skips] == 0).all()
    assert torch.equal(output, router.mix(experts, x, routing))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_are_read_as_float32(dtype: torch.dtype) -> None:
    router, x = router_of(), torch.randn(9, HIDDEN).to(dtype)
    assert torch.equal(router(x, one_group(9)).weight, router(x.float(), one_group(9)).weight)


@pytest.mark.parametrize("by_rank", [False, True])
def test_a_model_trains_saves_and_generates(by_rank: bool, tmp_path: Path) -> None:
    model = mixture(**ONE, allow_non_causal_routing=by_rank, depth_fraction=0.25)
    for block in model.model.sparse_blocks:
        assert block.gate.weight.shape == (1, MODEL_HIDDEN)
        block.gate.weight.data *= 10
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert all(block.gate.weight.grad.abs().max() > 0 for block in model.model.sparse_blocks)
    assert set(output.aux_losses) == {"depth_loss"}
    assert output.loss.item() == pytest.approx(output.lm_loss.item() + 0.01 * output.aux_losses["depth_loss"].item())
    model.eval().save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits, 1e-6)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    if not by_rank:
        uncached = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(generated, uncached)
