"""Sigmoid top-K routing with groups of experts and a selection bias: DeepSeek-V3's router.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G routing groups (sequences), S tokens of one,
N groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router, largest


class SigmoidTopKRouter(Router):
    """The K experts of the largest biased score, among those of the best groups.

    s = sigmoid(x W^T) in float32 and a bias b that no gradient moves. The experts form `n_group` groups of neighbours;
    a group's score is the sum of its two best s + b, and only the `topk_group` best groups are open to a token. Of
    their experts the K largest s + b are chosen (ties to the lowest index, everywhere). The weights are s without b,
    divided by their sum if `norm_topk_prob`, and in the end times `routed_scaling_factor`; with K = 1 the division
    keeps Switch's gradient, as in `TopKRouter`. Source: DeepSeek-AI 2024 (V3), equations 12 to 16.

    b starts from zero; `update_biases` moves it after each optimizer step, by the experts' load since the last one.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.

    Attributes:
        e_score_correction_bias: b, float32 [E], whatever the dtype of the model.
        counts: int64 [E], choices by real tokens that the next update will count; None when there are none. No buffer:
            data parallelism would replace every rank's by the first one's.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.normalize = config.norm_topk_prob
        self.groups, self.open_groups = config.n_group, config.topk_group
        self.scaling = config.routed_scaling_factor
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        self.counts: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the router's rows as every router does, and the bias with zeros."""
        super().reset_parameters()
        init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # What every cast and move goes through. An update's step is below the resolution of 16 bits, so the bias keeps
        # all of its bits and only follows to the new device.
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(moved.device, torch.float32)
        return self

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        logits = self.logits_of(x)
        scores = logits.sigmoid()
        index = largest(self.in_open_groups(scores.detach() + self.e_score_correction_bias), self.top_k)[1]
        # s / sum(s), also where every s is too small for float32.
        probabilities = nn.functional.logsigmoid(logits).softmax(dim=-1)
        return Routing(logits, probabilities, index, self.normalized(scores.gather(1, index)), token_mask)

    def in_open_groups(self, biased: Tensor) -> Tensor:
        """Biased scores [T, E] with minus infinity in the groups that are closed to a token."""
        if self.groups == 1:
            return biased
        grouped = biased.unflatten(-1, (self.groups, -1))
        best = largest(largest(grouped, 2)[0].sum(-1), self.open_groups)[1]
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter(1, best, False)
        return grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)

    def normalized(self, weight: Tensor) -> Tensor:
        """Combine weights of the chosen scores [T, K], as `norm_topk_prob` says."""
        if not self.normalize:
            return weight
        total = weight.sum(dim=-1, keepdim=True) + 1e-20
        # s / s is 1 with no gradient; dividing by a constant keeps the 1 and lets the router learn (Switch).
        return weight / (total.detach() if self.top_k == 1 else total)

    def serve(self, routing: Routing) -> Routing:
        """Apply capacity, then the scale: what is renormalised after a drop sums to `routed_scaling_factor` again."""
        routing = super().serve(routing)
        return routing._replace(weight=routing.weight * self.scaling)

    def observe(self, hidden_states: Tensor, routing: Routing) -> None:
        """Count the choices of real tokens, refused ones included; passes without gradient train nobody."""
        if not torch.is_grad_enabled():
            return
        counted = routing.token_mask.reshape(-1, 1).expand(routing.index.shape).long()
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=counted.device)
        counts = counts.index_add(0, routing.index.flatten(), counted.flatten())
        self.counts = counts if self.counts is None else self.counts.to(counts.device) + counts


@torch.no_grad()
def update_biases(routers: Sequence[SigmoidTopKRouter], rate: float) -> None:
    """Loss-free balancing: b_e += rate * sign(mean(c) - c_e), with c counted since the last update over all ranks.

    Does nothing where no router has counted, which must then hold on every rank. Source: Wang et al. 2024, algorithm 1.

    Args:
        routers: one model's, in the same order on every rank.
        rate: gamma; with 0 the counts are thrown away.
    """
    counted: list[Any] = [router.counts for router in routers]
    for router in routers:
        router.counts = None
    if rate == 0 or all(counts is None for counts in counted):
        return
    biases = [router.e_score_correction_bias for router in routers]
    device = next(counts.device for counts in counted if counts is not None)
    total = torch.cat(
        [
            torch.zeros(bias.shape, dtype=torch.int64, device=device) if counts is None else counts.to(device)
            for bias, counts in zip(biases, counted, strict=True)
        ]
    )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    for bias, counts in zip(biases, total.split([len(bias) for bias in biases]), strict=True):
        # The sign of E * (mean - c_e), in whole numbers.
        bias += rate * (counts.sum() - len(bias) * counts).sign().to(bias)
