"""Mixture of depths: tokens that pass a layer's feed-forward network, and tokens that skip it.

Shape letters: T tokens, H hidden size, G routing groups (sequences), S tokens of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router


class MixtureOfDepthsRouter(Router):
    """One expert that a token passes or skips; what is skipped is the feed-forward part of a block, not its attention.

    r = x w in float32. A token that passes gets sigmoid(r) times the expert's output, one that skips gets weight 0 and
    is not computed. A token passes if sigmoid(r) > 1/2, in training and evaluation: nothing it depends on comes later
    in the sequence. The depth loss brings about that this is the share `depth_fraction` of a sequence. With
    `allow_non_causal_routing` the max(1, floor(depth_fraction * n)) tokens of the largest r among a sequence's n real
    ones pass instead (ties to the earliest); n counts the tokens of one forward pass, so a token decoded alone always
    passes. Source: Raposo et al. 2024, sections 3.3 to 3.5, who skip whole blocks and weigh by r itself.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.fraction = config.depth_fraction
        self.by_rank = config.allow_non_causal_routing
        self.reset_parameters()

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        logits = self.logits_of(x)
        if self.by_rank:
            passes = foremost(logits.view(token_mask.shape), token_mask, self.fraction)
        else:
            # sigmoid(r) > 1/2 without its rounding.
            passes = (logits > 0).view(token_mask.shape) & token_mask
        weight = logits.sigmoid() * passes.view(-1, 1)
        index = torch.zeros_like(logits, dtype=torch.int64)
        return Routing(logits, torch.ones_like(logits), index, weight, token_mask)

    def depth_loss(self, routing: Routing) -> Tensor:
        passes = foremost(routing.logits.view(routing.token_mask.shape), routing.token_mask, self.fraction)
        return losses.depth_loss(routing.logits, passes, routing.token_mask)


def foremost(scores: Tensor, token_mask: Tensor, fraction: float) -> Tensor:
    """The max(1, floor(fraction * n)) largest scores among the n real tokens of each sequence.

    Args:
        scores: float32 [G, S].
        token_mask: bool [G, S], True at real tokens.
        fraction: in (0, 1].

    Returns:
        bool [G, S], False at padding; equal scores in the order of the tokens.
    """
    room = torch.floor(token_mask.sum(-1, keepdim=True).double() * fraction).clamp(min=1)
    # Stable: equals keep the order of the tokens. The inverse of the order is each token's rank.
    order = scores.detach().masked_fill(~token_mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < room) & token_mask
