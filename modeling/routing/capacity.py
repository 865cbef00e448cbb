"""Expert capacity: who finds room when an expert takes only so many assignments.

Shape letters: T tokens, E experts, K choices per token, G groups that share capacity, S tokens of one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from st_moe.configuration import STMoEConfig


class Capacity:
    """The capacity rule of a config: scope, size, and who is served first.

    Args:
        config: the mixture's fields.
        num_experts: E.
    """

    def __init__(self, config: STMoEConfig, num_experts: int) -> None:
        self.num_experts = num_experts
        self.factors = {True: config.capacity_factor, False: config.eval_capacity_factor}
        self.min_capacity = config.min_capacity
        self.scope = config.capacity_scope
        self.group_size = config.capacity_group_size
        self.by_probability = config.drop_priority == "router_prob"

    def keep(self, index: Tensor, asking: Tensor, token_mask: Tensor, priority: Tensor, factor: float) -> Tensor:
        """Which assignments find room.

        Args:
            index: int64 [T, K], expert of each choice.
            asking: bool [T, K], the assignments that ask for a slot.
            token_mask: bool [sequences, length], True at real tokens.
            priority: float32 [T], the first choices' probabilities, for `drop_priority="router_prob"`.
            factor: the capacity factor.

        Returns:
            bool [T, K].
        """
        tokens, shape = token_mask.numel(), token_mask.shape
        index, asking, mask = (self.groups(tensor, shape) for tensor in (index, asking, token_mask.flatten()))
        capacity = expert_capacity(mask.sum(-1), factor, self.num_experts, self.min_capacity)
        if not self.by_probability:
            kept = keep_within_capacity(index, asking, capacity, self.num_experts)
            return kept.flatten(0, 1)[:tokens]
        order = self.groups(priority.detach(), shape).argsort(dim=1, descending=True, stable=True)
        rows = order[..., None].expand_as(index)
        kept = keep_within_capacity(index.gather(1, rows), asking.gather(1, rows), capacity, self.num_experts)
        return torch.empty_like(kept).scatter_(1, rows, kept).flatten(0, 1)[:tokens]

    def groups(self, per_token: Tensor, shape: torch.Size) -> Tensor:
        """[T, ...] -> [G, S, ...], the tokens that share capacity in one row; a last group is filled up with zeros.

        Args:
            per_token: [T, ...].
            shape: sequences and length, whose product is T.
        """
        if self.scope == "sequence":
            return per_token.view(*shape, *per_token.shape[1:])
        if self.scope == "batch":
            return per_token[None]
        missing = -per_token.shape[0] % self.group_size
        padded = F.pad(per_token, (*(0, 0) * (per_token.ndim - 1), 0, missing))
        return padded.view(-1, self.group_size, *per_token.shape[1:])


def expert_capacity(tokens: Tensor, capacity_factor: float, num_experts: int, min_capacity: int) -> Tensor:
    """Assignments that one expert takes per group: max(min(n, floor(n * factor / E)), min_capacity).

    ST-MoE (Zoph et al. 2022), section 2, with Mesh TensorFlow's floor. The factor is not multiplied by K.

    Args:
        tokens: int [G], n, real tokens of each group.

    Returns:
        int64 [G].
    """
    share = torch.floor(tokens.double() * capacity_factor / num_experts).long()
    return torch.minimum(share, tokens).clamp(min=min_capacity)


def keep_within_capacity(index: Tensor, routed: Tensor, capacity: Tensor, num_experts: int) -> Tensor:
    """Which assignments find room, in ST-MoE's order: all first choices left to right, then all second choices, ...

    An assignment's slot is the number of routed assignments to the same expert before it in that order; it is kept if
    the slot is below the capacity. (The references count accepted assignments of lower ranks instead of routed ones;
    the outcome is the same, an expert whose requests overflowed is full either way.) Memory O(G (S K + E)).

    Args:
        index: int64 [G, S, K], expert of each choice.
        routed: bool [G, S, K], the choices that ask for a slot.
        capacity: int64 [G].
        num_experts: E.

    Returns:
        bool [G, S, K].
    """
    groups, length, choices = index.shape
    # Choices that ask for nothing queue behind one expert of their own, out of everybody's way.
    queue = torch.where(routed, index, num_experts).transpose(1, 2).reshape(groups, choices * length)
    # One queue per group and expert, numbered through, so that a single sort serves them all.
    queue = queue + (num_experts + 1) * torch.arange(groups, device=index.device)[:, None]
    flat = queue.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(groups * (num_experts + 1), dtype=torch.int64, device=index.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    first = counts.cumsum(0) - counts
    slot = torch.empty_like(order)
    slot[order] = torch.arange(order.shape[0], device=index.device) - first[flat[order]]
    kept = slot.view_as(queue) < capacity[:, None]
    return kept.view(groups, choices, length).transpose(1, 2) & routed
