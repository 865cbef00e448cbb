"""Auxiliary losses of a mixture, and statistics of its routing: pure functions of one layer's routing.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G groups (sequences, or the batch as one), S
tokens of one. Every function is computed in float32 and counts real tokens only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from st_moe.modeling.routing.record import Routing


def _real(values: Tensor, token_mask: Tensor) -> Tensor:
    """Values [T, n] in float32 with zeros at padding, whose own values may be anything, NaN included."""
    return values.float().masked_fill(~token_mask.reshape(-1, 1), 0.0)


def _counts(index: Tensor, counted: Tensor, group: Tensor, groups: int, num_experts: int) -> Tensor:
    """How many counted choices each expert got in each group: index int64 [T, k], counted float32 [T, k] -> [G, E]."""
    counts = torch.zeros(groups * num_experts, device=index.device)
    place = group[:, None] * num_experts + index
    return counts.index_add(0, place.flatten(), counted.flatten()).view(groups, num_experts)


def _product(fractions: Tensor, sums: Tensor, tokens: Tensor) -> Tensor:
    """E * sum_e f_e P_e per group, averaged over the groups that hold tokens: [G, E], [G, E], [G] -> scalar."""
    per_group = fractions.shape[-1] * (fractions * sums).sum(-1) / tokens.clamp(min=1)
    return per_group.sum() / (tokens > 0).sum().clamp(min=1)


def balance_loss(probabilities: Tensor, index: Tensor, token_mask: Tensor, counted: Tensor | None = None) -> Tensor:
    """Load-balancing loss E * sum_e f_e P_e, per group and then averaged over the groups that hold tokens.

    f_e is the fraction of the group's choices that are e, before any drop, and P_e the group's mean router probability.
    With the first choices: Zoph et al. 2022, appendix A (equations 6 to 8); 1 when the router is balanced, E when it
    sends every token to one expert. With all K choices: 1 when balanced, E / K when all tokens take the same K experts.
    With all choices per sequence: the sequence-wise loss of DeepSeek-AI 2024 (V3), equations 17 to 20.

    Args:
        probabilities: [T, E], rows that sum to 1.
        index: int64 [T, k], the choices to count.
        token_mask: bool [G, S] with G * S = T.
        counted: bool [T, k], the choices to count among those, None for all; f is a fraction of all of them.

    Returns:
        float32 scalar; 0 when no token is real.
    """
    num_experts = probabilities.shape[-1]
    mask = token_mask.float()
    tokens = mask.sum(-1)
    group = torch.arange(mask.shape[0], device=mask.device).repeat_interleave(mask.shape[1])
    chosen = mask.reshape(-1, 1).expand(index.shape)
    chosen = chosen if counted is None else chosen * counted
    counts = _counts(index, chosen, group, mask.shape[0], num_experts)
    fractions = counts / (index.shape[1] * tokens.clamp(min=1))[:, None]
    return _product(fractions, _sums(probabilities, token_mask), tokens)


def _sums(values: Tensor, token_mask: Tensor) -> Tensor:
    """Sum of values [T, E] over the real tokens of each group: [G, E]."""
    return _real(values, token_mask).view(*token_mask.shape, values.shape[-1]).sum(dim=1)


def second_place_loss(probabilities: Tensor, index: Tensor, token_mask: Tensor) -> Tensor:
    """Balance of the second choices: E / 2 * sum_e f2_e P2_e per group, averaged over the groups that hold tokens.

    f2_e is the fraction of the group's second choices that are e, and P2_e the mean of the probabilities that are left
    when the first choice is taken out and the rest divided by its sum. 1/2 when balanced, E/2 when collapsed. Mesh
    TensorFlow, `_top_2_gating` (`use_second_place_loss`); off in Zoph et al. 2022.

    Args:
        probabilities: [T, E], rows that sum to 1.
        index: int64 [T, K] with K >= 2.
        token_mask: bool [G, S] with G * S = T.
    """
    rest = probabilities.scatter(1, index[:, :1], 0.0)
    rest = rest / rest.sum(-1, keepdim=True).clamp(min=1e-9)
    return 0.5 * balance_loss(rest, index[:, 1:2], token_mask)


def _squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance / (mean^2 + 1e-10), of [E]."""
    return values.var(unbiased=False) / (values.mean().square() + 1e-10)


def importance_loss(weight: Tensor, index: Tensor, num_experts: int, token_mask: Tensor) -> Tensor:
    """Squared variation of the experts' importance, the sum of their gates over the batch.

    0 when balanced, E/K - 1 when all tokens give the same K experts equal gates, at most E - 1.
    Shazeer et al. 2017, equations 6 and 7.

    Args:
        weight: [T, K], combine weights.
        index: int64 [T, K].
        num_experts: E.
        token_mask: bool [G, S] with G * S = T.
    """
    gates = _real(weight, token_mask)
    importance = torch.zeros(num_experts, device=gates.device).index_add(0, index.flatten(), gates.flatten())
    return _squared_variation(importance)


def router_z_loss(logits: Tensor, token_mask: Tensor) -> Tensor:
    """Router z-loss: mean over tokens of logsumexp(logits)^2. Zoph et al. 2022, equation 5.

    Args:
        logits: [T, E], raw router logits.
        token_mask: bool [G, S] with G * S = T.

    Returns:
        float32 scalar; 0 when no token is real.
    """
    mask = token_mask.flatten().float()
    return (_real(logits, token_mask).logsumexp(dim=-1).square() * mask).sum() / mask.sum().clamp(min=1)


def smooth_load(logits: Tensor, noisy_logits: Tensor, noise_scale: Tensor, index: Tensor) -> Tensor:
    """Chance of each expert to be among a token's K < E choices, were its own noise drawn anew: float32 [T, E].

    Phi((z_i - t_i) / scale_i), where t_i is the K-th largest noisy logit of the other experts. Shazeer et al. 2017,
    appendix A, equations 8 and 9.

    Args:
        logits: [T, E], z, without noise.
        noisy_logits: [T, E], the logits that chose.
        noise_scale: [T, E], standard deviation of the noise.
        index: int64 [T, K], the choices.
    """
    choices = index.shape[1]
    ordered = noisy_logits.sort(dim=-1, descending=True).values
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
    threshold = torch.where(chosen, ordered[:, choices, None], ordered[:, choices - 1, None])
    return torch.special.ndtr((logits - threshold) / noise_scale)


def load_loss(load: Tensor, token_mask: Tensor) -> Tensor:
    """Squared variation of the experts' load: 0 balanced, E / K - 1 when all tokens are sure of the same K experts.

    Shazeer et al. 2017, equations 10 and 11 (appendix A).

    Args:
        load: [T, E], what each token adds to each expert's load: a chance, or 1 where it is chosen.
        token_mask: bool [G, S] with G * S = T.
    """
    return _squared_variation(_real(load, token_mask).sum(dim=0))


def depth_loss(logits: Tensor, passes: Tensor, token_mask: Tensor) -> Tensor:
    """Binary cross-entropy of "this token passes" against the tokens that should: the mean over real tokens.

    It centres sigmoid(r) at 1/2 between a sequence's foremost tokens and the rest. Raposo et al. 2024, section 3.5, in
    words. ln 2 where every r is 0; 0 where the sign of r tells the tokens apart with a wide margin; the entropy of
    the share that should pass (0.377 for 1/8) where r is the same best number for all tokens.

    Args:
        logits: [T, 1], r.
        passes: bool [G, S], the tokens that should pass.
        token_mask: bool [G, S] with G * S = T.
    """
    r, mask = _real(logits, token_mask).view(token_mask.shape), token_mask.float()
    # -ln sigmoid(r) where the token should pass, -ln(1 - sigmoid(r)) elsewhere.
    each = nn.functional.softplus(torch.where(passes, -r, r))
    return (each * mask).sum() / mask.sum().clamp(min=1)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [n, H] divided by their length; rows of zeros stay, with a finite gradient."""
    length = rows.norm(dim=-1, keepdim=True)
    return rows / length.where(length > 0, 1.0)


def diversity_loss(rows: Tensor, active: Tensor) -> Tensor:
    """Frobenius norm of V V^T - I over the active experts, V their router rows with length 1.

    0 when they are orthogonal, sqrt(n (n - 1)) when all n point the same way. Guo et al. 2024 (DynMoE), auxiliary
    loss, first term.

    Args:
        rows: [E, H].
        active: bool [E].
    """
    unit = unit_rows(rows.float())
    excess = unit @ unit.t() - torch.eye(len(rows), device=rows.device)
    return (excess * (active[:, None] & active)).norm()


def simplicity_loss(rows: Tensor) -> Tensor:
    """Mean length of all router rows [E, H], those out of use included: 1 at first, whatever the balance.

    Guo et al. 2024 (DynMoE), auxiliary loss, second term.
    """
    return rows.float().norm(dim=-1).mean()


def top_any_balance_loss(gates: Tensor, token_mask: Tensor) -> Tensor:
    """Balance of top-any gates: E * sum_e m_e c_e over the tokens that some expert wants.

    c_e is the mean of the gates and m_e that of the gates divided by their number per token. k when every token wants k
    experts and all are wanted as often, E when all want the same one. DynMoE's code only, not in the paper.

    Args:
        gates: [T, E], 0 or 1.
        token_mask: bool [G, S] with G * S = T.

    Returns:
        float32 scalar; 0 when no real token is wanted.
    """
    gates = _real(gates, token_mask)
    wants = gates.sum(-1, keepdim=True)
    tokens = (wants.detach() > 0).sum().clamp(min=1)
    taken = gates * (wants.detach() > 0)
    shares = taken / wants.clamp(min=1)
    return gates.shape[-1] * (shares.sum(0) / tokens * (taken.sum(0) / tokens)).sum()


def efficiency_loss(gates: Tensor, token_mask: Tensor) -> Tensor:
    """Mean gate over real tokens and experts: k / E when every token wants k experts. DynMoE's code only.

    Args:
        gates: [T, E], 0 or 1.
        token_mask: bool [G, S] with G * S = T.
    """
    return _real(gates, token_mask).sum() / (token_mask.sum().clamp(min=1) * gates.shape[-1])


def expert_load(routing: Routing) -> Tensor:
    """Share of the used assignments that each expert gets: float32 [E], sums to 1 (to 0 when there is none)."""
    used = (routing.weight > 0) & routing.token_mask.reshape(-1, 1)
    counts = torch.zeros(routing.logits.shape[-1], device=used.device)
    counts = counts.index_add(0, routing.index.flatten(), used.flatten().float())
    return counts / counts.sum().clamp(min=1)


def router_entropy(routing: Routing) -> Tensor:
    """Mean entropy of the router's probabilities as a fraction of ln E: float32 scalar, 1 uniform, 0 certain."""
    p = _real(routing.probabilities.detach(), routing.token_mask)
    entropy = torch.special.entr(p).sum(-1)
    most = math.log(max(p.shape[-1], 2))
    return entropy.sum() / routing.token_mask.sum().clamp(min=1) / most


def dropped_fraction(routing: Routing) -> Tensor:
    """Fraction of the asked-for assignments that capacity refused: float32 scalar."""
    if routing.dropped is None:
        return torch.zeros((), device=routing.logits.device)
    used = ((routing.weight > 0) & routing.token_mask.reshape(-1, 1)).sum()
    dropped = routing.dropped.sum()
    return dropped / (used + dropped).clamp(min=1)
