"""Top-K softmax routing: ST-MoE, Switch, GShard and Mixtral in one.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G routing groups (sequences), S tokens of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router, largest, normalized


class TopKRouter(Router):
    """The K experts of the largest probability.

    z = x W^T and p = softmax(z) in float32; the K largest p (ties to the lowest index) are divided by their sum if
    `norm_topk_prob`; choices after the first pass the second-expert policy; what capacity refuses gets weight 0.
    Nothing is renormalised afterwards unless `renormalize_after_drop`. In training the choice, the weights and the
    balance loss may read noisy logits; the z-loss reads clean ones. Source: Zoph et al. 2022, section 2; Mesh
    TensorFlow `_top_n_gating`; with K = 1 Fedus et al. 2021.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.normalize = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.gumbel_noise = config.router_gumbel_noise
        self.gaussian_noise = config.router_gaussian_noise
        self.policies = {True: config.second_expert_policy_train, False: config.second_expert_policy_eval}
        threshold, later = config.second_expert_threshold, max(self.top_k - 1, 1)
        # A list has a value for the rank of every layer; this one may have fewer ranks than others.
        self.thresholds = list(threshold)[:later] if isinstance(threshold, list | tuple) else [threshold] * later
        self.reset_parameters()

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        logits = self.logits_of(x)
        probabilities = self.with_noise(x, logits).softmax(dim=-1)
        weight, index = self.choose(probabilities)
        weight = weight * self.second_expert_policy(weight)
        return Routing(logits, probabilities, index, weight, token_mask)

    def with_noise(self, x: Tensor, logits: Tensor) -> Tensor:
        """Logits as the choice reads them: in training with the noise that the config asks for, [T, E]."""
        if not self.training:
            return logits
        if self.jitter_noise > 0:
            jitter = torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            logits = self.logits_of(x * jitter)
        if self.gumbel_noise > 0:
            uniform = torch.rand_like(logits).clamp(min=1e-20)
            logits = logits - self.gumbel_noise * (-uniform.log()).clamp(min=1e-20).log()
        if self.gaussian_noise > 0:
            logits = logits + self.gaussian_noise * torch.randn_like(logits)
        return logits

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The K best experts of each token, best first, with their combine weights.

        Args:
            probabilities: float32 [T, E].

        Returns:
            Weights float32 [T, K] and indices int64 [T, K].
        """
        weight, index = largest(probabilities, self.top_k)
        return self.normalized(weight), index

    def normalized(self, weight: Tensor) -> Tensor:
        """Combine weights of the chosen probabilities [T, K], as `norm_topk_prob` says."""
        return normalized(weight) if self.normalize else weight

    def second_expert_policy(self, weight: Tensor) -> Tensor:
        """Which choices are used; the first always is.

        Args:
            weight: float32 [T, K], combine weights.

        Returns:
            bool [T, K].
        """
        policy = self.policies[self.training]
        used = torch.ones_like(weight, dtype=torch.bool)
        if self.top_k == 1 or policy == "all":
            return used
        later = weight[:, 1:].detach()
        threshold = later.new_tensor(self.thresholds)
        if policy == "none":
            taken = torch.zeros_like(later, dtype=torch.bool)
        elif policy == "threshold":
            taken = later > threshold
        else:
            taken = torch.rand_like(later) < later / threshold.clamp(min=1e-9)
        return torch.cat([used[:, :1], taken], dim=-1)
