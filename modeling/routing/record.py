"""The routing record: what a router hands to the experts, the losses and the reports.

Shape letters: T tokens, E experts, K choices per token, G routing groups (sequences), S tokens of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Where each token goes.

    An assignment that is dropped or absent is a valid expert index with weight 0, never a sentinel. A router with a
    varying number of choices has K = the most there can be.

    Attributes:
        logits: float32 [T, E], raw router logits, free of noise.
        probabilities: float32 [T, E], what balance is measured on; each row sums to 1. For softmax routers the softmax
            of the logits that chose, noise included.
        index: int64 [T, K], expert of each choice, best first.
        weight: float32 [T, K], combine weight of each choice.
        dropped: bool [T, K], True where capacity refused an assignment; None when nothing can be dropped.
        token_mask: bool [G, S] with G * S = T, True at real tokens.
        extras: tensors that the router's own losses and its way of mixing read.
    """

    logits: Tensor
    probabilities: Tensor
    index: Tensor  # type: ignore[assignment]  # the contract's word; nobody looks for a field's position
    weight: Tensor
    token_mask: Tensor
    dropped: Tensor | None = None
    extras: Mapping[str, Tensor] = MappingProxyType({})
