"""Differentiable top-K by coordinate descent, and the router that weighs its experts with it.

Shape letters: T tokens, H hidden size, E experts, K choices per token, n scores of one row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing.router import largest
from st_moe.modeling.routing.top_k import TopKRouter

# In the place of minus infinity, whose difference from itself is not a number.
_ABSENT = -1e30


def coordinate_descent(
    scores: Tensor,
    k: float | Tensor,
    num_iterations: int = 20,
    epsilon: float = 0.1,
    epsilon_init: float | None = None,
    epsilon_decay: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Soft membership lambda in the k largest scores of each row, differentiable.

    It maximises s lambda + epsilon H(lambda), H the entropy, among lambda in [0, 1]^n of sum k. From a = 0 and b = -s,
    by turns a = e (ln k - logsumexp((s + b) / e)), which makes the sum k, and b = -relu(s + a), which bounds every
    lambda = exp((s + a + b) / e) by 1. In the limit lambda_j = min(1, exp((s_j + a) / epsilon)) with the sum k; after
    few iterations the sum can be far from it. Entries at the bound have no gradient. Source: Lei et al. 2023
    (conditional adapters); Ainslie et al. 2023 (CoLT5).

    Args:
        scores: [..., n]; computed in float32, or float64 where they are.
        k: how many, above 0: one number, or a tensor [...] with one per row.
        num_iterations: turns of a and b.
        epsilon: temperature e; lambda approaches the hard choice as it approaches 0.
        epsilon_init: temperature of the first turn, if it is larger.
        epsilon_decay: what the temperature is multiplied by after each turn, down to `epsilon`.
        mask: bool [..., n], False at entries that cannot be chosen; their lambda is 0.

    Returns:
        lambda in [0, 1], float32 (or float64) [..., n].
    """
    s = scores if scores.dtype.itemsize > 4 else scores.float()
    absent = s.new_zeros((), dtype=torch.bool) if mask is None else ~mask
    log_k = k.to(s).log().unsqueeze(-1) if isinstance(k, Tensor) else math.log(k)
    temperature = max(epsilon_init or epsilon, epsilon)
    a, b = s.new_zeros(()), -s
    for _ in range(num_iterations):
        raised = ((s + b) / temperature).masked_fill(absent, _ABSENT)
        a = temperature * (log_k - raised.logsumexp(dim=-1, keepdim=True))
        b = -F.relu(s + a)
        temperature = max(temperature * epsilon_decay, epsilon)
    return ((s + a + b) / temperature).masked_fill(absent, _ABSENT).exp()


class CoordinateDescentRouter(TopKRouter):
    """Top-K whose weights come from a differentiable choice, so that experts near the choice share its gradient.

    The K experts are those of the largest probability (ties to the lowest index). Their weights are the soft
    memberships lambda in the k' = min(coordinate_descent_k_ratio * K, E) largest probabilities, divided by their sum if
    `norm_topk_prob` and thresholded by the second-expert policy as those of any top-K router. st-moe-pytorch's
    `differentiable_topk`. Probabilities lie in [0, 1], so at the default temperature 0.1 the best expert's lambda is
    often bounded at 1: with K = 1 such a token teaches the router through the auxiliary losses alone.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.aim = min(config.coordinate_descent_k_ratio * self.top_k, self.num_experts)
        self.num_iterations = config.coordinate_descent_iterations
        self.epsilon = config.coordinate_descent_epsilon

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The K best experts of each token, best first, with their memberships as combine weights.

        Args:
            probabilities: float32 [T, E].

        Returns:
            Weights float32 [T, K] and indices int64 [T, K].
        """
        _, index = largest(probabilities, self.top_k)
        membership = coordinate_descent(probabilities, self.aim, self.num_iterations, self.epsilon)
        return self.normalized(membership.gather(-1, index)), index
