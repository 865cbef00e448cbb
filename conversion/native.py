"""Native checkpoints: a mixture as one of Transformers' own architectures, and back, by the table of targets.

Both directions work on the state dicts of live modules; the host's save_pretrained and from_pretrained do the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from st_moe.configuration import STMoEConfig
from st_moe.configuration.configuration_st_moe import installed_version
from st_moe.conversion.from_disk import load_from_disk, run_from_disk
from st_moe.conversion.native_files import config_of, destination_of, load_mixture, write_folder
from st_moe.conversion.native_targets import TARGETS, Family, NativeTarget, Rows
from st_moe.conversion.proof import IdentityProof, Outputs, compared, outputs_of, prove_identity
from st_moe.conversion.upcycle import load_dense
from st_moe.modeling import STMoEForCausalLM

logger = logging.get_logger(__name__)

#: Largest relative logit difference between a mixture and its native form, both in float32.
TOLERANCE = 1e-5

_TOKENS = (2, 64)
_LAYER = re.compile(r"(.*?\.layers\.\d+\.)(.+)")
# Fields of native configs that evaluation does not read, or that say what another field says.
_UNREAD = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
_HOST_FIELDS = {f.name for f in dataclasses.fields(PreTrainedConfig)}
_SHARED = tuple(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))
_SHARED_GATE = "mlp.shared_expert_gate.weight"


def native_target(name: str) -> NativeTarget:
    """The row of that name.

    Raises:
        ValueError: when there is none.
    """
    rows = {row.name: row for row in _available()}
    if name in rows:
        return rows[name]
    names = list(rows)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"target: must be one of {', '.join(names)}{hint}, got {name!r}")


def _available() -> list[NativeTarget]:
    """The rows that the installed Transformers has, for older ones lack some architectures."""
    return [row for row in TARGETS if row.name in CONFIG_MAPPING]


def export_native(
    model: STMoEForCausalLM | str | Path, target: str, destination: str | Path, *, overwrite: bool = False
) -> IdentityProof:
    """Write a mixture as a native checkpoint of Transformers, with its tokenizer, generation config and chat template.

    The folder appears whole or not at all, and only if the model that Transformers loads from it computes the mixture's
    logits (largest relative difference 1e-5 in float32).

    Args:
        model: a mixture, its folder, or its name on the Hub. A model in memory has no tokenizer to copy.
        target: the native architecture, the `name` of a row of `TARGETS`.
        destination: the folder to write; must not exist, unless `overwrite`.
        overwrite: whether an existing destination is replaced, once the new folder is complete.

    Returns:
        The comparison of the two models.

    Raises:
        ValueError: when the architecture cannot hold the mixture exactly, saying what stands in the way and which
            architecture can, or when the weights do not fit; nothing is written then.
    """
    row = native_target(target)
    source = model if isinstance(model, str | Path) else None
    place = destination_of(destination, source, overwrite)
    config = config_of(model)
    refuse_what_cannot_be_held(row, config)
    ours = load_mixture(model)
    native = _native_model(row, ours)

    def check(folder: Path) -> IdentityProof:
        what = f"target: the {row.name} checkpoint"
        if source is not None:
            return _proven_from_disk(source, folder, what)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        return _proven(ours, loaded, what)

    card = (
        f"{row.name} checkpoint, written from a mixture of {config.dense_model_type} by st_moe {installed_version()} "
        f"and transformers {transformers.__version__}. Transformers and serving engines load it without st_moe."
    )
    proof = cast(IdentityProof, write_folder(native, place, source, card, check))
    _tell_how_it_is_served(row, config)
    return proof


def import_native(source: PreTrainedModel | str | Path, family: str | None = None) -> STMoEForCausalLM:
    """Turn a native mixture of Transformers into a mixture of the matching dense family, with the same logits.

    Args:
        source: a folder, a name on the Hub, or a model in memory (left as it is; weights are shared with it).
        family: `dense_model_type` of the result; None takes the first family of the target's row that fits.

    Returns:
        The mixture in evaluation mode, in the source's dtype.

    Raises:
        ValueError: when there is no row for the source's model_type, no family fits it, or weights are left over.
    """
    native = load_dense(source) if isinstance(source, str | Path) else source
    model_type = native.config.model_type
    rows = {row.name: row for row in _available()}
    if model_type not in rows:
        raise ValueError(f"source: model_type must be one of {', '.join(rows)} to be imported, got {model_type!r}")
    row = rows[model_type]
    chosen, config = _config_of_ours(row, native.config, family)
    tensors = native.state_dict()
    padded = bool(_padding(row, config, tensors))
    if padded:
        config.num_shared_experts, config.shared_expert_gate = 0, False
    with init.no_init_weights():
        ours = STMoEForCausalLM(config)
    _fill(ours, _translated(row, chosen, tensors, ours.state_dict(), config, padded, to_ours=True))
    ours.to(native.device)  # type: ignore[arg-type]  # the host wraps this method
    ours.config.dtype = native.config.dtype
    if native.can_generate():
        ours.generation_config = copy.deepcopy(native.generation_config)
    ours.eval()
    _proven(native, ours, "source: the imported mixture")
    return ours


# ------------------------------------------------------------------------------------- what can be held, from configs


def refuse_what_cannot_be_held(row: NativeTarget, config: STMoEConfig) -> None:
    """Raise a ValueError with all that keeps an architecture from holding a mixture, and the nearest that could."""
    faults = export_faults(row, config)
    if not faults:
        return
    others = {other.name: export_faults(other, config) for other in _available() if other is not row}
    able = [name for name, found in others.items() if not found]
    if able:
        advice = f"{' and '.join(map(repr, able))} can hold it"
    else:
        name, least = min({row.name: faults, **others}.items(), key=lambda item: len(item[1]))
        advice = f"the nearest is {name!r}, where this stands in the way: {'; '.join(least)}"
    raise ValueError(f"target: {row.name} cannot hold this mixture exactly: {'; '.join(faults)}. {advice}")


def export_faults(row: NativeTarget, config: STMoEConfig) -> list[str]:
    """All that keeps an architecture from holding a mixture with this config, each with field, rule and value."""
    return [*_mixture_faults(row, config), *_family_faults(row, config)]


def _mixture_faults(row: NativeTarget, config: STMoEConfig) -> list[str]:
    experts, choices = (set(sizes) for sizes in zip(*config.layer_sizes, strict=True))
    always = config.second_expert_policy_eval == "all" or choices == {1}
    wanted = {
        "router_type": row.router_type,
        "eval_capacity_factor": None,
        "ffn_before": False,
        "ffn_after": False,
        "multiplicative_bias": False,
        "second_expert_policy_eval": config.second_expert_policy_eval if always else "all",
        "renormalize_after_drop": config.renormalize_after_drop if config.norm_topk_prob else False,
        **row.ours,
    }
    faults = [_must(name, value, getattr(config, name)) for name, value in wanted.items()]
    for name, sizes in (("num_experts", experts), ("num_experts_per_tok", choices)):
        if len(sizes) > 1:
            faults.append(f"{name}: must be the same in all layers, got {getattr(config, name)!r}")
    sparse, layers = config.sparse_layer_indices, config.num_hidden_layers
    if row.layers is None and len(sparse) < layers:
        faults.append(f"sparse_layers: every layer must be sparse, got {config.sparse_layers!r}")
    if row.layers is not None and row.layers.fields(sparse, layers) is None:
        faults.append(f"sparse_layers: dense layers may be {row.layers.words}, got {config.sparse_layers!r}")
    faults += _shared_faults(row, config)
    return [fault for fault in faults if fault]


def _shared_faults(row: NativeTarget, config: STMoEConfig) -> list[str]:
    count = config.num_shared_experts
    if row.shared is None:
        return [_must("num_shared_experts", 0, count)]
    if not count:
        return []
    faults = [_must("shared_expert_gate", row.shared.gated, config.shared_expert_gate)]
    return faults if row.shared.field else [*faults, _must("num_shared_experts", 1, count)]


def _family_faults(row: NativeTarget, config: STMoEConfig) -> list[str]:
    family = next((family for family in row.families if family.name == config.dense_model_type), None)
    if family is None:
        names = ", ".join(row.family_names)
        return [f"dense_model_type: must be one of {names}, got {config.dense_model_type!r}"]
    known = {*_copied(row, family), *family.dense, *family.unread, row.width, "intermediate_size"}
    faults = [_must(name, _value(value, config), getattr(config, name)) for name, value in family.dense.items()]
    faults += [f"it needs {c.words}" for c in family.conditions if not c.holds(config)]
    faults += _unplaced(config.dense_config(), known)
    return [fault for fault in faults if fault]


def served_otherwise(row: NativeTarget, config: STMoEConfig) -> list[str]:
    """What llama.cpp would need of a mixture without faults to compute its logits, and does not say."""
    family = next(family for family in row.families if family.name == config.dense_model_type)
    native = _native_config(row, family, config)
    return [condition.words for condition in row.served if not condition.holds(native)]


def _tell_how_it_is_served(row: NativeTarget, config: STMoEConfig) -> None:
    needs = served_otherwise(row, config)
    if not needs:
        return
    able = [other for other in _available() if other is not row and not export_faults(other, config)]
    names = " or ".join(repr(other.name) for other in able if not served_otherwise(other, config))
    logger.warning(
        f"{row.name}: llama.cpp computes other logits of this checkpoint than Transformers, without a word, for it "
        f"needs {' and '.join(needs)} here{f'; take {names} for it' if names else ''}."
    )


def _must(name: str, rule: Any, value: Any) -> str:
    """The fault of a value that differs from the one it must have, or ""."""
    return "" if value == rule else f"{name}: must be {rule!r}, got {value!r}"


def _value(rule: Any, config: Any) -> Any:
    """A value of the table: as it stands, or computed from a config."""
    return rule(config) if callable(rule) else rule


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class)} - _HOST_FIELDS


def _unplaced(config: PreTrainedConfig, known: Iterable[str]) -> list[str]:
    """Faults of fields that nothing accounts for and that are not at their defaults."""
    names = sorted(_fields(type(config)).difference(known, _UNREAD))
    faults = [_must(name, getattr(type(config), name, None), getattr(config, name)) for name in names]
    return [f"{fault}; the other side has no such field" for fault in faults if fault]


def _copied(row: NativeTarget, family: Family) -> set[str]:
    """Fields that both configs have under one name and with one meaning."""
    shared = _fields(CONFIG_MAPPING[family.name]) & _fields(CONFIG_MAPPING[row.name])
    shared |= {name for name in row.extra if name in _fields(CONFIG_MAPPING[family.name]) | {"rope_parameters"}}
    return shared - {row.width, row.dense_width, "intermediate_size", *_UNREAD, *family.unread}


# -------------------------------------------------------------------------------------------------- configs both ways


def _native_config(row: NativeTarget, family: Family, config: STMoEConfig) -> PreTrainedConfig:
    """The native config of a mixture without faults."""
    dense_width = config.intermediate_size
    values = {name: copy.deepcopy(getattr(config, name)) for name in _copied(row, family)}
    values = {name: value for name, value in values.items() if value is not None or name not in row.extra}
    for table in (row.native, row.written, family.native):
        values |= {name: _value(rule, config) for name, rule in table.items()}
    sizes = {"num_experts": config.layer_sizes[0][0], "num_experts_per_tok": config.layer_sizes[0][1]}
    values |= {native: sizes.get(ours, getattr(config, ours)) for ours, native in row.fields.items()}
    width = config.moe_intermediate_size or dense_width
    values |= {row.dense_width: dense_width, row.width: width}
    if row.layers is not None:
        values |= row.layers.fields(config.sparse_layer_indices, config.num_hidden_layers) or {}
    if row.shared is not None and row.shared.field:
        count = config.num_shared_experts or (0 if row.shared.optional else 1)
        values[row.shared.field] = count if row.shared.counts else count * width
    engine = {name: _value(rule, config) for name, rule in row.engine.items()}
    values |= {name: value for name, value in engine.items() if value is not None}
    return CONFIG_MAPPING[row.name](**values, dtype=config.dtype)


def _config_of_ours(row: NativeTarget, native: Any, name: str | None) -> tuple[Family, STMoEConfig]:
    """Family and config of the mixture that a native config describes.

    Raises:
        ValueError: with what stands in the way, for each family.
    """
    own = [_must(field, _value(rule, native), getattr(native, field, None)) for field, rule in row.native.items()]
    own += [f"it needs {c.words}" for c in row.conditions if not c.holds(native)]
    faults = {"": [fault for fault in own if fault]}
    families = [f for f in row.families if name in (None, f.name) and f.name in CONFIG_MAPPING]
    if not families:
        names = ", ".join(row.family_names)
        raise ValueError(f"family: must be one of {names} for {row.name}, got {name!r}")
    for family in families if not faults[""] else ():
        dense, found = _dense_config(row, family, native)
        if not found:
            return family, _mixture_config(row, native, dense)
        faults[family.name] = found
    told = "; ".join(f"{who + ': ' if who else ''}{', '.join(found)}" for who, found in faults.items() if found)
    raise ValueError(f"source: no dense family holds what this {row.name} is around its experts: {told}")


def _dense_config(row: NativeTarget, family: Family, native: Any) -> tuple[Any, list[str]]:
    """The dense config of a family around a native mixture, and what stands in the way."""
    values = {name: _value(rule, native) for name, rule in family.dense.items()}
    values |= {name: copy.deepcopy(getattr(native, name)) for name in _copied(row, family) if hasattr(native, name)}
    width = getattr(native, row.dense_width) or getattr(native, row.width)
    dense = CONFIG_MAPPING[family.name](**{**values, "intermediate_size": width})
    faults = [_must(name, _value(rule, native), getattr(dense, name)) for name, rule in family.dense.items()]
    faults += [_must(name, _value(rule, dense), getattr(native, name, None)) for name, rule in family.native.items()]
    faults += [f"it needs {c.words}" for c in family.conditions if not c.holds(dense)]
    layer_fields = row.layers.fields(range(native.num_hidden_layers), native.num_hidden_layers) if row.layers else {}
    known = {*_copied(row, family), *row.fields.values(), *row.native, *row.written, *family.native, *family.unread}
    known |= {row.width, row.dense_width, *(layer_fields or {}), row.shared.field if row.shared else ""}
    return dense, [fault for fault in (*faults, *_unplaced(native, known)) if fault]


def _one_for_all(value: Any) -> Any:
    """A value that a config gives once, or for every layer."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _mixture_config(row: NativeTarget, native: Any, dense: PreTrainedConfig) -> STMoEConfig:
    """The mixture's fields of a native config, on the config of its dense family."""
    width = getattr(native, row.width)
    values = {**row.ours, **{ours: _one_for_all(getattr(native, name)) for ours, name in row.fields.items()}}
    sparse = row.layers.sparse(native) if row.layers else list(range(native.num_hidden_layers))
    if not sparse:
        raise ValueError(f"source: must have a sparse layer to be a mixture, but this {row.name} has none")
    values["sparse_layers"] = None if len(sparse) == native.num_hidden_layers else sparse
    if row.shared is not None:
        size = getattr(native, row.shared.field) if row.shared.field else 1
        count, rest = (size or 0, 0) if row.shared.counts else divmod(size, width)
        if rest:
            raise ValueError(
                f"{row.shared.field}: must be a multiple of {row.width}={width} to be imported, got {size}"
            )
        values |= {"num_shared_experts": count, "shared_expert_gate": bool(count) and row.shared.gated}
    return STMoEConfig.from_dense(dense, **values, router_type=row.router_type, moe_intermediate_size=width)


# --------------------------------------------------------------------------------------------------- tensors both ways


def _native_model(row: NativeTarget, ours: STMoEForCausalLM) -> PreTrainedModel:
    """The native model with a mixture's weights, shared with it where they are the same tensors."""
    config: Any = ours.config
    family = next(family for family in row.families if family.name == config.dense_model_type)
    with torch.device("meta"):
        native = AutoModelForCausalLM.from_config(_native_config(row, family, config), dtype=ours.dtype)
    padded = row.shared is not None and not row.shared.optional and not config.num_shared_experts
    _fill(native, _translated(row, family, ours.state_dict(), native.state_dict(), config, padded, to_ours=False))
    native.generation_config = copy.deepcopy(ours.generation_config)
    return native


def _shared_rows(row: NativeTarget) -> tuple[Rows, ...]:
    """All tensors of the shared experts of a target, renamed or not."""
    if row.shared is None:
        return ()
    gate = (_SHARED_GATE,) if row.shared.gated else ()
    return row.shared.rows + tuple(
        Rows((name,), (name,)) for name in (*_SHARED, *gate) if not any(name in known.ours for known in row.shared.rows)
    )


def _padding(row: NativeTarget, config: STMoEConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the shared experts' tensors of a native model, if there is one that is all zeros because it must be."""
    if row.shared is None or row.shared.optional or config.num_shared_experts != 1:
        return []
    suffixes = tuple(f".{name}" for rows in _shared_rows(row) for name in rows.native)
    names = [name for name in tensors if name.endswith(suffixes)]
    # What the gate says of an expert of zeros does not matter.
    return names if not any(tensors[name].any() for name in names if not name.endswith(_SHARED_GATE)) else []


def _translated(
    row: NativeTarget,
    family: Family,
    tensors: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    config: STMoEConfig,
    padded: bool,
    to_ours: bool,
) -> dict[str, Tensor]:
    """The state dict of the other side.

    Args:
        tensors: the state dict of this side.
        like: names, shapes and dtypes of the other side's.
        padded: whether the native shared experts are zeros that the mixture does not have.
        to_ours: direction.

    Raises:
        ValueError: when a tensor is left over, missing, of another shape, or not zero where it must be.
    """
    shared = _shared_rows(row)
    zeros = (*row.zeros, *family.zeros, *(name for rows in shared if padded for name in rows.native))
    rules = [*row.rows, *family.rows, *(() if padded else shared)]
    groups = {name: rows for rows in rules for name in (rows.native if to_ours else rows.ours)}
    found: dict[str, Tensor] = {}
    fused: dict[tuple[str, Rows], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        prefix, suffix = match.groups() if match else ("", name)
        if to_ours and suffix in zeros:
            if tensor.any() and suffix != _SHARED_GATE:
                raise ValueError(f"{name}: must be zero, for a mixture of {family.name} has nothing of the kind")
        elif suffix in groups:
            fused[prefix, groups[suffix]][suffix] = tensor
        else:
            found[name] = tensor
    for (prefix, rows), parts in fused.items():
        found |= _regrouped(prefix, rows, parts, like, config, to_ours)
    if not to_ours:
        missing = [name for name in like if name not in found and name.endswith(tuple(f".{zero}" for zero in zeros))]
        found |= {name: _filling(name, like[name]) for name in missing}
    check_complete(found, like)
    return found


def _filling(name: str, like: Tensor) -> Tensor:
    """A tensor that computes nothing: zeros, and ones for the gate of an expert of zeros.

    llama.cpp computes that gate's sigmoid as silu(x) / x, which is not a number where x is zero.
    """
    return torch.full(like.shape, float(name.endswith(_SHARED_GATE)), dtype=like.dtype)


def _regrouped(
    prefix: str, rows: Rows, parts: dict[str, Tensor], like: Mapping[str, Tensor], config: Any, to_ours: bool
) -> dict[str, Tensor]:
    """One layer's tensors of a rule, as the other side has them."""
    here, there = (rows.native, rows.ours) if to_ours else (rows.ours, rows.native)
    absent = [name for name in here if name not in parts]
    names = [f"{prefix}{name}" for name in there]
    # Where a rule does not fit, names stay as they are, and the check of completeness tells.
    if absent or any(name not in like for name in names):
        return {f"{prefix}{name}": tensor for name, tensor in parts.items()}
    pieces = [parts[name] for name in here]
    joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if rows.heads:
        heads = joined.unflatten(0, (getattr(config, rows.heads), -1))
        pairs = heads.unflatten(1, (2, -1) if to_ours else (-1, 2))
        joined = pairs.transpose(1, 2).reshape(joined.shape)
    sizes = [like[name].shape[0] for name in names]
    if len(names) == 1 or sum(sizes) != joined.shape[0]:
        return {names[0]: joined}
    return {name: piece.clone() for name, piece in zip(names, joined.split(sizes), strict=True)}


def check_complete(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that is not name by name, shape by shape that of a model.

    Raises:
        ValueError: naming the first tensors of each fault.
    """
    wrong = [name for name in found.keys() & like.keys() if found[name].shape != like[name].shape]
    faults = {
        "without a place": found.keys() - like.keys(),
        "missing": like.keys() - found.keys(),
        "of another shape": wrong,
    }
    told = [f"{kind}: {', '.join(sorted(names)[:5])}" for kind, names in faults.items() if names]
    if told:
        raise ValueError(f"weights: every tensor must have its place, but {'; '.join(told)}")


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model its weights, tied where its config says so."""
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()  # type: ignore[operator]  # of every PreTrainedModel


# -------------------------------------------------------------------------------------------------- models and folders


def _reference(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float32 on the CPU, with experts computed one by one; weights are shared where they can be.

    Casting the model would keep what an earlier cast of it has left of constants such as rotary frequencies.
    """
    config = copy.deepcopy(model.config)
    config._experts_implementation_internal = "eager"
    with init.no_init_weights():
        fresh = type(model)(config)
    fresh.load_state_dict({name: tensor.float().cpu() for name, tensor in model.state_dict().items()}, assign=True)
    fresh.tie_weights()
    return fresh.eval()


def _proven(reference: PreTrainedModel, other: PreTrainedModel, what: str) -> IdentityProof:
    """Compare both models in float32.

    Raises:
        ValueError: when their logits differ by more than rounding.
    """
    reference, other = (_reference(model) for model in (reference, other))
    return _judged(prove_identity(reference, other, _tokens(reference.config)), what)


def _proven_from_disk(source: str | Path, folder: Path, what: str) -> IdentityProof:
    """Compare a stored mixture with a stored native model in float32, one module in memory at a time.

    Raises:
        ValueError: when their logits differ by more than rounding.
    """

    def outputs(model_class: Any, place: str | Path) -> Outputs:
        load = partial(load_from_disk, model_class, place, torch.float32)
        return run_from_disk(load, folder.parent, lambda model: outputs_of(model, ids, mask))

    ids = _tokens(config_of(source))
    mask = torch.ones_like(ids)
    ours, native = outputs(STMoEForCausalLM, source), outputs(AutoModelForCausalLM, folder)
    return _judged(compared(ours, native, ids, mask), what)


def _tokens(config: Any) -> Tensor:
    """Random token ids [2, 64], or as many as the model has positions."""
    length = min(_TOKENS[1], getattr(config, "max_position_embeddings", None) or _TOKENS[1])
    return torch.randint(config.vocab_size, (_TOKENS[0], length), generator=torch.Generator().manual_seed(0))


def _judged(proof: IdentityProof, what: str) -> IdentityProof:
    if not proof.max_relative_difference <= TOLERANCE:
        raise ValueError(
            f"{what} must have equal logits, but they differ by {proof.max_relative_difference:.1e} of the largest "
            f"(at most {TOLERANCE:.0e}); nothing is kept. Look for NaN among the weights, and for routers of zeros"
        )
    return dataclasses.replace(proof, tolerance=TOLERANCE)
