"""The scope of a forward pass: token masks in, routing records out, and activation checkpointing in between."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from st_moe.modeling.routing import Routing
from st_moe.modeling.routing.scope import RoutingScope, activate, active_scope, checkpoint_in_scope, token_mask_of
from tests.families import assert_same_gradients, gradients, mixture, token_ids

CPU = torch.device("cpu")


def a_routing() -> Routing:
    index = torch.zeros(1, 1, dtype=torch.long)
    return Routing(torch.zeros(1, 1), torch.ones(1, 1), index, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))


def test_scopes_nest_and_end() -> None:
    assert active_scope() is None
    outer, inner = RoutingScope(), RoutingScope()
    with activate(outer) as entered:
        assert entered is outer is active_scope()
        with activate(inner):
            assert active_scope() is inner
        assert active_scope() is outer
    assert active_scope() is None


def test_an_error_ends_its_scope() -> None:
    outer = RoutingScope()
    with activate(outer):
        with pytest.raises(RuntimeError, match="inside"), activate(RoutingScope()):
            raise RuntimeError("inside")
        assert active_scope() is outer
    assert active_scope() is None


def test_a_failed_forward_pass_leaves_no_scope_behind() -> None:
    model = mixture()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10**6))
    assert active_scope() is None
    ids = token_ids()
    assert len(model(input_ids=ids, output_router_logits=True).router_logits) == 2


def test_records_in_order_and_only_while_recording() -> None:
    scope, first, second = RoutingScope(), a_routing(), a_routing()
    scope.record(first, {}, 0)
    scope.record(second, {"balance_loss": torch.ones(())}, 2)
    assert scope.layers == [0, 2]
    assert scope.records[0] is first
    assert scope.records[1] is second
    assert scope.losses == [{}, {"balance_loss": torch.ones(())}]
    silent = RoutingScope(recording=False)
    silent.record(first, {}, 0)
    assert silent.records == []


def test_runs_of_a_layer_are_averaged() -> None:
    scope, values = RoutingScope(), torch.tensor([[1.0, 5.0], [2.0, 0.0], [4.0, 1.0], [7.0, 7.0]])
    for layer in (1, 0, 1, 2):
        scope.record(a_routing(), {}, layer)
    means = scope.mean_over_runs(list(values), 3)
    assert torch.equal(torch.stack(means), torch.tensor([[2.0, 0.0], [2.5, 3.0], [7.0, 7.0]]))


# Masks.


def mask_of(attention_mask: Any, batch: int = 2, length: int = 3) -> list[list[int]]:
    mask = token_mask_of(attention_mask, batch, length, CPU)
    assert mask.dtype == torch.bool
    assert mask.shape == (batch, length)
    return mask.int().tolist()


ALL_REAL = [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_two_dimensional_masks(dtype: torch.dtype) -> None:
    assert mask_of(torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype)) == [[0, 1, 1], [1, 1, 0]]
    # With a cache the mask covers the past too; its end is for the tokens that enter now.
    assert mask_of(torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 0]]).to(dtype)) == [[0, 1, 1], [1, 1, 0]]


def test_four_dimensional_masks() -> None:
    causal = torch.ones(3, 3).tril().bool()[None, None]
    assert mask_of(causal) == ALL_REAL
    padded = causal.repeat(2, 1, 1, 1)
    padded[0, :, :, 0] = False
    assert mask_of(padded) == [[0, 1, 1], [1, 1, 1]]
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~padded, torch.finfo(torch.float32).min)
    assert mask_of(additive) == [[0, 1, 1], [1, 1, 1]]
    past = torch.cat([torch.zeros(2, 1, 3, 4), additive], dim=-1)
    assert mask_of(past) == [[0, 1, 1], [1, 1, 1]]
    heads = padded.repeat(1, 4, 1, 1)
    assert mask_of(heads) == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    "unknown",
    [
        None,
        {"full_attention": torch.zeros(2, 3)},
        torch.zeros(2, 2),
        torch.zeros(2, 3, 3),
        torch.ones(2, 1, 5, 5).bool(),
        torch.zeros(3),
    ],
    ids=["none", "dictionary", "short", "three dimensions", "other queries", "one dimension"],
)
def test_masks_that_say_nothing_count_every_token(unknown: Any) -> None:
    assert mask_of(unknown) == ALL_REAL


def test_one_mask_for_the_whole_batch() -> None:
    assert mask_of(torch.tensor([[0, 1, 1]])) == [[0, 1, 1], [0, 1, 1]]


def test_no_tokens() -> None:
    assert token_mask_of(torch.ones(2, 0), 2, 0, CPU).shape == (2, 0)
    assert token_mask_of(None, 0, 3, CPU).shape == (0, 3)


# Activation checkpointing.


def test_recomputation_sees_its_own_mask_and_records_nothing() -> None:
    seen: list[tuple[Any, bool]] = []

    def layer(x: Tensor, scale: float) -> Tensor:
        scope = active_scope()
        assert scope is not None
        seen.append((scope.token_mask, scope.recording))
        scope.record(a_routing(), {}, 0)
        return (x * scale).sin()

    checkpointed = checkpoint_in_scope(lambda f, *args, **kw: checkpoint(f, *args, use_reentrant=False, **kw))
    x = torch.randn(4, requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    with activate(RoutingScope(mask)) as scope:
        output = checkpointed(layer, x, scale=2.0)
    other = RoutingScope(torch.zeros(1, 9, dtype=torch.bool))
    with activate(other):
        output.sum().backward()
        assert active_scope() is other
    assert len(seen) == 2
    assert all(m is mask for m, _ in seen)
    assert [recording for _, recording in seen] == [True, False]
    assert len(scope.records) == 1
    assert other.records == []
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * (2 * x).cos())


def test_without_a_scope_checkpointing_is_left_alone() -> None:
    calls: list[tuple[Any, ...]] = []

    def plain(function: Any, *args: Any, **kwargs: Any) -> str:
        calls.append((function, args, kwargs))
        return "result"

    assert checkpoint_in_scope(plain)(abs, 1, key=2) == "result"
    assert calls == [(abs, (1,), {"key": 2})]


def enable_checkpointing(model: Any, *kwargs: dict[str, Any]) -> None:
    """By the host's present name, or by the one it had before."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(*kwargs)


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 0.7, "min_capacity": 1}])
def test_checkpointing_changes_neither_outputs_nor_gradients_nor_statistics(fields: dict[str, Any]) -> None:
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    results = []
    for checkpointing in (False, True):
        model = mixture(balance_loss_coef=0.5, **fields).train()
        if checkpointing:
            enable_checkpointing(model)
        output = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, output_router_logits=True)
        output.loss.backward()
        assert len(output.router_logits) == 2, "each layer is recorded once"
        results.append((output, gradients(model)))
    (plain, expected), (checkpointed, actual) = results
    assert torch.equal(plain.logits, checkpointed.logits)
    for name in ("loss", "balance_loss", "router_z_loss", "expert_load", "router_entropy", "dropped_fraction"):
        assert torch.equal(plain[name], checkpointed[name]), name
    assert_same_gradients(actual, expected)
    if fields:
        assert plain.dropped_fraction.min() > 0


def test_checkpointing_that_would_silence_the_losses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use_reentrant must be False, got True"):
        enable_checkpointing(mixture(), {"use_reentrant": True})
