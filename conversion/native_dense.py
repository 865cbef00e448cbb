"""From a mixture back to the dense architecture: one FFN in the place of each layer's experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.configuration.configuration_st_moe import installed_version
from st_moe.conversion.native_files import config_of, destination_of, load_mixture, write_folder
from st_moe.modeling import locate_ffns
from st_moe.modeling.experts import ModuleExperts
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel
from st_moe.modeling.sparse_block import SparseBlock


def to_dense(model: STMoEPreTrainedModel, experts: str | int = "average") -> PreTrainedModel:
    """A dense model with one expert, or the mean of all, in the place of each sparse layer's FFN.

    For copies of one FFN both compute what the mixture does, if its combine weights sum to 1; for experts that differ
    the result is another function. Routers are left out.

    Args:
        model: a mixture; left as it is.
        experts: `"average"`, computed in float64, or the number of the expert to keep in every layer.

    Returns:
        A model of the dense class in evaluation mode and the mixture's dtype; tensors outside of experts are shared.

    Raises:
        ValueError: when the mixture has parts that a dense model has no place for, or there is no such expert.
    """
    config: Any = model.config
    _check(config, experts)
    dense_config: Any = model.dense_parent_config(config)
    width = config.moe_intermediate_size
    if width and len(config.sparse_layer_indices) == config.num_hidden_layers:
        dense_config.intermediate_size = width
    with init.no_init_weights():
        dense = model.dense_class(dense_config)  # type: ignore[misc]  # a family's class has one
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, SparseBlock)}
    inside = tuple(f"{name}." for name in blocks)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    missing, unexpected = dense.load_state_dict(rest, strict=False, assign=True)
    locations = locate_ffns(dense)
    filled: set[Any] = set()
    for block, index in zip(blocks.values(), config.sparse_layer_indices, strict=True):
        filled |= _fill_ffn(locations[index], block, experts)
    names = {name for name, parameter in dense.named_parameters() if parameter in filled}
    left = sorted({*unexpected, *(set(missing) - names)})
    if left:
        raise ValueError(f"weights: every tensor must have its place in the dense model, but {', '.join(left[:5])}")
    dense.tie_weights()
    dense.config.dtype = config.dtype
    if dense.can_generate():
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.eval()


def export_dense(
    model: str | Path | Any, destination: str | Path, *, experts: str | int = "average", overwrite: bool = False
) -> None:
    """Write the dense model of `to_dense` as a folder, with all that travels with the source.

    Args:
        model: a mixture, its folder, or its name on the Hub.
        destination: the folder to write; must not exist, unless `overwrite`.
        experts: as for `to_dense`.
        overwrite: whether an existing destination is replaced, once the new folder is complete.

    Raises:
        ValueError: as `to_dense`; nothing is written then.
    """
    source = model if isinstance(model, str | Path) else None
    place = destination_of(destination, source, overwrite)
    config = config_of(model)
    _check(config, experts)
    dense = to_dense(load_mixture(model), experts)
    what = "the mean of all experts" if experts == "average" else f"expert {experts}"
    card = (
        f"Dense {config.dense_model_type} with {what} of each layer of a mixture, written by st_moe "
        f"{installed_version()} and transformers {transformers.__version__}."
    )
    write_folder(dense, place, source, card)


def _check(config: STMoEConfig, experts: str | int) -> None:
    """Refuse what a dense model has no place for, and experts that are not there."""
    for name in ("num_shared_experts", "ffn_before", "ffn_after"):
        if getattr(config, name):
            raise ValueError(
                f"{name}: must be {type(getattr(config, name))()} for a dense model, which has one FFN per "
                f"layer, got {getattr(config, name)}"
            )
    fewest = min(number for number, _ in config.layer_sizes)
    number = isinstance(experts, int) and not isinstance(experts, bool)
    if experts != "average" and not (number and 0 <= int(experts) < fewest):
        raise ValueError(f"experts: must be 'average' or a number from 0 to {fewest - 1}, got {experts!r}")


def _one(stacked: Tensor, experts: str | int) -> Tensor:
    """One of stacked tensors [E, ...], or their mean, which float64 keeps exact for copies."""
    if isinstance(experts, int):
        return stacked[experts].detach().clone()
    return stacked.detach().double().mean(dim=0).to(stacked.dtype)


def _fill_ffn(ffn: FFNLocation, block: SparseBlock, experts: str | int) -> set[Any]:
    """Give a dense FFN its weights; returns the parameters that it has now."""
    if isinstance(block.experts, ModuleExperts):
        states = [dict(expert.named_parameters()) for expert in block.experts]
        for name, parameter in ffn.module.named_parameters():
            parameter.data = _one(torch.stack([state[name] for state in states]), experts)
        return set(ffn.module.parameters())
    w_in, w_out, b_in, b_out, scale = block.experts.parameters_of_all()
    if ffn.intermediate_size != block.experts.intermediate_size:
        raise ValueError(
            f"moe_intermediate_size: must be that of the dense FFN, {ffn.intermediate_size} in layer {ffn.layer}, got "
            f"{block.experts.intermediate_size}"
        )
    *first, last = ffn.linears()
    # A scale of the hidden activation is one of the columns of the projection behind it.
    w_out = w_out if scale is None else w_out * scale[:, None, :]
    weights = [*_one(w_in, experts).chunk(len(first)), _one(w_out, experts)]
    biases = [] if b_in is None or b_out is None else [*_one(b_in, experts).chunk(len(first)), _one(b_out, experts)]
    for linear, weight in zip((*first, last), weights, strict=True):
        linear.weight.data = (weight.t() if ffn.conv1d else weight).contiguous()
    for linear, bias in zip((*first, last) if biases else (), biases, strict=True):
        linear.bias.data = bias.contiguous()
    return {parameter for linear in (*first, last) for parameter in linear.parameters()}
