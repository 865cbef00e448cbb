"""A model with other experts than it has: without the slots that no token can reach, or with those that are asked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
    config: Any = model.config
    if config.router_type != "top_any":
        raise ValueError(f"router_type: must be 'top_any' to prune experts, got {config.router_type!r}")
    for name in ("capacity_factor", "eval_capacity_factor"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}: must be None to prune experts, whose capacity depends on their number, got "
                f"{getattr(config, name)}"
            )
    kept = [block.gate.active_experts.nonzero()[:, 0] for block in sparse_blocks(model)]
    choices = [min(k, len(slots)) for (_, k), slots in zip(config.layer_sizes, kept, strict=True)]
    return with_experts(model, kept, choices)


def with_experts(model: STMoEPreTrainedModel, slots: Sequence[Tensor], choices: Sequence[int]) -> Any:
    """A copy of a model whose experts and router rows are those of the given slots, which may repeat.

    Its config has the new `num_experts` and `num_experts_per_tok` (lists if layers differ), and `initial_experts=None`.

    Args:
        model: a mixture whose routers have one row per expert, if any; it is left as it is.
        slots: per sparse layer, int64: expert i of the copy is expert slots[i] of the model.
        choices: per sparse layer, K.

    Raises:
        ValueError: when the sizes break a rule of the config.
    """
    config: Any = copy.deepcopy(model.config)
    config.num_experts = _one_or_each([len(each) for each in slots])
    config.num_experts_per_tok = _one_or_each(list(choices))
    config.initial_experts = None
    with torch.device("meta"):
        other = type(model)(config)
    # Copied all at once, with the other parts in the places of the model's own.
    memo: dict[int, Any] = {id(model.config): config}
    for block, new, chosen in zip(sparse_blocks(model), sparse_blocks(other), slots, strict=True):
        _fill(new, block, chosen)
        memo |= {id(block.gate): new.gate, id(block.experts): new.experts}
    result = copy.deepcopy(model, memo)
    result.train(model.training)
    return result


def sparse_blocks(model: nn.Module) -> list[Any]:
    """The sparse blocks of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


def _one_or_each(values: list[int]) -> int | list[int]:
    """The value that all layers share, or the list."""
    return values[0] if len(set(values)) == 1 else values


def _fill(new: Any, block: Any, slots: Tensor) -> None:
    """Give a sparse block's router and experts the slots of another one's."""

    def take(target: nn.Module, source: nn.Module) -> None:
        for name, tensor in source.named_parameters(recurse=False):
            rows = tensor.detach()[slots.to(tensor.device)]
            setattr(target, name, nn.Parameter(rows, requires_grad=tensor.requires_grad))
        for name, buffer in source.named_buffers(recurse=False):
            setattr(target, name, buffer[slots.to(buffer.device)])

    take(new.gate, block.gate)
    if isinstance(block.experts, ModuleExperts):
        for number, slot in enumerate(slots.tolist()):
            new.experts[number] = copy.deepcopy(block.experts[slot])
        return
    take(new.experts, block.experts)
    for name, child in block.experts.named_children():
        setattr(new.experts, name, copy.deepcopy(child))
