"""The routing record, and expert capacity.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G routing groups (sequences), S tokens of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Where each token goes: what a router hands to the experts, the losses and the reports.

    An assignment that is dropped or absent is a valid expert index with weight 0, never a sentinel.

    Attributes:
        logits: float32 [T, E], raw router logits.
        index: int64 [T, K], expert of each choice, best first.
        weight: float32 [T, K], combine weight of each choice.
        dropped: bool [T, K], True where capacity refused an assignment; None when nothing can be dropped.
        token_mask: bool [G, S] with G * S = T, True at real tokens.
    """

    logits: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # the contract's word; nobody looks for a field's position
    weight: torch.Tensor
    dropped: torch.Tensor | None
    token_mask: torch.Tensor


def expert_capacity(tokens: torch.Tensor, capacity_factor: float, num_experts: int, min_capacity: int) -> torch.Tensor:
    """Assignments that one expert takes per group: max(min(n, floor(n * factor / E)), min_capacity).

    ST-MoE (Zoph et al. 2022), section 2, with Mesh TensorFlow's floor. The factor is not multiplied by K.

    Args:
        tokens: int [G], n, real tokens of each group.

    Returns:
        int64 [G].
    """
    share = torch.floor(tokens.double() * capacity_factor / num_experts).long()
    return torch.minimum(share, tokens).clamp(min=min_capacity)


def keep_within_capacity(
    index: torch.Tensor, routed: torch.Tensor, capacity: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Which assignments find room, in ST-MoE's order: all first choices left to right, then all second choices, ...

    An assignment's slot is the number of routed assignments to the same expert before it in that order; it is kept if
    the slot is below the capacity. (The references count accepted assignments of lower ranks instead of routed ones;
    the outcome is the same, an expert whose requests overflowed is full either way.) Memory O(G S K).

    Args:
        index: int64 [G, S, K], expert of each choice.
        routed: bool [G, S, K], the choices that ask for a slot.
        capacity: int64 [G].
        num_experts: E.

    Returns:
        bool [G, S, K].
    """
    groups, length, choices = index.shape
    by_rank = index.transpose(1, 2).reshape(groups, choices * length)
    asking = routed.transpose(1, 2).reshape(groups, choices * length)
    # Choices that ask for nothing queue behind one expert of their own, out of everybody's way.
    queue = torch.where(asking, by_rank, num_experts)
    order = torch.argsort(queue, dim=1, stable=True)
    sorted_queue = queue.gather(1, order)
    position = torch.arange(choices * length, device=index.device).expand(groups, -1)
    first = torch.searchsorted(sorted_queue, sorted_queue, side="left")
    slot = torch.empty_like(order).scatter_(1, order, position - first)
    kept = asking & (slot < capacity[:, None])
    return kept.view(groups, choices, length).transpose(1, 2)
