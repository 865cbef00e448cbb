"""Auxiliary losses of a mixture, and statistics of its routing: pure functions of one layer's routing.

Shape letters: T tokens, E experts, K choices per token, G groups (sequences, or the batch as one), S tokens of one.
Every function is computed in float32 and counts real tokens only.
"""

from __future__ import annotations

import math

import torch

from st_moe.modeling.routing import Routing


def _real(logits: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Logits in float32 with zeros at padding, whose own values may be anything, NaN included."""
    return logits.float().masked_fill(~token_mask.reshape(-1, 1), 0.0)


def balance_loss(logits: torch.Tensor, first_choice: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss E * sum_e f_e P_e, per group and then averaged over the groups that hold tokens.

    f_e is the fraction of the group's tokens whose first choice is e, before any drop, and P_e the group's mean router
    probability. 1 when the router is balanced, for any K; E when it sends every token to one expert. Zoph et al. 2022,
    appendix A (equations 6 to 8).

    Args:
        logits: [T, E], raw router logits.
        first_choice: int64 [T].
        token_mask: bool [G, S] with G * S = T.

    Returns:
        float32 scalar; 0 when no token is real.
    """
    num_experts = logits.shape[-1]
    mask = token_mask.float()
    tokens = mask.sum(-1)
    group = torch.arange(len(mask), device=mask.device).repeat_interleave(mask.shape[1])
    counts = mask.new_zeros(len(mask) * num_experts)
    counts = counts.index_add(0, group * num_experts + first_choice, mask.flatten()).view(-1, num_experts)
    probabilities = _real(logits, token_mask).softmax(dim=-1).view(*mask.shape, num_experts)
    sums = (probabilities * mask[..., None]).sum(dim=1)
    per_group = num_experts * (counts * sums).sum(-1) / tokens.clamp(min=1).square()
    return per_group.sum() / (tokens > 0).sum().clamp(min=1)


def router_z_loss(logits: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Router z-loss: mean over tokens of logsumexp(logits)^2. Zoph et al. 2022, equation 5.

    Args:
        logits: [T, E], raw router logits.
        token_mask: bool [G, S] with G * S = T.

    Returns:
        float32 scalar; 0 when no token is real.
    """
    mask = token_mask.flatten().float()
    return (_real(logits, token_mask).logsumexp(dim=-1).square() * mask).sum() / mask.sum().clamp(min=1)


def expert_load(routing: Routing) -> torch.Tensor:
    """Share of the used assignments that each expert gets: float32 [E], sums to 1 (to 0 when there is none)."""
    used = (routing.weight > 0) & routing.token_mask.reshape(-1, 1)
    counts = torch.zeros(routing.logits.shape[-1], device=used.device)
    counts = counts.index_add(0, routing.index.flatten(), used.flatten().float())
    return counts / counts.sum().clamp(min=1)


def router_entropy(routing: Routing) -> torch.Tensor:
    """Mean entropy of the router's probabilities as a fraction of ln E: float32 scalar, 1 uniform, 0 certain."""
    log_p = _real(routing.logits.detach(), routing.token_mask).log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    mask = routing.token_mask.flatten().float()
    most = math.log(max(routing.logits.shape[-1], 2))
    return (entropy * mask).sum() / mask.sum().clamp(min=1) / most


def dropped_fraction(routing: Routing) -> torch.Tensor:
    """Fraction of the asked-for assignments that capacity refused: float32 scalar."""
    if routing.dropped is None:
        return torch.zeros((), device=routing.logits.device)
    used = ((routing.weight > 0) & routing.token_mask.reshape(-1, 1)).sum()
    dropped = routing.dropped.sum()
    return dropped / (used + dropped).clamp(min=1)
