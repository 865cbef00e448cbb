"""Routers that learn nothing: by a hash of the token or its position, and in turn.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G routing groups (sequences), S tokens of one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from st_moe.configuration import STMoEConfig
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router
from st_moe.modeling.routing.scope import active_scope


class FixedRouter(Router):
    """A router without parameters: choice k of a token is the k-th expert after its first one, modulo E; weights 1/K.

    The logits are zeros. The probabilities are the weights themselves, spread over the E experts: the router is as
    certain as its choices are few, and the mean probability of an expert is its load.

    Args:
        config: the mixture's fields.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    has_weight: ClassVar[bool] = False

    def reset_parameters(self) -> None:
        """There are none."""

    def route(self, x: Tensor, token_mask: Tensor) -> Routing:
        first = self.first_choice(token_mask).reshape(-1, 1)
        index = (first + torch.arange(self.top_k, device=x.device)) % self.num_experts
        logits = x.new_zeros(x.shape[0], self.num_experts)
        weight = x.new_full(index.shape, 1 / self.top_k)
        return Routing(logits, logits.scatter(1, index, weight), index, weight, token_mask)

    def first_choice(self, token_mask: Tensor) -> Tensor:
        """A number whose remainder modulo E is the first choice: int64 [G, S], not negative.

        Args:
            token_mask: bool [G, S].
        """
        raise NotImplementedError


class HashRouter(FixedRouter):
    """Experts by a fixed hash of the token's id or position, equal on every machine. Source: Roller et al. 2021.

    Any E consecutive numbers that start at a multiple of E are spread over all E experts, turned by a pseudo-random
    amount per run of E and per layer. So a range of numbers loads the experts evenly up to two, and tokens that share
    their experts in one layer share them in another by chance alone. How often each id occurs is the data's affair.

    Args:
        config: the mixture's fields; `hash_by` says what decides.
        hidden_size: H.
        sparse_layer: position among the sparse layers.
    """

    def __init__(self, config: STMoEConfig, hidden_size: int, sparse_layer: int = 0) -> None:
        super().__init__(config, hidden_size, sparse_layer)
        self.by_token = config.hash_by == "token"
        self.sparse_layer = sparse_layer

    def first_choice(self, token_mask: Tensor) -> Tensor:
        numbers = _token_ids(token_mask) if self.by_token else _positions(token_mask)
        return numbers + _mixed(numbers // self.num_experts + self.sparse_layer * 0x9E3779B1)


class UniformRouter(FixedRouter):
    """Forced balance, for benchmarks and debugging: choice k of the token at position t goes to (t * K + k) mod E.

    What a token says plays no part. A sequence loads the experts evenly up to one assignment; sequences decoded one
    token at a time in step all use the same K experts.
    """

    def first_choice(self, token_mask: Tensor) -> Tensor:
        return _positions(token_mask) * self.top_k


def _mixed(numbers: Tensor) -> Tensor:
    """Pseudo-random numbers below 2^32 from int64 ones: the same for the same 32 low bits."""
    numbers = numbers & 0xFFFFFFFF
    for _ in range(2):
        # The factor has 27 bits: 32 bits times it stay within 63.
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)


def _token_ids(token_mask: Tensor) -> Tensor:
    """Token ids of the model's forward under way, int64 [G, S].

    Raises:
        ValueError: outside of a model's forward, and where it is fed embeddings.
    """
    scope = active_scope()
    ids = None if scope is None else scope.token_ids
    if ids is None or ids.shape != token_mask.shape:
        got = "a call outside of a model's forward" if scope is None else "none for these tokens"
        raise ValueError(
            "hash_by: 'token' needs the token ids, so call the model with input_ids, not with inputs_embeds, or set "
            f"hash_by='position'; got {got}"
        )
    return ids.to(token_mask.device)


def _positions(token_mask: Tensor) -> Tensor:
    """Place of each token in its sequence, int64 [G, S]; outside of a model's forward, its place among the real ones.

    Raises:
        ValueError: inside of a model's forward that says nothing of these tokens' positions.
    """
    scope = active_scope()
    if scope is None:
        return (token_mask.long().cumsum(-1) - 1).clamp(min=0)
    if scope.positions is None or scope.positions.shape != token_mask.shape:
        raise ValueError(
            "router_type: 'hash' by position and 'uniform' need one position per token of the model's forward, got "
            f"{None if scope.positions is None else tuple(scope.positions.shape)} for tokens {tuple(token_mask.shape)}"
        )
    return scope.positions.to(token_mask.device)
