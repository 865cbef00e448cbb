"""Top-any routing: every token takes the experts that it wants, however many (DynMoE).

Shape letters: T tokens, H hidden size, E experts (slots, in use or not), G routing groups (sequences), S tokens of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router, largest, normalized


class Adaptation(NamedTuple):
    """What an update changed in one router.

    Attributes:
        removed: experts taken out of use.
        added: the slot put to use, which may be one just removed; None if there is none.
    """

    removed: list[int]
    added: int | None


class TopAnyRouter(Router):
    """Every expert whose similarity to the token is above the expert's own threshold.

    With s_e = sigmoid(cos(x, W_e)), an active expert has gate_e = 1 if s_e > sigmoid(G_e), else 0. The experts with
    gate 1 share the token equally. A token that no expert wants goes to the active expert of the largest s, with
    weight 1; with `fallback="none"` only in evaluation, and to no expert in training. The routing has a column per
    slot, best s first. Its logits are the cosines, its probabilities s over the active experts divided by its sum.
    Source: the top-any gating of Guo et al. 2024 (DynMoE), with its temperature at 1.

    A gate is a step; its gradient is taken to be that of s_e - sigmoid(G_e): for every active expert with
    `straight_through="all"`, for those with gate 1 with `"active"`, as the reference code has it. No expert is run for
    tokens with weight 0, so what a token's unwanted expert would have added is not known, and the only way from the
    output to its threshold is the division by the number of gates, which is differentiated for that reason. Slots out
    of use get no token and no gradient, but for that of the simplicity loss.

    Parameters `weight` [E, H] (W, orthonormal rows at first if E <= H) and `thresholds` [E] (G, zeros); buffer
    `active_experts` bool [E], the first `initial_experts` at first, which `adapt` changes.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    active_experts: Tensor

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.thresholds = nn.Parameter(torch.empty(self.num_experts))
        self.register_buffer("active_experts", torch.empty(self.num_experts, dtype=torch.bool))
        self.initial_experts = config.initial_experts or self.num_experts
        self.through_all = config.straight_through == "all"
        self.falls_back = {True: config.fallback == "best", False: True}
        #: Tokens per expert [E] and the sum of unwanted tokens' inputs [H] since recording began; None while it is off.
        #: No buffers: data parallelism would spread the first rank's over the others'.
        self.record: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthonormal rows, thresholds of zero, and the first experts in use."""
        init.orthogonal_(self.weight)
        init.zeros_(self.thresholds)
        slots = torch.arange(self.num_experts, device=self.active_experts.device)
        init.copy_(self.active_experts, slots < self.initial_experts)

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        cosine = losses.unit_rows(x) @ losses.unit_rows(self.weight.float()).t()
        # A sigmoid is positive, so slots out of use come last, and no threshold lets them in.
        score = cosine.sigmoid() * self.active_experts
        gates = self.gates(score)
        _, index = largest(score.detach(), self.num_experts)
        served = gates
        if self.falls_back[self.training]:
            unwanted = (gates.detach() == 0).all(-1, keepdim=True)
            served = served.scatter_add(1, index[:, :1], unwanted.to(gates.dtype))
        weight = served / served.sum(-1, keepdim=True).clamp(min=1)
        return Routing(
            cosine, normalized(score), index, weight.gather(1, index), token_mask, extras={"open_gates": gates}
        )

    def gates(self, score: Tensor) -> Tensor:
        """Gates of 0 and 1, with the straight-through gradient.

        Args:
            score: float32 [T, E], s, 0 at slots out of use.

        Returns:
            float32 [T, E].
        """
        threshold = self.thresholds.float().sigmoid()
        open_ = score > threshold
        margin = score - threshold
        through = self.active_experts if self.through_all else open_
        return open_ + (margin - margin.detach()) * through

    def observe(self, hidden_states: Tensor, routing: Routing) -> None:
        """While recording, count each expert's tokens and add up the inputs that no expert wants; no padding."""
        if self.record is None:
            return
        counts, unrouted_sum = self.record
        wants = routing.extras["open_gates"].detach() > 0
        real = routing.token_mask.reshape(-1, 1)
        unrouted = real & ~wants.any(-1, keepdim=True)
        inputs = hidden_states.detach().float().masked_fill(~unrouted, 0.0)
        self.record = counts + (wants & real).sum(0), unrouted_sum + inputs.sum(0)

    def start_recording(self) -> None:
        """Record from here on, anew."""
        experts, hidden = (
            torch.zeros(size, dtype=torch.float32, device=self.weight.device) for size in self.weight.shape
        )
        self.record = experts, hidden

    def stop_recording(self) -> tuple[Tensor, Tensor] | None:
        """Record no longer.

        Returns:
            Tokens per expert and sum of the unwanted tokens' inputs, float32 [E] and [H]; None if recording was off.
        """
        record, self.record = self.record, None
        return record

    @torch.no_grad()
    def adapt(self, counts: Tensor, unrouted_sum: Tensor, max_experts: int | None = None) -> Adaptation:
        """Take unused experts out of use, then put one slot to use for the tokens that no expert wants.

        Every active expert without a token leaves; if all would, the first of them stays. Then, if there were unwanted
        tokens, the first free slot comes into use: its row is their inputs' direction, its threshold 0, its expert as
        it was left. Guo et al. 2024, the adaptive process; one expert per update. A record of no token at all changes
        nothing.

        Args:
            counts: [E], tokens that wanted each expert.
            unrouted_sum: [H], sum of the unwanted tokens' inputs.
            max_experts: no slot is added at this number of active experts.
        """
        used, active = (counts > 0).tolist(), self.active_experts.tolist()
        norm = unrouted_sum.float().norm()
        wanted = bool(norm.isfinite() and norm > 0)
        if not any(used) and not wanted:
            return Adaptation([], None)
        slots = range(self.num_experts)
        kept = [e for e in slots if active[e] and used[e]] or [active.index(True)]
        removed = [e for e in slots if active[e] and e not in kept]
        free = [e for e in slots if e not in kept]
        added = free[0] if wanted and free and len(kept) < (max_experts or self.num_experts) else None
        if added is not None:
            self.weight[added] = (unrouted_sum.float() / norm).to(self.weight)
            self.thresholds[added] = 0.0
        in_use = torch.tensor([e in kept or e == added for e in slots])
        self.active_experts.copy_(in_use)
        return Adaptation(removed, added)

    def diversity_loss(self, routing: Routing) -> Tensor:
        return losses.diversity_loss(self.weight, self.active_experts)

    def simplicity_loss(self, routing: Routing) -> Tensor:
        return losses.simplicity_loss(self.weight)

    def top_any_balance_loss(self, routing: Routing) -> Tensor:
        return losses.top_any_balance_loss(routing.extras["open_gates"], routing.token_mask)

    def efficiency_loss(self, routing: Routing) -> Tensor:
        return losses.efficiency_loss(routing.extras["open_gates"], routing.token_mask)
