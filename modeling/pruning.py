"""A smaller model without the slots that no token can reach."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from st_moe.modeling.experts import ModuleExperts
from st_moe.modeling.sparse_block import SparseBlock

if TYPE_CHECKING:
    from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel


def pruned(model: STMoEPreTrainedModel) -> Any:
    """A copy of a model whose sparse layers hold their active experts only, and whose outputs are the same.

    Its config has the new `num_experts` (a list if layers differ), `num_experts_per_tok` no larger than that, and
    `initial_experts=None`. Without inactive experts it is an equal copy.

    Args:
        model: a mixture with `"top_any"` routers; it is left as it is.

    Raises:
        ValueError: when its routers have no inactive experts by their nature, or capacity would change with their
            number.
    """
    config: Any = copy.deepcopy(model.config)
    if config.router_type != "top_any":
        raise ValueError(f"router_type: must be 'top_any' to prune experts, got {config.router_type!r}")
    for name in ("capacity_factor", "eval_capacity_factor"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}: must be None to prune experts, whose capacity depends on their number, got "
                f"{getattr(config, name)}"
            )
    blocks = _sparse_blocks(model)
    kept = [block.gate.active_experts.nonzero()[:, 0] for block in blocks]
    experts = [len(slots) for slots in kept]
    choices = [min(k, e) for (_, k), e in zip(config.layer_sizes, experts, strict=True)]
    config.num_experts, config.num_experts_per_tok = _one_or_each(experts), _one_or_each(choices)
    config.initial_experts = None
    with torch.device("meta"):
        small = type(model)(config)
    # Copied all at once, with the smaller parts in the places of the large ones.
    memo: dict[int, Any] = {id(model.config): config}
    for block, smaller, slots in zip(blocks, _sparse_blocks(small), kept, strict=True):
        _fill(smaller, block, slots)
        memo |= {id(block.gate): smaller.gate, id(block.experts): smaller.experts}
    result = copy.deepcopy(model, memo)
    result.train(model.training)
    return result


def _sparse_blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


def _one_or_each(values: list[int]) -> int | list[int]:
    """The value that all layers share, or the list."""
    return values[0] if len(set(values)) == 1 else values


def _fill(smaller: Any, block: Any, slots: Tensor) -> None:
    """Give a sparse block's router and experts the slots of a larger one's."""

    def take(target: nn.Module, source: nn.Module) -> None:
        for name, tensor in source.named_parameters(recurse=False):
            rows = tensor.detach()[slots.to(tensor.device)]
            setattr(target, name, nn.Parameter(rows, requires_grad=tensor.requires_grad))
        for name, buffer in source.named_buffers(recurse=False):
            setattr(target, name, buffer[slots.to(buffer.device)])

    take(smaller.gate, block.gate)
    if isinstance(block.experts, ModuleExperts):
        for number, slot in enumerate(slots.tolist()):
            smaller.experts[number] = copy.deepcopy(block.experts[slot])
        return
    take(smaller.experts, block.experts)
    for name, child in block.experts.named_children():
        setattr(smaller.experts, name, copy.deepcopy(child))
