"""What one forward pass shares between the model and its sparse layers: the token mask in, the routings out.

Decoder layers call their FFN with one tensor and take one tensor back, in every dense family. The mask of real tokens
and the routing records therefore travel beside the call, in a scope that lives for one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from st_moe.modeling.routing.record import Routing


class RoutingScope:
    """Token mask and routing records of one forward pass.

    Attributes:
        token_mask: bool [B, S], True at real tokens; None until the base model has seen its inputs.
        token_ids: int64 [B, S], None where a model is fed embeddings.
        positions: int64 [B, S], place of each token in its sequence, padding not counted; None if nobody asked.
        with_losses: whether sparse layers compute their router's losses.
        recording: False while activation checkpointing recomputes a layer, so that nothing is recorded twice.
        records: one routing per run of a sparse layer, in the order of the runs.
        losses: one dictionary of losses per run, in the same order.
        layers: position among the sparse layers, in the same order. Most families run each layer once per forward pass.
    """

    def __init__(
        self,
        token_mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        with_losses: bool = False,
        recording: bool = True,
    ) -> None:
        self.token_mask = token_mask
        self.token_ids = token_ids
        self.positions = positions
        self.with_losses = with_losses
        self.recording = recording
        self.records: list[Routing] = []
        self.losses: list[dict[str, torch.Tensor]] = []
        self.layers: list[int] = []

    def record(self, routing: Routing, losses: dict[str, torch.Tensor], layer: int) -> None:
        """Keep the routing and losses of one run of the sparse layer at this position."""
        if self.recording:
            self.records.append(routing)
            self.losses.append(losses)
            self.layers.append(layer)

    def mean_over_runs(self, values: Sequence[torch.Tensor], num_layers: int) -> list[torch.Tensor]:
        """The mean over the runs of each sparse layer, of values that belong to `records`."""
        runs: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        for layer, value in zip(self.layers, values, strict=True):
            runs[layer].append(value)
        return [torch.stack(each).mean(0) if len(each) > 1 else each[0] for each in runs]

    def for_recomputation(self) -> RoutingScope:
        """A scope with the same inputs and losses to compute, which keeps nothing."""
        return RoutingScope(self.token_mask, self.token_ids, self.positions, self.with_losses, recording=False)


class _ScopeVariable:
    """The active scope: a context variable, and a plain global while compiling, which cannot trace the former.

    A graph break leaves a compiled forward pass in the middle, so the global stays in force until it is reset.
    """

    def __init__(self) -> None:
        self.in_context: ContextVar[RoutingScope | None] = ContextVar("st_moe_routing_scope", default=None)
        self.while_compiling: RoutingScope | None = None

    def _compiling(self) -> bool:
        return torch.compiler.is_dynamo_compiling() or self.while_compiling is not None

    def get(self) -> RoutingScope | None:
        return self.while_compiling if self._compiling() else self.in_context.get()

    def set(self, scope: RoutingScope) -> Any:
        if not self._compiling():
            return self.in_context.set(scope)
        outer, self.while_compiling = self.while_compiling, scope
        return outer

    def reset(self, token: Any) -> None:
        if self._compiling():
            self.while_compiling = token
        else:
            self.in_context.reset(token)


_active = _ScopeVariable()


def active_scope() -> RoutingScope | None:
    """The scope of the forward pass under way, or None outside of one."""
    return _active.get()


@contextmanager
def activate(scope: RoutingScope) -> Iterator[RoutingScope]:
    """Make `scope` the active one; the one before it comes back afterwards."""
    token = _active.set(scope)
    try:
        yield scope
    finally:
        _active.reset(token)


def checkpoint_in_scope(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an activation-checkpointing function so that the recomputation sees the mask of its own forward pass."""

    def scoped_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = active_scope()
        if scope is None:
            return checkpoint(function, *args, **kwargs)

        def run(*inputs: Any, **named: Any) -> Any:
            if active_scope() is scope:
                return function(*inputs, **named)
            # The backward pass, long after the scope was left.
            with activate(scope.for_recomputation()):
                return function(*inputs, **named)

        return checkpoint(run, *args, **kwargs)

    return scoped_checkpoint


def token_mask_of(attention_mask: Any, batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    """Mask of the real tokens among the `length` tokens that enter a forward pass.

    Args:
        attention_mask: None (all real), [B, past + S] (nonzero at real tokens), or [B, 1, S, past + S] boolean or
            additive, where a token is real if it may attend to itself; anything else counts every token.

    Returns:
        bool [B, S].
    """
    everything = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape[-1] < length:
        return everything
    if attention_mask.ndim == 2:
        mask = attention_mask[:, -length:] != 0
    elif attention_mask.ndim == 4 and attention_mask.shape[-2] == length:
        itself = attention_mask[:, 0, :, -length:].diagonal(dim1=-2, dim2=-1)
        mask = itself if itself.dtype == torch.bool else itself == 0
    else:
        return everything
    return mask.expand(batch_size, length).to(device)


def positions_of(attention_mask: Any, position_ids: Any, past_length: Any, token_mask: torch.Tensor) -> torch.Tensor:
    """Place of each token in its sequence, padding not counted, however the sequence is cut into forward passes.

    Args:
        attention_mask: None, or [B, past + S]; other forms say nothing of what is padding in the past.
        position_ids: int64 [B, S] or [S] if the caller gives them.
        past_length: number of tokens in the cache.
        token_mask: bool [B, S].

    Returns:
        int64 [B, S].
    """
    if isinstance(position_ids, torch.Tensor) and position_ids.ndim <= 2:
        return position_ids.expand(token_mask.shape)
    length = token_mask.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= length:
        return ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -length:].to(token_mask.device)
    return (past_length + torch.arange(length, device=token_mask.device)).expand(token_mask.shape)
