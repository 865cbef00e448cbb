"""Upcycling: a dense model becomes a mixture of experts that, with copied experts, computes the same function."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from st_moe.configuration import STMoEConfig, auto_class_of, dense_config_of
from st_moe.conversion.checkpoint import check_checkpoint, dense_config
from st_moe.conversion.merge import check_compatible, merged
from st_moe.conversion.proof import IdentityProof, proof_tokens, prove_identity
from st_moe.conversion.recipes import RECIPES, FFNTensors, Pieces, Recipe, read_ffn, try_recipe
from st_moe.conversion.router_init import (
    RouterStart,
    Text,
    check_router_init,
    check_rows,
    inputs_of_ffns,
    start_router,
)
from st_moe.modeling import STMoEModel, family_of, locate_ffns
from st_moe.modeling.experts import ModuleExperts
from st_moe.modeling.families import KINDS
from st_moe.modeling.ffn import FFNLocation, check_sparse_layers
from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel
from st_moe.modeling.routing import Router
from st_moe.modeling.sparse_block import DenseFFN, SparseBlock

logger = logging.get_logger(__name__)

#: A dense model, a local folder, or the name of a model on the Hub.
DenseSource = PreTrainedModel | str | Path

_SHARED_GATE = "shared_expert_gate"


def upcycle(
    dense: DenseSource | Sequence[DenseSource],
    *,
    recipe: str = "copy",
    recipe_options: Mapping[str, Any] | None = None,
    router_std: float = 0.02,
    router_init: str = "normal",
    router_options: Mapping[str, Any] | None = None,
    router_texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    verify: bool = True,
    proof_inputs: Text | None = None,
    require_identity: float | None = None,
    **mixture_fields: Any,
) -> STMoEPreTrainedModel:
    """Turn a dense model into a sparse mixture of experts.

    With the recipe `"copy"` the mixture computes the dense function. How far any recipe moves it is measured and
    printed; the proof stays on the result as `identity_proof`. Dtype, tied embeddings and the generation config are
    kept.

    Args:
        dense: a dense Transformers model (left as it is), a local folder, or the name of a model on the Hub; for the
            recipe `"merge"` a list of them, of which the first one's config is kept and the proof compares with.
        recipe: how experts are made from the dense FFN, a key of `st_moe.conversion.RECIPES`.
        recipe_options: the recipe's own options, such as `{"ratio": 0.5}` for `"drop"`.
        router_std: standard deviation of the routers' initial weights, where they draw any.
        router_init, router_options, router_texts: how the routers start, see `initialise_routers`; `"normal"` without
            options leaves them to their own rule. Text is run through the dense model, of several the first.
        tokenizer: for texts.
        seed: of everything random.
        verify: whether to run both models and compare them.
        proof_inputs: text or token ids [B, S] to compare them on; None takes a text of this package in the tokens of
            the folder or name `dense`, and random ids where that is none or has no tokenizer.
        require_identity: largest relative logit difference that is accepted; None accepts any where none is promised.
        mixture_fields: fields of `STMoEConfig`, such as `num_experts` and `num_experts_per_tok`.

    Returns:
        The mixture in evaluation mode, of the class that matches the dense model's head.

    Raises:
        ValueError: when a field, the recipe or the dense model is at fault; weights that are NaN or infinite are
            one when they spoil the comparison.
        RuntimeError: when the result should compute the dense function and does not, or is further from it than
            `require_identity`.
    """
    options = recipe_options or {}
    chosen = try_recipe(recipe, options)
    check_router_init(router_init, router_options or {}, router_texts)
    if not router_std >= 0:
        raise ValueError(f"router_std: must not be negative, got {router_std!r}")
    if require_identity is not None and not (verify and require_identity >= 0):
        raise ValueError(
            f"require_identity: must not be negative, and needs verify=True, got {require_identity!r} and {verify}"
        )
    models, owned = _loaded(dense, recipe)
    model = models[0]
    model_class = sparse_class(model)
    locations = locate_ffns(model)
    own = dense_config_of(model.config, type(model).__name__)
    config = mixture_config_of(own, locations, recipe, options, mixture_fields)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        sparse = model_class(config)
    for each in models:
        _check_ties(each, sparse)
    _take_over(sparse, models, options.get("rest", "average"), share=owned and len(models) == 1)
    start = RouterStart(router_init, router_options or {}, router_texts, tokenizer)
    _fill_blocks(sparse, models, chosen, options, router_std, seed, start)
    sparse.config.dtype = model.config.dtype
    sparse.tie_weights()
    if model.can_generate():
        sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.eval()
    if verify:
        exact = chosen.keeps_function(options, config)
        if proof_inputs is None and isinstance(dense, str | Path):
            proof_inputs = proof_tokens(dense, model)
        sparse.identity_proof = _verified(model, sparse, exact, proof_inputs, tokenizer, require_identity)
    return sparse


def _loaded(dense: DenseSource | Sequence[DenseSource], recipe: str) -> tuple[list[PreTrainedModel], bool]:
    """The dense models, and whether they were loaded here.

    Raises:
        ValueError: when a recipe for one model gets several, or models are no models of one architecture.
    """
    sources = list(dense) if isinstance(dense, list | tuple) else [dense]
    if not sources or (len(sources) > 1 and recipe != "merge"):
        raise ValueError(f"dense: must be one model with recipe {recipe!r}, got {len(sources)}; 'merge' takes several")
    models: list[Any] = [load_dense(one) if isinstance(one, str | Path) else one for one in sources]
    if len(models) > 1:
        for model in models:
            sparse_class(model)
        shapes = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in models]
        check_compatible([model.config for model in models], shapes)
    return models, isinstance(sources[0], str | Path)


def _fill_blocks(
    sparse: STMoEPreTrainedModel,
    models: Sequence[PreTrainedModel],
    recipe: Recipe,
    options: Mapping[str, Any],
    router_std: float,
    seed: int,
    start: RouterStart,
) -> None:
    """Give every sparse block its weights; routers that start from text see what the first model's FFNs see."""
    config: Any = sparse.config
    located = [locate_ffns(model) for model in models]
    blocks = [(name, module) for name, module in sparse.named_modules() if isinstance(module, SparseBlock)]
    if not start.is_own_rule:
        for _, block in blocks:
            check_rows(block.gate, start.init)
    places = [located[0][index] for index in config.sparse_layer_indices]
    seen = inputs_of_ffns(models[0], places, start.texts or (), start.tokenizer)
    for (name, block), index, inputs in zip(blocks, config.sparse_layer_indices, seen, strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        ffns = [locations[index] for locations in located]
        if isinstance(block.experts, ModuleExperts):
            for number in range(len(block.experts)):
                block.experts[number] = copy.deepcopy(ffns[0].module)
            fill_router(block.gate, next(ffns[0].module.parameters()), router_std, generator)
        else:
            fill_block(block, [read_ffn(ffn) for ffn in ffns], recipe, options, router_std, generator)
        if not start.is_own_rule:
            rows = recipe.router_rows(options, block.gate.num_experts)
            start_router(block.gate, start.init, inputs, rows, seed, index, start.options)
        logger.info(f"{name}: {ffns[0].describe()}")


def load_dense(source: str | Path, **placement: Any) -> PreTrainedModel:
    """Load a dense model in its own dtype, from safetensors only and without remote code.

    Args:
        source: folder, or name on the Hub.
        placement: `device_map` and `offload_folder`, as for `from_pretrained`.

    Raises:
        ValueError: when the folder or its files are not a dense checkpoint in safetensors.
    """
    check_checkpoint(source)
    auto = auto_class_of(dense_config(source))
    loaded: Any = auto.from_pretrained(
        source, dtype="auto", use_safetensors=True, output_loading_info=True, **placement
    )
    model, found = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in found.get(fault) or ())
        if names:
            kind = fault.replace("_", " ")
            raise ValueError(f"dense: the tensors of {source} must be those of its config; {kind}: {shown(names)}")
    return model


def shown(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def sparse_class(dense: PreTrainedModel) -> type[STMoEPreTrainedModel]:
    """The family's class that derives from the dense model's own class."""
    if isinstance(dense, STMoEPreTrainedModel):
        raise ValueError("dense: must be a dense model, got a mixture")
    if not isinstance(dense, PreTrainedModel):
        raise ValueError(f"dense: must be a Transformers model, a folder or a Hub name, got {type(dense).__name__}")
    if getattr(dense, "hf_quantizer", None) is not None:
        raise ValueError("dense: must not be quantised; load it without quantization_config and quantise the mixture")
    family = family_of(dense_config_of(dense.config, type(dense).__name__).model_type)
    for public, _, _ in KINDS:
        found = getattr(family, public.__name__, None)
        if found is not None and found.dense_class is type(dense):
            return found
    raise ValueError(
        f"dense: must be a base model, causal language model or classifier of {family.dense_model_type!r}, "
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
    # A gate of shared experts is at fault without them, but the recipe may bring them.
    config = STMoEConfig.from_dense(dense_config, **{k: v for k, v in mixture_fields.items() if k != _SHARED_GATE})
    chosen = RECIPES[recipe]
    derived: dict[str, Any] = {}
    check_sparse_layers(locations, config.sparse_layer_indices)
    for index in config.sparse_layer_indices:
        ffn = locations[index]
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
    return STMoEConfig.from_dense(dense_config, **{**mixture_fields, **derived})


def _check_width(config: STMoEConfig, ffn: FFNLocation, recipe: str) -> None:
    """Refuse another width than the dense one where the recipe keeps that."""
    if config.moe_intermediate_size not in (None, ffn.intermediate_size):
        raise ValueError(
            f"moe_intermediate_size: recipe {recipe!r} keeps the dense width, {ffn.intermediate_size} in layer "
            f"{ffn.layer}, got {config.moe_intermediate_size}"
        )


def _take_over(sparse: nn.Module, models: Sequence[nn.Module], rest: str, share: bool) -> None:
    """Give the mixture every tensor of the dense model outside of the sparse FFNs: shared, or copied once each.

    Of several models each parameter is their average, or the first one's, as `rest` says; buffers are constants.
    """
    taken: dict[int, Tensor] = {}

    def take(tensors: Sequence[Any]) -> Tensor:
        tensor = tensors[0]
        if id(tensor) not in taken:
            is_parameter = isinstance(tensor, nn.Parameter)
            values = [each.detach() for each in tensors]
            fresh = values[0] if share else merged(values, rest if is_parameter else "first")
            taken[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if is_parameter else fresh
        return taken[id(tensor)]

    inside = tuple(f"{name}." for name, module in sparse.named_modules() if isinstance(module, SparseBlock))
    for name, module in sparse.named_modules():
        if f"{name}.".startswith(inside):
            continue
        sources = [model.get_submodule(name) if name else model for model in models]
        for store in ("_parameters", "_buffers"):
            own = getattr(module, store)
            for key, value in own.items():
                if value is not None:
                    own[key] = take([getattr(source, store)[key] for source in sources])


def _check_ties(dense: PreTrainedModel, sparse: STMoEPreTrainedModel) -> None:
    """Refuse a dense model with weights that the mixture ties and that differ, of which one would be lost."""
    weights = dict(dense.named_parameters(remove_duplicate=False))
    for name, kept in sparse.all_tied_weights_keys.items():
        one, other = weights.get(name), weights.get(kept)
        if one is None or other is None or one is other or "meta" in (one.device.type, other.device.type):
            continue
        if not torch.equal(one, other):
            raise ValueError(
                f"dense: {name} is tied to {kept} by its config and differs from it; set tie_word_embeddings=False in "
                "the config, or tie_weights() if only one is wanted"
            )


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
    experts: Any = block.experts
    fill_router(block.gate, like, router_std, generator)
    _share_rows(block.gate, recipe.router_rows(options, experts.num_experts))
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
            setattr(experts, name, nn.Parameter(tensor.stacked() if isinstance(tensor, Pieces) else _owned(tensor)))
    if experts.multiplicative_bias is not None:
        experts.multiplicative_bias = nn.Parameter(like.new_ones(experts.multiplicative_bias.shape))
    if block.shared_experts is not None and made.shared is not None:
        _fill_shared(block.shared_experts, made.shared)


def _owned(experts: Tensor) -> Tensor:
    """Experts [E, ...] in memory of their own, where a recipe gives equal ones as views of one."""
    views = len(experts) == 1 or experts.stride(0) == 0
    return experts.clone(memory_format=torch.contiguous_format) if views else experts


@torch.no_grad()
def _share_rows(router: Router, rows: Tensor) -> None:
    """Give each expert the router row of that number, in every parameter that has one row per expert."""
    for parameter in router.parameters(recurse=False):
        if parameter.ndim and len(parameter) == len(rows):
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


def fill_router(router: Router, like: torch.Tensor, std: float, generator: torch.Generator) -> None:
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


def _verified(
    dense: PreTrainedModel,
    sparse: STMoEPreTrainedModel,
    exact: bool,
    inputs: Text | None,
    tokenizer: PreTrainedTokenizerBase | None,
    most: float | None,
) -> IdentityProof | None:
    """Measure how far the mixture is from the dense model, and print it.

    Raises:
        ValueError: when weights of the dense model that are NaN or infinite spoil the comparison, or there is nothing
            to compare and `most` asks for it.
        RuntimeError: when the mixture should compute the dense function and does not, or differs by more than `most`.
    """
    if dense.device.type == "meta" or isinstance(sparse, STMoEModel):
        if most is not None:
            raise ValueError(
                "require_identity: needs a model with weights and logits, got a base model or meta tensors"
            )
        return None
    proof = prove_identity(dense, sparse, inputs, tokenizer)
    # Every weight is looked at only when there is a fault to explain, for that takes a pass over the whole model.
    if not proof.holds and (exact or not math.isfinite(proof.max_relative_difference)):
        _check_finite(dense)
    print(proof)  # noqa: T201 -- the proof is part of what the caller asked for
    if exact and not proof.holds:
        raise RuntimeError(
            f"The mixture should compute the dense function and does not ({proof}). The FFN of "
            f"{type(dense).__name__} is not what its layout says; please report this family."
        )
    if most is not None and not proof.max_relative_difference <= most:  # NaN is not either
        raise RuntimeError(f"require_identity: must be at most {most:g}, but {proof}")
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
            f"{shown(names)}; take a checkpoint from before they were spoilt, or save it anew in a wider dtype"
        )
