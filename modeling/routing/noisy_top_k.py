"""Noisy top-K routing: learnt noise in the choice, and losses on the gates and on the load that it makes smooth.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G sequences, S tokens of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import largest
from st_moe.modeling.routing.top_k import TopKRouter

_LEAST_NOISE = 1e-2


class NoisyTopKRouter(TopKRouter):
    """The K experts of the largest noisy logit.

    h = x W^T + n * (softplus(x W_noise^T) + 0.01) with n ~ N(0, 1) in training, h = x W^T otherwise; the K largest h
    (ties to the lowest index) get the softmax over them alone. Without `norm_topk_prob` their weights are those of the
    softmax over all E. With K = 1 the weight is 1 and has Switch's gradient, as in `TopKRouter`. Source: Shazeer et al.
    2017, equations 3 to 5; the least noise is tensor2tensor's.

    Both weights start from zero, which makes the noise alone choose at first (appendix A).

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise both weights with zeros."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        clean = noisy = self.logits_of(x)
        extras = {}
        if self.training:
            scale = F.softplus(F.linear(x, self.noise_weight.float())) + _LEAST_NOISE
            noisy = clean + torch.randn_like(clean) * scale
            extras = {"noisy_logits": noisy, "noise_scale": scale}
        probabilities = noisy.softmax(dim=-1)
        # Chosen by logit: probabilities far below the best are 0, and so would be equal.
        index = largest(noisy, self.top_k)[1]
        weight = self.normalized(probabilities.gather(1, index))
        return Routing(clean, probabilities, index, weight, token_mask, extras=extras)

    def load_loss(self, routing: Routing) -> Tensor:
        extras = routing.extras
        if "noise_scale" in extras and self.top_k < self.num_experts:
            load = losses.smooth_load(routing.logits, extras["noisy_logits"], extras["noise_scale"], routing.index)
        else:
            # Without chance there is nothing to be smooth: 1 where a gate is open, and no gradient.
            used = (extras["gates"] > 0).float()
            load = torch.zeros_like(routing.logits).scatter(1, routing.index, used)
        return losses.load_loss(load, routing.token_mask)
