"""Upcycling: a dense model becomes a mixture of experts that, with copied experts, computes the same function."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from st_moe.configuration import STMoEConfig
from st_moe.conversion.checkpoint import check_checkpoint, dense_config
from st_moe.conversion.proof import IdentityProof, prove_identity
from st_moe.conversion.recipes import RECIPES, FFNTensors, Recipe, read_ffn, try_recipe
from st_moe.modeling import (
    STMoEForCausalLM,
    STMoEForSequenceClassification,
    STMoEModel,
    family_of,
    locate_ffns,
)
from st_moe.modeling.experts import ModuleExperts
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel
from st_moe.modeling.routing import Router
from st_moe.modeling.sparse_block import DenseFFN, SparseBlock

logger = logging.get_logger(__name__)


def upcycle(
    dense: PreTrainedModel | str | Path,
    *,
    recipe: str = "copy",
    recipe_options: Mapping[str, Any] | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    verify: bool = True,
    **mixture_fields: Any,
) -> STMoEPreTrainedModel:
    """Turn a dense model into a sparse mixture of experts.

    With the recipe `"copy"` the mixture computes the dense function, which is measured on random tokens and printed;
    the proof stays on the result as `identity_proof`. Dtype, tied embeddings and the generation config are kept.

    Args:
        dense: a dense Transformers model (left as it is), a local folder, or the name of a model on the Hub.
        recipe: how experts are made from the dense FFN, a key of `st_moe.conversion.RECIPES`.
        recipe_options: the recipe's own options, such as `{"ratio": 0.5}` for `"drop"`.
        router_std: standard deviation of the routers' initial weights.
        seed: of everything random.
        verify: whether to run both models and compare them.
        mixture_fields: fields of `STMoEConfig`, such as `num_experts` and `num_experts_per_tok`.

    Returns:
        The mixture in evaluation mode, of the class that matches the dense model's head.

    Raises:
        ValueError: when a field, the recipe or the dense model is at fault; weights that are NaN or infinite are
            one when they spoil the comparison.
        RuntimeError: when the result should compute the dense function and does not.
    """
    chosen = try_recipe(recipe, recipe_options or {})
    if not router_std >= 0:
        raise ValueError(f"router_std: must not be negative, got {router_std!r}")
    owned = isinstance(dense, str | Path)
    model = load_dense(dense) if isinstance(dense, str | Path) else dense
    sparse_class = _sparse_class(model)
    locations = locate_ffns(model)
    config = mixture_config_of(model.config, locations, recipe, recipe_options or {}, mixture_fields)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        sparse = sparse_class(config)
    _take_over(sparse, model, share=owned)
    names = {id(module): name for name, module in sparse.named_modules()}
    blocks = [module for module in sparse.modules() if isinstance(module, SparseBlock)]
    for block, index in zip(blocks, config.sparse_layer_indices, strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        ffn = locations[index]
        if isinstance(block.experts, ModuleExperts):
            for number in range(len(block.experts)):
                block.experts[number] = copy.deepcopy(ffn.module)
            _fill_router(block.gate, next(ffn.module.parameters()), router_std, generator)
        else:
            fill_block(block, [read_ffn(ffn)], chosen, recipe_options or {}, router_std, generator)
        logger.info(f"{names[id(block)]}: {locations[index].describe()}")
    sparse.config.dtype = model.config.dtype
    sparse.tie_weights()
    if model.can_generate():
        sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.eval()
    exact = chosen.keeps_function(recipe_options or {}, config)
    sparse.identity_proof = _verified(model, sparse, exact) if verify else None
    return sparse


def load_dense(source: str | Path) -> PreTrainedModel:
    """Load a dense model in its own dtype, from safetensors only and without remote code.

    Raises:
        ValueError: when the folder or its files are not a dense checkpoint in safetensors.
    """
    check_checkpoint(source)
    classifier = any(name.endswith("ForSequenceClassification") for name in dense_config(source).architectures or ())
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(source, dtype="auto", use_safetensors=True, output_loading_info=True)
    model, found = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in found.get(fault) or ())
        if names:
            kind = fault.replace("_", " ")
            raise ValueError(f"dense: the tensors of {source} must be those of its config; {kind}: {_shown(names)}")
    return model


def _shown(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sparse_class(dense: PreTrainedModel) -> type[STMoEPreTrainedModel]:
    """The family's class that derives from the dense model's own class."""
    if isinstance(dense, STMoEPreTrainedModel):
        raise ValueError("dense: must be a dense model, got a mixture")
    if not isinstance(dense, PreTrainedModel):
        raise ValueError(f"dense: must be a Transformers model, a folder or a Hub name, got {type(dense).__name__}")
    if getattr(dense, "hf_quantizer", None) is not None:
        raise ValueError("dense: must not be quantised; load it without quantization_config and quantise the mixture")
    family = family_of(dense.config.model_type)
    for public in (STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel):
        found = getattr(family, public.__name__, None)
        if found is not None and found.dense_class is type(dense):
            return found
    raise ValueError(
        f"dense: must be a base model, causal language model or sequence classifier of {family.dense_model_type!r}, "
        f"got {type(dense).__name__}"
    )


def mixture_config_of(
    dense_config: PreTrainedConfig,
    locations: Sequence[FFNLocation],
    recipe: str,
    options: Mapping[str, Any],
    mixture_fields: Mapping[str, Any],
) -> STMoEConfig:
    """Config of the mixture that a recipe makes of a dense model: the fields given, and those that follow.

    Args:
        dense_config: the dense model's.
        locations: where the dense model keeps its FFNs, one per layer.
        recipe, options: a key of `RECIPES` and its options.
        mixture_fields: the fields that the caller gives.

    Raises:
        ValueError: when a field is at fault, or the recipe can do nothing with these FFNs.
    """
    config = STMoEConfig.from_dense(dense_config, **mixture_fields)
    chosen = RECIPES[recipe]
    derived: dict[str, Any] = {}
    for index in config.sparse_layer_indices:
        ffn = locations[index]
        if ffn.storage == "none":
            raise ValueError(f"sparse_layers: {ffn.describe()}")
        if ffn.storage == "modules" and recipe != "copy":
            raise ValueError(f"recipe: {recipe!r} needs FFNs that 3-D tensors can hold, but {ffn.reason}")
        follows = {"moe_intermediate_size": None}
        if ffn.storage == "tensors":
            follows |= chosen.fields(options, mixture_fields, ffn.intermediate_size)
        for name, value in follows.items():
            if name == "moe_intermediate_size" and value is None:
                _check_width(config, ffn, recipe)
            elif derived.setdefault(name, value) != value:
                raise ValueError(
                    f"{name}: recipe {recipe!r} needs {value} in layer {index} and {derived[name]} in others; choose "
                    "sparse_layers of one width"
                )
            elif name in mixture_fields and mixture_fields[name] not in (None, value):
                raise ValueError(f"{name}: recipe {recipe!r} makes it {value}, got {mixture_fields[name]!r}")
    return STMoEConfig.from_dense(dense_config, **{**mixture_fields, **derived}) if derived else config


def _check_width(config: STMoEConfig, ffn: FFNLocation, recipe: str) -> None:
    """Refuse another width than the dense one where the recipe keeps that."""
    if config.moe_intermediate_size not in (None, ffn.intermediate_size):
        raise ValueError(
            f"moe_intermediate_size: recipe {recipe!r} keeps the dense width, {ffn.intermediate_size} in layer "
            f"{ffn.layer}, got {config.moe_intermediate_size}"
        )


def _take_over(sparse: nn.Module, dense: nn.Module, share: bool) -> None:
    """Give the mixture every tensor of the dense model outside of the sparse FFNs: shared, or copied once each."""
    taken: dict[int, torch.Tensor] = {}

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in taken:
            fresh = tensor.detach() if share else tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            taken[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if is_parameter else fresh
        return taken[id(tensor)]

    inside = tuple(f"{name}." for name, module in sparse.named_modules() if isinstance(module, SparseBlock))
    for name, module in sparse.named_modules():
        if f"{name}.".startswith(inside):
            continue
        source = dense.get_submodule(name) if name else dense
        for store, origin in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            for key, value in store.items():
                if value is not None:
                    store[key] = take(origin[key])  # type: ignore[arg-type]


def fill_block(
    block: SparseBlock,
    sources: Sequence[FFNTensors],
    recipe: Recipe,
    options: Mapping[str, Any],
    router_std: float,
    generator: torch.Generator,
) -> None:
    """Give one sparse block its weights: experts by the recipe, a random router, extra FFNs that add nothing.

    Args:
        block: with experts as 3-D tensors, on the meta device or with memory.
        sources: the FFN that it replaces, of each source model; their dtype and device are the block's.
        recipe, options: how experts are made.
        router_std: standard deviation of the router's weights.
        generator: of this layer.
    """
    like = sources[0].w_in
    experts = block.experts
    _fill_router(block.gate, like, router_std, generator)
    for extra in (block.shared_experts, block.ffn_before, block.ffn_after):
        if extra is not None:
            _fill_extra(extra, like, block.initializer_range, generator)
    if block.shared_expert_gate is not None:
        gate = torch.randn(block.shared_expert_gate.weight.shape, generator=generator) * block.initializer_range
        block.shared_expert_gate.weight = nn.Parameter(gate.to(like))
    # The recipe draws last: streaming makes all the rest of a block apart from the experts.
    made = recipe.make(sources, experts.num_experts, block.gate.top_k, generator, options)
    names = (experts.in_name, "down_proj", f"{experts.in_name}_bias", "down_proj_bias")
    for name, tensor in zip(names, made.experts, strict=True):
        if tensor is not None:
            setattr(experts, name, nn.Parameter(tensor))
    if experts.multiplicative_bias is not None:
        experts.multiplicative_bias = nn.Parameter(like.new_ones(experts.multiplicative_bias.shape))
    if made.router is not None:
        _share_rows(block.gate, made.router)
    if block.shared_experts is not None and made.shared is not None:
        _fill_shared(block.shared_experts, made.shared)


@torch.no_grad()
def _share_rows(router: Router, rows: torch.Tensor) -> None:
    """Give each expert the router row of that number, in every parameter that has one row per expert."""
    for parameter in router.parameters(recurse=False):
        parameter.copy_(parameter[rows.to(parameter.device)])


def _fill_shared(ffn: DenseFFN, tensors: FFNTensors) -> None:
    """Give the shared FFN its weights."""
    linears = [linear for linear in (ffn.gate_proj, ffn.up_proj) if linear is not None]
    for name, inner, outer in (("weight", tensors.w_in, tensors.w_out), ("bias", tensors.b_in, tensors.b_out)):
        if inner is None or outer is None:
            continue
        pieces = (*inner.chunk(len(linears)), outer)
        for linear, piece in zip((*linears, ffn.down_proj), pieces, strict=True):
            setattr(linear, name, nn.Parameter(piece.clone()))


def _fill_router(router: Router, like: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Initialise a router by its own rule, with weights of this standard deviation where it draws any."""
    router.to_empty(device="cpu")
    router.initializer_range = std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        router.reset_parameters()
    router.to(device=like.device, dtype=like.dtype)


def _fill_extra(ffn: DenseFFN, like: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Random input projections, ones in the norm, and zeros in the output projection."""
    ffn.to_empty(device=like.device).to(like.dtype)
    for name, parameter in ffn.named_parameters():
        with torch.no_grad():
            if name.startswith("norm"):
                parameter.fill_(1.0)
            elif name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.zero_()
    ffn.reset_parameters()


def _verified(dense: PreTrainedModel, sparse: STMoEPreTrainedModel, exact: bool) -> IdentityProof | None:
    """Measure how far the mixture is from the dense model, and print it.

    Raises:
        ValueError: when weights of the dense model that are NaN or infinite spoil the comparison.
        RuntimeError: when the mixture should compute the dense function and does not.
    """
    if dense.device.type == "meta" or isinstance(sparse, STMoEModel):
        return None
    proof = prove_identity(dense, sparse)
    # Every weight is looked at only when there is a fault to explain, for that takes a pass over the whole model.
    if not proof.holds and (exact or not math.isfinite(proof.max_relative_difference)):
        _check_finite(dense)
    print(proof)  # noqa: T201 -- the proof is part of what the caller asked for
    if exact and not proof.holds:
        raise RuntimeError(
            f"The mixture should compute the dense function and does not ({proof}). The FFN of "
            f"{type(dense).__name__} is not what its layout says; please report this family."
        )
    return proof


def _check_finite(dense: PreTrainedModel) -> None:
    """Refuse a dense model with weights that are NaN or infinite.

    Raises:
        ValueError: naming the tensors and what to do.
    """
    parameters = dict(dense.named_parameters())
    names = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
    if names:
        raise ValueError(
            f"dense: every weight must be finite, but {len(names)} of {len(parameters)} tensors hold NaN or infinity: "
            f"{_shown(names)}; take a checkpoint from before they were spoilt, or save it anew in a wider dtype"
        )
