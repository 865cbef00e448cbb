"""What every router is.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G routing groups (sequences), S tokens of one.
To add a router: one class below `Router`, one line in `st_moe.configuration.ROUTER_TYPES`, one test.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from st_moe.configuration import ROUTER_TYPES, STMoEConfig
from st_moe.modeling.routing import losses
from st_moe.modeling.routing.capacity import Capacity
from st_moe.modeling.routing.record import Routing

# Choices up to which picking one after the other is faster than sorting (`python -m benchmarks.routing`).
_FEW_ROUNDS = 8
# Rows that are searched at a time.
_PART = 1024


class Router(nn.Module):
    """Which experts each token goes to, and with which weights.

    A router writes `route`. It inherits capacity, the losses that follow from the record, and a linear layer `weight`
    [E, H] without bias whose product with the input `logits_of` computes in float32. A loss of its own is a method
    under the loss's name; the registry says which losses a router has.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers, for numbers of experts that differ between them.
    """

    #: Whether there is a linear layer; a router that learns nothing has none.
    has_weight: ClassVar[bool] = True

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.layer_sizes[sparse_layer]
        self.capacity = Capacity(config, self.num_experts)
        self.renormalize_after_drop = config.renormalize_after_drop
        self.balance = (config.balance_loss_scope, config.balance_loss_count, config.balance_loss_after_drop)
        # The two losses that everybody watches are computed whatever their coefficient.
        watched = ("balance_loss", "router_z_loss")
        self.loss_names = [name for name, c in config.loss_coefficients.items() if c > 0 or name in watched]
        self.initializer_range = config.initializer_range
        if self.has_weight:
            self.weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the router's rows from N(0, initializer_range)."""
        init.normal_(self.weight, mean=0.0, std=self.initializer_range)

    def forward(self, hidden_states: Tensor, token_mask: Tensor) -> Routing:
        """Route tokens.

        Args:
            hidden_states: [T, H]; read as float32, left as it is.
            token_mask: bool [G, S], True at real tokens; padding takes no slot of an expert's capacity.

        Returns:
            The routing of the T = G * S tokens.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.serve(self.route(hidden_states.float(), token_mask))

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        """Choose, before capacity.

        Args:
            x: float32 [T, H].
            token_mask: bool [G, S].
        """
        raise NotImplementedError

    def logits_of(self, x: Tensor) -> Tensor:
        """Router logits x W^T, float32 [T, H] -> [T, E]."""
        return nn.functional.linear(x, self.weight.float())

    def serve(self, routing: Routing) -> Routing:
        """Apply capacity: assignments that find no room get weight 0. `extras["gates"]` keeps the weights before."""
        weight, dropped = routing.weight, routing.dropped
        factor = self.capacity.factors[self.training]
        if factor is not None:
            asking = (weight != 0) & routing.token_mask.reshape(-1, 1)
            priority = routing.probabilities.amax(-1)
            kept = self.capacity.keep(routing.index, asking, routing.token_mask, priority, factor)
            weight, dropped = weight * kept, asking & ~kept
        if self.renormalize_after_drop:
            weight = normalized(weight)
        extras = {**routing.extras, "gates": routing.weight}
        return routing._replace(weight=weight, dropped=dropped, extras=extras)

    def mix(
        self, experts: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_states: Tensor, routing: Routing
    ) -> Tensor:
        """Output of the routed experts: the weighted sum over each token's choices.

        Args:
            experts: takes hidden states [T, H], indices [T, K] and weights [T, K].
            hidden_states: [T, H].
            routing: of these tokens.

        Returns:
            [T, H].
        """
        return experts(hidden_states, routing.index, routing.weight)

    def observe(self, hidden_states: Tensor, routing: Routing) -> None:
        """Take note of a training forward pass, for what changes between optimizer steps.

        Called once per micro-batch; the recomputation of activation checkpointing does not call it.
        """

    def losses(self, routing: Routing) -> dict[str, Tensor]:
        """The auxiliary losses of one layer's routing by name: float32 scalars, without coefficients."""
        return {name: getattr(self, name)(routing) for name in self.loss_names}

    def balance_loss(self, routing: Routing) -> Tensor:
        scope, count, after_drop = self.balance
        groups = routing.token_mask if scope == "sequence" else routing.token_mask.reshape(1, -1)
        choices = slice(None) if count == "all" else slice(1)
        counted = routing.weight[:, choices] != 0 if after_drop else None
        return losses.balance_loss(routing.probabilities, routing.index[:, choices], groups, counted)

    def router_z_loss(self, routing: Routing) -> Tensor:
        return losses.router_z_loss(routing.logits, routing.token_mask)

    def sequence_balance_loss(self, routing: Routing) -> Tensor:
        return losses.balance_loss(routing.probabilities, routing.index, routing.token_mask)

    def second_place_loss(self, routing: Routing) -> Tensor:
        return losses.second_place_loss(routing.probabilities, routing.index, routing.token_mask)

    def importance_loss(self, routing: Routing) -> Tensor:
        # Of the gates as chosen: what capacity leaves of them hides how uneven they are.
        return losses.importance_loss(routing.extras["gates"], routing.index, self.num_experts, routing.token_mask)


def normalized(weight: Tensor) -> Tensor:
    """Combine weights [T, K] divided by their sum; rows of zeros stay."""
    total = weight.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    # w / w is 1 with no gradient; dividing by a constant keeps the 1 and lets the router learn (Switch).
    return weight / (total.detach() if weight.shape[-1] == 1 else total)


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first; equal values in the order of their index on every device.

    Args:
        scores: float32 [..., n], with at least k values above minus infinity in each row.

    Returns:
        Values float32 [..., k], with the scores' gradient, and indices int64 [..., k].
    """
    rest = scores.detach()
    if k > _FEW_ROUNDS or 2 * k > scores.shape[-1]:
        # A stable sort keeps the order of equals; torch.topk leaves it to chance.
        index = rest.argsort(dim=-1, descending=True, stable=True)[..., :k]
    elif k == 1 or torch.compiler.is_compiling():
        index = _in_rounds(rest, k)
    else:
        # In parts that stay in the processor's cache.
        index = torch.cat([_in_rounds(part, k) for part in rest.split(_PART)])
    return scores.gather(-1, index), index


def _in_rounds(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, one after the other: max gives the first of equals, and a few rounds beat a sort."""
    rounds = [scores.max(dim=-1, keepdim=True).indices]
    rest = scores.clone() if k > 1 else scores
    for _ in range(1, k):
        rest.scatter_(-1, rounds[-1], -torch.inf)
        rounds.append(rest.max(dim=-1, keepdim=True).indices)
    return torch.cat(rounds, dim=-1)


def router_class(router_type: str) -> type[Router]:
    """The class that a `router_type` names in the registry."""
    module, _, name = ROUTER_TYPES[router_type].path.rpartition(".")
    return getattr(import_module(module), name)
