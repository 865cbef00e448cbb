"""Expert-choice routing: experts choose tokens.

Shape letters: T tokens, H hidden size, E experts, G groups of tokens, S tokens of one, C tokens that an expert takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing.capacity import expert_capacity
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router, largest, normalized


class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens of its group that have the largest probability for it.

    p = softmax(x W^T) over the experts; among a group's n real tokens each expert takes the C largest p (ties to the
    lowest position), with combine weight p as it is, or divided by the token's sum if `renormalize_after_drop`. A token
    has 0 to E experts; one that no expert takes gets nothing from the layer. Load is balanced by construction, so there
    are no losses. Whether a token is taken depends on the later ones: not causal. Source: Zhou et al. 2022, section 3.2
    (their S is p, their k is C).

    The groups are those of `capacity_scope`. With the mode's capacity factor c, C = max(min(n, floor(n c / E)),
    min_capacity); without one c is K, the experts that a token has on average, and C is at least 1. No expert takes
    more than the n real tokens, and none takes padding. `drop_priority` has no meaning here.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.reset_parameters()

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        logits = self.logits_of(x)
        probabilities = logits.softmax(dim=-1)
        taken = self.taken(probabilities.detach(), token_mask)
        weight, index = largest(probabilities.masked_fill(~taken, 0.0), self.num_experts)
        return Routing(logits, probabilities, index, weight, token_mask)

    def taken(self, probabilities: Tensor, token_mask: Tensor) -> Tensor:
        """Which experts take which tokens.

        Args:
            probabilities: float32 [T, E].
            token_mask: bool [sequences, length].

        Returns:
            bool [T, E].
        """
        shape = token_mask.shape
        real = self.capacity.groups(token_mask.flatten(), shape)[..., None]
        scores = self.capacity.groups(probabilities, shape).masked_fill(~real, -1.0)
        factor = self.capacity.factors[self.training]
        asked, least = (self.top_k, 1) if factor is None else (factor, self.capacity.min_capacity)
        capacity = expert_capacity(real.sum((1, 2)), asked, self.num_experts, least)
        order = scores.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device)[None, :, None].expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        return ((rank < capacity[:, None, None]) & real).flatten(0, 1)[: probabilities.shape[0]]

    def serve(self, routing: Routing) -> Routing:
        """Capacity is part of the choice and drops nothing; the weights are renormalised if the config says so."""
        return routing._replace(weight=normalized(routing.weight)) if self.renormalize_after_drop else routing
