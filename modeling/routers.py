"""Routers: which experts each token goes to, and with which weights.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G routing groups (sequences), S tokens of one.
To add a router: one class with the call of `TopKRouter`, one line in `st_moe.configuration.ROUTER_TYPES`, one test.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn
from transformers import initialization as init

from st_moe.configuration import ROUTER_TYPES, STMoEConfig
from st_moe.modeling.routing import Routing, expert_capacity, keep_within_capacity


class TopKRouter(nn.Module):
    """Top-K softmax routing of ST-MoE, Switch, GShard and Mixtral.

    z = x W^T and p = softmax(z) in float32; the K largest p (ties to the lowest index) are divided by their sum if
    `norm_topk_prob`; choices after the first pass the second-expert policy; what capacity refuses gets weight 0.
    Nothing is renormalised afterwards. Source: Zoph et al. 2022, section 2; Mesh TensorFlow `_top_n_gating`.

    Args:
        config: the mixture's fields.
        hidden_size: H.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.policies = {True: config.second_expert_policy_train, False: config.second_expert_policy_eval}
        self.capacity_factors = {True: config.capacity_factor, False: config.eval_capacity_factor}
        self.min_capacity = config.min_capacity
        threshold = config.second_expert_threshold
        ranks = max(self.top_k - 1, 1)
        self.thresholds = list(threshold) if isinstance(threshold, list | tuple) else [threshold] * ranks
        self.initializer_range = config.initializer_range
        self.weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        init.normal_(self.weight, mean=0.0, std=self.initializer_range)

    def reset_parameters(self) -> None:
        """Initialise the router's rows from N(0, initializer_range)."""
        init.normal_(self.weight, mean=0.0, std=self.initializer_range)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor) -> Routing:
        """Route tokens.

        Args:
            hidden_states: [T, H]; read as float32, left as it is.
            token_mask: bool [G, S], True at real tokens; padding takes no slot of an expert's capacity.

        Returns:
            The routing of the T = G * S tokens.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            router_input = hidden_states.float()
            if self.training and self.jitter_noise > 0:
                noise = torch.empty_like(router_input).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
                router_input = router_input * noise
            logits = nn.functional.linear(router_input, self.weight.float())
            weight, index = self.choose(logits)
        routed = self.second_expert_policy(weight)
        dropped = None
        capacity_factor = self.capacity_factors[self.training]
        if capacity_factor is not None:
            groups, length = token_mask.shape
            asking = (routed & token_mask.reshape(-1, 1)).view(groups, length, self.top_k)
            capacity = expert_capacity(token_mask.sum(-1), capacity_factor, self.num_experts, self.min_capacity)
            kept = keep_within_capacity(index.view_as(asking), asking, capacity, self.num_experts)
            dropped = (asking & ~kept).reshape(routed.shape)
            routed = kept.reshape(routed.shape)
        return Routing(logits, index, weight * routed, dropped, token_mask)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best experts of each token, best first, with their combine weights.

        Args:
            logits: float32 [T, E].

        Returns:
            Weights float32 [T, K] and indices int64 [T, K].
        """
        probabilities = logits.softmax(dim=-1)
        # A stable sort sends ties to the lowest index on every device; torch.topk leaves them to chance.
        ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        weight, index = ordered[:, : self.top_k], order[:, : self.top_k]
        if not self.normalize:
            return weight, index
        if self.top_k == 1:
            # p / p is 1 with no gradient; dividing by a constant keeps the 1 and lets the router learn (Switch).
            return weight / weight.detach().clamp(min=1e-9), index
        return weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-9), index

    def second_expert_policy(self, weight: torch.Tensor) -> torch.Tensor:
        """Which choices are used; the first always is.

        Args:
            weight: float32 [T, K], combine weights.

        Returns:
            bool [T, K].
        """
        policy = self.policies[self.training]
        routed = torch.ones_like(weight, dtype=torch.bool)
        if self.top_k == 1 or policy == "all":
            return routed
        later = weight[:, 1:].detach()
        threshold = later.new_tensor(self.thresholds)
        if policy == "none":
            used = torch.zeros_like(later, dtype=torch.bool)
        elif policy == "threshold":
            used = later > threshold
        else:
            used = torch.rand_like(later) < later / threshold.clamp(min=1e-9)
        return torch.cat([routed[:, :1], used], dim=-1)


def router_class(router_type: str) -> type[TopKRouter]:
    """The class that a `router_type` names in the registry."""
    module, _, name = ROUTER_TYPES[router_type].rpartition(".")
    return getattr(import_module(module), name)
