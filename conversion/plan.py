"""The plan of a streaming conversion: from configs, models without weights and the headers of files.

Everything that can be wrong with a request or a checkpoint is found here, before anything is written.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from st_moe.configuration import MIXTURE_FIELDS, STMoEConfig, auto_class_of, dense_config_of, family_config
from st_moe.conversion.checkpoint import CONFIG_FAULTS, checkpoint_tensors, dense_config
from st_moe.conversion.from_disk import run_from_disk
from st_moe.conversion.merge import check_compatible
from st_moe.conversion.proof import inputs_of, proof_tokens
from st_moe.conversion.recipes import ExpertTensors, FFNTensors, LayerTensors, try_recipe
from st_moe.conversion.router_init import RouterInputs, RouterStart, check_rows, inputs_of_ffns, start_router
from st_moe.conversion.stored import Computed, compute, first_float, stored_by_name
from st_moe.conversion.streaming import Output, Plan, Shard, SparseLayer, StoredFFN, fingerprint
from st_moe.conversion.tensor_files import (
    DTYPES,
    NAMES,
    StoredTensor,
    bytes_of,
    header_of,
    num_bytes,
)
from st_moe.conversion.upcycle import fill_block, fill_router, load_dense, mixture_config_of, sparse_class
from st_moe.modeling import locate_ffns
from st_moe.modeling.experts import ModuleExperts
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel
from st_moe.modeling.sparse_block import SparseBlock

# Fields of configs that say how many layers there are.
_LAYER_NUMBERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_layers_per_stack", "encoder_layers"),
    *("decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)


class Models:
    """A dense model and the mixture that it becomes, both without weights.

    Args:
        source: the checkpoint's folder or name.
        recipe, recipe_options, fields: as for `upcycle`.

    Raises:
        ValueError: when an argument or the config is at fault.
    """

    def __init__(self, source: str | Path, recipe: str, options: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        _check_fields(fields)
        self.recipe, self.options = try_recipe(recipe, options), options
        self.dense = _without_weights(source)
        self.locations = locate_ffns(self.dense)
        if all(ffn.storage == "none" for ffn in self.locations):
            raise ValueError(
                f"source: no layer of {source} ({self.dense.config.model_type}) can be made sparse: "
                f"{self.locations[0].reason}"
            )
        own = dense_config_of(self.dense.config, type(self.dense).__name__)
        self.config = mixture_config_of(own, self.locations, recipe, options, fields)
        with torch.device("meta"):
            self.sparse = sparse_class(self.dense)(self.config)
        self.sparse.tie_weights()
        named = [(name, module) for name, module in self.sparse.named_modules() if isinstance(module, SparseBlock)]
        #: Name and module of each sparse block, by the index of its layer.
        self.blocks = dict(zip(self.config.sparse_layer_indices, named, strict=True))


def _check_fields(fields: Mapping[str, Any]) -> None:
    known = {*MIXTURE_FIELDS, *STMoEConfig.attribute_map} - {"dense_model_type", "st_moe_version"}
    for name in fields.keys() - known:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        raise ValueError(f"{name}: is not a field of the mixture" + (f"; did you mean {near[0]!r}?" if near else ""))


def _without_weights(source: str | Path) -> PreTrainedModel:
    """The dense model of a checkpoint on the meta device.

    Raises:
        ValueError: when its config is at fault.
    """
    config = dense_config(source)
    family_config(dense_config_of(config, (config.architectures or [""])[0]).model_type)
    auto = auto_class_of(config)
    try:
        with torch.device("meta"):
            return auto.from_config(config).eval()
    except CONFIG_FAULTS as error:
        raise ValueError(
            f"source: no model can be built from config.json in {source}: {type(error).__name__}: {error}"
        ) from None


def make_plan(
    sources: Sequence[Path],
    fresh: Path | None,
    *,
    recipe: str,
    recipe_options: Mapping[str, Any],
    router_std: float,
    router_start: RouterStart,
    seed: int,
    max_shard_size: str,
    verify: bool,
    proof_text: str | None,
    fields: Mapping[str, Any],
) -> Plan:
    """Everything that a conversion will write, and the parts that no recipe makes.

    Args:
        sources: the checkpoint's folder; of models that are merged, all of theirs.
        fresh: file to write with routers and all else of sparse blocks that is drawn anew, beside which a file
            `computed` has what the sources' files hold otherwise; None only plans.
        recipe, recipe_options, router_std, seed, fields: as for `upcycle`.
        router_start: how the routers start, see `upcycle`.
        max_shard_size: largest file, such as `"5GB"`.
        verify, proof_text: whether there will be a proof, and what it will read, so that it will be able to.

    Returns:
        The plan.

    Raises:
        ValueError: when an argument or the source is at fault; nothing is written then.
    """
    if not router_std >= 0:
        raise ValueError(f"router_std: must not be negative, got {router_std!r}")
    source = sources[0]
    before = _fingerprints(sources)
    tensors = [checkpoint_tensors(each) for each in sources]
    for folder, own in zip(sources, tensors, strict=True):
        _check_depth(folder, len(own))
    models = Models(source, recipe, recipe_options, fields)
    _name_dtype(models, tensors[0])
    if verify:
        inputs_of(models.dense, proof_tokens(source, models.dense, proof_text), None)
    computed = Computed(str(fresh and fresh.with_name("computed")), [])
    stored = _stored_of_all(models.dense, sources, tensors, computed)
    layers = {index: _sparse_layer(models, index, stored) for index in models.blocks}
    inputs = _router_inputs(models, source, router_start, fresh)
    made, digest = _write_fresh(models, layers, stored[0], router_std, router_start, inputs, seed, fresh)
    average = recipe == "merge" and recipe_options.get("rest", "average") == "average"
    outputs = _outputs(models, stored if average else stored[:1], made)
    shards, index = _cut(outputs, max_shard_size, models.sparse.num_parameters())
    if fresh is not None:
        compute(computed)
    if _fingerprints(sources) != before:
        raise ValueError(f"source: {', '.join(map(str, sources))} has changed while it was read; run the command again")
    return Plan(
        sources=tuple(map(str, sources)),
        recipe=recipe,
        options=dict(recipe_options),
        shards=shards,
        layers=made,
        fresh=digest,
        texts={**_texts(models, source), **index},
        files=before,
        computed=tuple(sum(tensor.num_bytes for tensor in tensors) for _, tensors in computed.computations),
        facts=_facts(models, recipe_options),
    )


def _fingerprints(sources: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """`Plan.files`: of every file of the sources that may be read."""
    patterns = ("config.json", "model.safetensors.index.json", "*.safetensors")
    paths = {path for folder in sources for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path): fingerprint(path) for path in sorted(paths)}


def _stored_of_all(
    dense: PreTrainedModel,
    sources: Sequence[Path],
    tensors: Sequence[Mapping[str, StoredTensor]],
    computed: Computed,
) -> list[dict[str, StoredTensor]]:
    """`stored_by_name` of every source, which all must be of one architecture."""
    others = [_without_weights(source) for source in sources[1:]]
    stored = [stored_by_name(*each, computed) for each in zip((dense, *others), tensors, sources, strict=True)]
    if others:
        shapes = [{name: (t.shape, DTYPES[t.dtype]) for name, t in own.items()} for own in stored]
        check_compatible([model.config for model in (dense, *others)], shapes)
    return stored


def _router_inputs(
    models: Models, source: Path, start: RouterStart, fresh: Path | None
) -> Sequence[Sequence[RouterInputs]]:
    """What the routers will see of the texts that they start from, layer by layer."""
    if not start.is_own_rule:
        for _, block in models.blocks.values():
            check_rows(block.gate, start.init)
    if not start.texts or fresh is None:
        return [()] * len(models.blocks)

    def seen(dense: PreTrainedModel) -> Sequence[Sequence[RouterInputs]]:
        locations = locate_ffns(dense)
        places = [locations[index] for index in models.blocks]
        return inputs_of_ffns(dense, places, start.texts or (), start.tokenizer)

    return run_from_disk(partial(load_dense, source), fresh.parent, seen)


def _check_depth(folder: Path, num_tensors: int) -> None:
    """Refuse a config with more layers than the files have tensors, before lists of that length are made of it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, dict)}}
    for prefix, part in parts.items():
        for name, count in part.items():
            if name in _LAYER_NUMBERS and type(count) is int and count > num_tensors:
                raise ValueError(
                    f"source: {prefix}{name} in {folder / 'config.json'} must fit the weights, got {count}, and there "
                    f"are only {num_tensors} tensors"
                )


def _name_dtype(models: Models, tensors: Mapping[str, StoredTensor]) -> None:
    """Have the mixture's config name a dtype: the dense config's, or that of the first weights."""
    dtype = models.dense.config.dtype
    if dtype is None:
        dtype = first_float(tensors.values())
    models.sparse.config.dtype = str(dtype).removeprefix("torch.")
    models.sparse.config.architectures = [type(models.sparse).__name__]


def _texts(models: Models, source: str | Path) -> dict[str, str]:
    """config.json, and generation_config.json if the source has none."""
    with TemporaryDirectory() as folder:
        models.sparse.config.save_pretrained(folder)
        if models.dense.can_generate() and not (Path(source) / "generation_config.json").exists():
            models.dense.generation_config.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def _facts(models: Models, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the mixture on its card and on the screen."""
    config: Any = models.config
    experts, choices = (", ".join(map(str, dict.fromkeys(sizes))) for sizes in zip(*config.layer_sizes, strict=True))
    return {
        "family": config.dense_model_type,
        "experts": experts,
        "choices": choices,
        "sparse_layers": len(config.sparse_layer_indices),
        "layers": config.num_hidden_layers,
        "total": config.parameters_of(models.sparse),
        "active": config.parameters_of(models.sparse, active=True),
        "exact": models.recipe.keeps_function(options, config),
    }


def _sparse_layer(models: Models, index: int, stored: Sequence[Mapping[str, StoredTensor]]) -> SparseLayer:
    """Where the dense FFN of a layer lies; what is made ahead of the recipe is still missing."""
    ffn = models.locations[index]
    position = models.config.sparse_layer_indices.index(index)
    experts, choices = models.config.layer_sizes[position]
    places = _projections(models.dense, ffn)
    sources = []
    for own in stored:
        weights = tuple(own[f"{place}.weight"] for place in places)
        biases = tuple(own[f"{place}.bias"] for place in places) if ffn.bias else ()
        if len({tensor.dtype for tensor in (*weights, *biases)}) > 1:
            kinds = ", ".join(f"{tensor.key} {tensor.dtype}" for tensor in (*weights, *biases))
            raise ValueError(
                f"source: an FFN must be stored in one dtype, got {kinds}; save the model once more with Transformers, "
                "which gives all weights one dtype"
            )
        sources.append(StoredFFN(weights, biases))
    in_name = "gate_up_proj" if ffn.gated else "up_proj"
    return SparseLayer(experts, choices, tuple(sources), ffn.conv1d, in_name, {}, "")


def _projections(dense: nn.Module, ffn: FFNLocation) -> list[str]:
    """Names of an FFN's projections in the model, out last."""
    names = {id(module): name for name, module in dense.named_modules()}
    return [names[id(linear)] for linear in ffn.linears()]


def _no_experts(*args: Any, **options: Any) -> LayerTensors:
    """Stands in for a recipe's function, while all else of a block is made."""
    return LayerTensors(ExpertTensors(None, None))  # type: ignore[arg-type]


def _write_fresh(
    models: Models,
    layers: Mapping[int, SparseLayer],
    stored: Mapping[str, StoredTensor],
    router_std: float,
    start: RouterStart,
    inputs: Sequence[Sequence[RouterInputs]],
    seed: int,
    path: Path | None,
) -> tuple[dict[int, SparseLayer], str]:
    """Write routers and all else of the blocks that no recipe makes, block by block; the digest is of all of it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    ahead = models.recipe._replace(function=_no_experts)
    made, digest = {}, hashlib.sha256()
    with open(path or os.devnull, "wb") as file:
        for (index, (_, block)), seen in zip(models.blocks.items(), inputs, strict=True):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            ffn = models.locations[index]
            if isinstance(block.experts, ModuleExperts):
                first = next(name for name, _ in ffn.module.named_parameters())
                fill_router(block.gate, _like(stored[f"{ffn.path}.{first}"]), router_std, generator)
            else:
                like = _like(layers[index].sources[0].weights[0])
                fill_block(block, [FFNTensors(like, like)], ahead, models.options, router_std, generator)
            state = generator.get_state().numpy().tobytes().hex()
            if not start.is_own_rule and (seen or not start.texts):
                rows = models.recipe.router_rows(models.options, block.gate.num_experts)
                start_router(block.gate, start.init, seen, rows, seed, index, start.options)
            fresh = {}
            for part, tensor in block.state_dict().items():
                if tensor.device.type != "meta":
                    place = StoredTensor(part, str(path), NAMES[tensor.dtype], tuple(tensor.shape), file.tell())
                    fresh[part] = place
                    data = bytes_of(tensor.contiguous())
                    digest.update(data)
                    file.write(data)
            made[index] = replace(layers[index], fresh=fresh, generator=state)
            block.to(device="meta")
    models.sparse.tie_weights()  # meta tensors of their own are no longer tied
    return made, digest.hexdigest()


def _like(stored: StoredTensor) -> torch.Tensor:
    """An empty tensor of the stored one's dtype."""
    return torch.empty(0, dtype=DTYPES[stored.dtype])


def _outputs(
    models: Models, stored: Sequence[Mapping[str, StoredTensor]], layers: Mapping[int, SparseLayer]
) -> list[Output]:
    """Every tensor of the result, in the order and under the names of the host's `save_pretrained`.

    Outside of the blocks, parameters are the means of all `stored`; buffers are constants.
    """
    sparse: STMoEPreTrainedModel = models.sparse
    parameters = {name for name, _ in sparse.named_parameters(remove_duplicate=False)}
    state = {name: t for name, t in sparse.state_dict().items() if name not in (sparse._keys_to_ignore_on_save or ())}
    inside = {f"{name}.": index for index, (name, _) in models.blocks.items()}
    outputs = []
    for name, tensor in remove_tied_weights_from_state_dict(state, sparse).items():
        prefix = next((prefix for prefix in inside if name.startswith(prefix)), None)
        if prefix is None:
            origins = tuple(own[name] for own in (stored if name in parameters else stored[:1]))
            outputs.append(Output(name, origins[0].dtype, origins[0].shape, origins))
            continue
        index, part = inside[prefix], name.removeprefix(prefix)
        layer, ffn = layers[index], models.locations[index]
        if ffn.storage == "modules" and part.startswith("experts."):
            origin = stored[0][f"{ffn.path}.{part.split('.', 2)[2]}"]
            outputs.append(Output(name, origin.dtype, origin.shape, (origin,)))
        elif ffn.storage == "modules":
            outputs.append(Output(name, layer.fresh[part].dtype, layer.fresh[part].shape, (layer.fresh[part],)))
        else:
            dtype = layer.fresh[part].dtype if part in layer.fresh else layer.sources[0].weights[0].dtype
            outputs.append(Output(name, dtype, tuple(tensor.shape), (), index, part))
    return outputs


def _cut(
    outputs: Iterable[Output], max_shard_size: str, num_parameters: int
) -> tuple[tuple[Shard, ...], dict[str, str]]:
    """Files and, if there are several, their index, as the host would cut and name them."""
    by_name: dict[str, Any] = {output.name: output for output in outputs}
    try:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda output: num_bytes(output.dtype, output.shape),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size: must be a size such as '5GB', got {max_shard_size!r}: {error}") from None
    shards = []
    for file_name, names in split.filename_to_tensors.items():
        header, order = header_of({name: (by_name[name].dtype, by_name[name].shape) for name in names})
        shards.append(Shard(file_name, header, tuple(by_name[name] for name in order)))
    if not split.is_sharded:
        return tuple(shards), {}
    index = {
        "metadata": {"total_parameters": num_parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return tuple(shards), {"model.safetensors.index.json": json.dumps(index, indent=2, sort_keys=True) + "\n"}
