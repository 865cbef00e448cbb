"""Soft routing: experts process slots, each a weighted mean of a sequence's tokens.

Shape letters: T tokens, H hidden size, E experts, P slots per expert, N = E * P slots, G sequences, S tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router, largest


class SoftRouter(Router):
    """Every expert gets a mean of all tokens of a sequence per slot, and every token a mean of all slots.

    Z = scale * unit(x) unit(mu)^T with one row mu per slot; D = softmax(Z) over the sequence's real tokens and
    C = softmax(Z) over all slots; slots = D^T x, output = C experts(slots). Nothing is chosen, dropped or balanced, so
    there are no losses; K is not read. Every token sees the later ones: not causal. Source: Puigcerver et al. 2023,
    section 2, with its L2 normalisation; the 1e-6 is their code's.

    In the record, an expert's logit is the logsumexp of its slots' logits and its probability and weight the sum of
    their combine weights; the choices are all E experts. `extras` carries `dispatch` and `combine`, float32 [T, N].

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.slots_per_expert = config.slots_per_expert
        # The slots' vectors [N, H], those of one expert side by side.
        self.weight = nn.Parameter(torch.empty(self.num_experts * self.slots_per_expert, hidden_size))
        # Not a scalar, which FSDP2 refuses to shard.
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the slots' vectors from N(0, initializer_range) and their scale with 1."""
        super().reset_parameters()
        init.ones_(self.scale)

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        by_slot = F.linear(_unit(x), self.scale.float() * _unit(self.weight.float()))
        padding = ~token_mask[..., None]
        # The least number instead of -inf, so that a sequence of padding has no NaN but zeros, like all padding.
        least = torch.finfo(by_slot.dtype).min
        dispatch = by_slot.view(*token_mask.shape, by_slot.shape[-1]).masked_fill(padding, least).softmax(dim=1)
        combine = by_slot.softmax(dim=-1)
        per_expert = (self.num_experts, self.slots_per_expert)
        logits = by_slot.unflatten(-1, per_expert).logsumexp(dim=-1)
        probabilities = combine.unflatten(-1, per_expert).sum(dim=-1)
        weight, index = largest(probabilities, self.num_experts)
        extras = {"dispatch": dispatch.masked_fill(padding, 0.0).flatten(0, 1), "combine": combine}
        return Routing(logits, probabilities, index, weight, token_mask, extras=extras)

    def mix(
        self, experts: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_states: Tensor, routing: Routing
    ) -> Tensor:
        """Output of the experts on the slots, combined per token; shapes as in `Router.mix`."""
        (groups, length), (number, width) = routing.token_mask.shape, self.weight.shape
        dispatch, combine = (
            routing.extras[name].to(hidden_states.dtype).view(groups, length, number)
            for name in ("dispatch", "combine")
        )
        # Padding weighs 0, which an infinity in it would turn into NaN.
        tokens = hidden_states.masked_fill(~routing.token_mask.reshape(-1, 1), 0.0).view(groups, length, width)
        slots = (dispatch.transpose(1, 2) @ tokens).flatten(0, 1)
        index = torch.arange(self.num_experts, device=slots.device).repeat_interleave(self.slots_per_expert)
        index = index.repeat(groups)[:, None]
        outputs = experts(slots, index, torch.ones_like(index, dtype=torch.float32))
        return (combine @ outputs.view(groups, number, width)).flatten(0, 1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, up to the 1e-6 that keeps a row of zeros."""
    return rows * torch.rsqrt(rows.square().sum(dim=-1, keepdim=True) + 1e-6)
