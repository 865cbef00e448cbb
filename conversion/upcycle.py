"""Upcycling: a dense model becomes a mixture of experts that, with copied experts, computes the same function."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from st_moe.configuration import STMoEConfig
from st_moe.conversion.checkpoint import check_checkpoint
from st_moe.conversion.proof import IdentityProof, prove_identity
from st_moe.conversion.recipes import Recipe, check_recipe, read_ffn
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
        ValueError: when a field, the recipe or the dense model is at fault.
        RuntimeError: when the result should compute the dense function and does not.
    """
    chosen = check_recipe(recipe, recipe_options or {})
    if not router_std >= 0:
        raise ValueError(f"router_std: must not be negative, got {router_std!r}")
    owned = isinstance(dense, str | Path)
    model = load_dense(dense) if isinstance(dense, str | Path) else dense
    sparse_class = _sparse_class(model)
    config = STMoEConfig.from_dense(model.config, **mixture_fields)
    config._attn_implementation = model.config._attn_implementation
    locations = locate_ffns(model)
    _check_widths(config, locations, chosen, recipe)
    with torch.device("meta"):
        sparse = sparse_class(config)
    _take_over(sparse, model, share=owned)
    names = {id(module): name for name, module in sparse.named_modules()}
    blocks = [module for module in sparse.modules() if isinstance(module, SparseBlock)]
    for block, index in zip(blocks, config.sparse_layer_indices, strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        _fill_block(block, locations[index], chosen, recipe_options or {}, router_std, generator)
        logger.info(f"{names[id(block)]}: {locations[index].describe()}")
    sparse.config.dtype = model.config.dtype
    sparse.tie_weights()
    if model.can_generate():
        sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.eval()
    sparse.identity_proof = _verified(model, sparse, chosen, config) if verify else None
    return sparse


def load_dense(source: str | Path) -> PreTrainedModel:
    """Load a dense model in its own dtype, from safetensors only and without remote code.

    Raises:
        ValueError: when the folder or its files are not a dense checkpoint in safetensors.
    """
    check_checkpoint(source)
    config = AutoConfig.from_pretrained(source)
    if isinstance(config, STMoEConfig):
        raise ValueError(f"dense: must be a dense model, but {source} already is a mixture (model_type 'st_moe')")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"dense: must not be quantised, but the config of {source} has a quantization_config")
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(source, dtype="auto", use_safetensors=True, output_loading_info=True)
    model, found = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in found.get(fault) or ())
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            kind = fault.replace("_", " ")
            raise ValueError(f"dense: the tensors of {source} must be those of its config; {kind}: {shown}")
    return model


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


def _check_widths(config: STMoEConfig, locations: list[FFNLocation], recipe: Recipe, name: str) -> None:
    """Refuse what the recipes cannot do with these FFNs, before anything is built."""
    for index in config.sparse_layer_indices:
        ffn = locations[index]
        if ffn.storage == "none":
            raise ValueError(f"sparse_layers: {ffn.describe()}")
        if ffn.storage == "modules" and not recipe.keeps_function:
            raise ValueError(f"recipe: {name!r} needs FFNs that 3-D tensors can hold, but {ffn.reason}")
        if config.moe_intermediate_size not in (None, ffn.intermediate_size):
            raise ValueError(
                f"moe_intermediate_size: recipe {name!r} keeps the dense width, {ffn.intermediate_size} in layer "
                f"{index}, got {config.moe_intermediate_size}"
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


def _fill_block(
    block: SparseBlock,
    ffn: FFNLocation,
    recipe: Recipe,
    options: Mapping[str, Any],
    router_std: float,
    generator: torch.Generator,
) -> None:
    """Give one sparse block its weights: experts by the recipe, a random router, extra FFNs that add nothing."""
    like = next(ffn.module.parameters())
    router = torch.randn(block.gate.weight.shape, generator=generator) * router_std
    block.gate.weight = nn.Parameter(router.to(like))
    experts = block.experts
    if isinstance(experts, ModuleExperts):
        for number in range(len(experts)):
            experts[number] = copy.deepcopy(ffn.module)
    else:
        made = recipe.function(read_ffn(ffn), experts.num_experts, generator, **options)
        names = (experts.in_name, "down_proj", f"{experts.in_name}_bias", "down_proj_bias")
        for name, tensor in zip(names, made, strict=True):
            if tensor is not None:
                setattr(experts, name, nn.Parameter(tensor))
        if experts.multiplicative_bias is not None:
            experts.multiplicative_bias = nn.Parameter(like.new_ones(experts.multiplicative_bias.shape))
    for extra in (block.shared_experts, block.ffn_before, block.ffn_after):
        if extra is not None:
            _fill_extra(extra, like, block.gate.initializer_range, generator)


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


def _verified(
    dense: PreTrainedModel, sparse: STMoEPreTrainedModel, recipe: Recipe, config: STMoEConfig
) -> IdentityProof | None:
    """Measure how far the mixture is from the dense model, and print it.

    Raises:
        RuntimeError: when the mixture should compute the dense function and does not.
    """
    if dense.device.type == "meta" or isinstance(sparse, STMoEModel):
        return None
    proof = prove_identity(dense, sparse)
    print(proof)  # noqa: T201 -- the proof is part of what the caller asked for
    policy = config.second_expert_policy_eval == "all" or config.num_experts_per_tok == 1
    exact = recipe.keeps_function and config.norm_topk_prob and policy and config.eval_capacity_factor is None
    if exact and not proof.holds:
        raise RuntimeError(
            f"The mixture should compute the dense function and does not ({proof}). The FFN of "
            f"{type(dense).__name__} is not what its layout says; please report this family."
        )
    return proof
