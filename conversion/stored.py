"""Where each tensor of a model lies in a checkpoint, by the host's own rules, and what has to be computed first.

Most files hold the model's tensors one by one, perhaps under old names. Some hold them otherwise: fused where the model
has them apart, apart where it has them fused, experts one by one. Such tensors are computed into a file of their own,
group by group, from where they are streamed like all others.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from st_moe.conversion.processes import return_freed_memory
from st_moe.conversion.tensor_files import DTYPES, NAMES, StoredTensor, bytes_of, chunks_of, read_into
from st_moe.conversion.upcycle import shown
from st_moe.conversion.writing import checkpoint_of_progress, write_all

_FLOATS = ("F64", "F32", "BF16", "F16")


class Computation(NamedTuple):
    """Tensors of a model that the host makes of a few stored ones.

    Attributes:
        target: the model's tensor that the group goes by.
        converter: the host's rule.
        sources: stored tensors, each with the pattern of the rule that it matches.
        model: the model, without weights.
    """

    target: str
    converter: WeightConverter
    sources: list[tuple[str, StoredTensor]]
    model: PreTrainedModel

    def run(self, read: Callable[[StoredTensor], Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in the model; those of the files are read as the rule asks for them."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.sources:
            converter.add_tensor(self.target, stored.key, pattern, partial(read, stored))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class Computed(NamedTuple):
    """A file of computed tensors that is not there yet.

    Attributes:
        path: where it will be.
        computations: what it is made of, in the order of its bytes.
    """

    path: str
    computations: list[tuple[Computation, list[StoredTensor]]]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return sum(tensor.num_bytes for _, tensors in self.computations for tensor in tensors)


def stored_by_name(
    dense: PreTrainedModel, tensors: Mapping[str, StoredTensor], source: str | Path, computed: Computed
) -> dict[str, StoredTensor]:
    """Where each tensor of a model lies, by its name in the model: in its checkpoint, or in the file of computed ones.

    Args:
        dense: the model, without weights.
        tensors: of the checkpoint, by their names there.
        source: the checkpoint.
        computed: gets what has to be computed.

    Raises:
        ValueError: when the checkpoint's tensors are not those of its config.
    """
    wanted = dense.state_dict()
    found, groups = _sorted(dense, tensors, source, wanted)
    ties = _tied(dense)
    for names in ties:
        present = [name for name in names if name in found]
        if any(not _same_bytes(found[present[0]], found[name]) for name in present[1:]):
            raise ValueError(
                f"source: {' and '.join(present)} are tied by the config of {source} and differ in its files; set "
                '"tie_word_embeddings": false in config.json, or leave out the one that is not wanted'
            )
    for group in groups:
        found |= _placed(group, computed, source)
    for names in ties:
        found |= next((dict.fromkeys(names, found[one]) for one in names if one in found), {})
    keys: Any = SimpleNamespace(missing_keys=wanted.keys() - found.keys(), unexpected_keys=found.keys() - wanted.keys())
    dense._adjust_missing_and_unexpected_keys(keys)
    for fault, names in vars(keys).items():
        if names:
            raise ValueError(
                f"source: the tensors of {source} must be those of its config; {fault.replace('_', ' ')}: "
                f"{shown(sorted(names))}"
            )
    for name, tensor in wanted.items():
        if name in found:
            _check_tensor(tensor, found[name], source)
    return {name: found[name] for name in wanted if name in found}


def _sorted(
    dense: PreTrainedModel, tensors: Mapping[str, StoredTensor], source: str | Path, wanted: dict[str, Tensor]
) -> tuple[dict[str, StoredTensor], list[Computation]]:
    """What is stored as the model has it, by its name there, and groups of what is not."""
    transforms = get_model_conversion_mapping(dense)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, StoredTensor] = {}
    groups: dict[str, Computation] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, dense.base_model_prefix, wanted)
        if pattern is not None:
            group = groups.setdefault(name, Computation(name, by_pattern[pattern], [], dense))
            group.sources.append((pattern, tensors[key]))
        elif name in found:
            raise ValueError(
                f"source: a tensor must be stored once, but {found[name].key!r} and {key!r} in {source} are both "
                f"{name!r} of the model; remove one"
            )
        else:
            found[name] = tensors[key]
    return found, list(groups.values())


def _placed(group: Computation, computed: Computed, source: str | Path) -> dict[str, StoredTensor]:
    """Give a group its place in the file: names, shapes and dtypes come of the host's rule on tensors without data."""
    for _, stored in group.sources:
        _check_dtype(stored)
    try:
        made = group.run(lambda stored: torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta"))
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        keys = [stored.key for _, stored in group.sources]
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"source: {group.target} cannot be made of the tensors of {source}, which must be those of its config: "
            f"{reason} ({shown(keys)})"
        ) from None
    offset, tensors = computed.num_bytes, []
    for name, tensor in made.items():
        tensors.append(StoredTensor(name, computed.path, NAMES[tensor.dtype], tuple(tensor.shape), offset))
        offset += tensors[-1].num_bytes
    computed.computations.append((group, tensors))
    return {tensor.key: tensor for tensor in tensors}


def compute(computed: Computed) -> None:
    """Write the file of computed tensors, with one group of them in memory at a time.

    Raises:
        OSError: when the disk is full; nothing is left of the file then.
    """
    path = Path(computed.path)
    path.unlink(missing_ok=True)
    if not computed.computations:
        return
    free = shutil.disk_usage(path.parent).free
    if computed.num_bytes > free:
        raise OSError(
            f"destination: {computed.num_bytes:,} bytes are to be computed first, but the disk of {path.parent} has "
            f"{free:,} free"
        )
    try:
        with path.open("wb", buffering=0) as file:
            for group, tensors in computed.computations:
                checkpoint_of_progress("compute")
                made = group.run(_read)
                for tensor in tensors:
                    write_all(file, bytes_of(made.pop(tensor.key).contiguous()))
                return_freed_memory()
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _read(stored: StoredTensor) -> Tensor:
    target = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    read_into(target, stored)
    return target


def _check_dtype(stored: StoredTensor) -> None:
    if stored.dtype not in _FLOATS:
        raise ValueError(
            f"source: must not be quantised, but {stored.key!r} in {stored.path} is stored as {stored.dtype}; take the "
            f"checkpoint in one of {', '.join(_FLOATS)}"
        )


def _check_tensor(wanted: Tensor, stored: StoredTensor, source: str | Path) -> None:
    if tuple(wanted.shape) != stored.shape:
        raise ValueError(
            f"source: {stored.key!r} of {source} must have the shape that config.json asks for, {list(wanted.shape)}, "
            f"got {list(stored.shape)}"
        )
    if wanted.is_floating_point():
        _check_dtype(stored)


def _tied(model: nn.Module) -> list[list[str]]:
    """Groups of names that stand for one tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if one == other or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one == other
    return all(a == b for a, b in zip(chunks_of(one), chunks_of(other), strict=True))


def first_float(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of the first floating-point tensor of a checkpoint; float32 if there is none."""
    return next((DTYPES[tensor.dtype] for tensor in tensors if tensor.dtype in _FLOATS), torch.float32)
