"""Models that run with their weights on the disk, module by module: the proof of a conversion, and what routers see."""

from __future__ import annotations

import errno
import gc
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from st_moe import modeling
from st_moe.conversion.giving_back import GivingBack
from st_moe.conversion.proof import IdentityProof, Outputs, compared, inputs_of, outputs_of, proof_tokens
from st_moe.conversion.upcycle import load_dense
from st_moe.conversion.writing import checkpoint_of_progress

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def run_from_disk(
    load: Callable[..., PreTrainedModel], place: Path, run: Callable[[PreTrainedModel], Result]
) -> Result:
    """What `run` makes of a model of which one module's weights are in memory at a time.

    A model with a module that reads another one's weights cannot be run so (accelerate brings in a module's own). It
    runs with everything but its layers in memory then, and if they are to blame, whole. A warning says so.

    Args:
        load: gives the model; takes `device_map` and `offload_folder` as `from_pretrained` does.
        place: where a folder `offload`, for what has to be computed from the files, is made for a while.
        run: what is done with the model.

    Raises:
        OSError: when the disk is full.
        RuntimeError: what `run` raises.
    """
    offload = place / "offload"
    offload.mkdir(parents=True, exist_ok=True)
    checkpoint_of_progress("run")
    try:
        with GivingBack():
            return _run_with_the_least(load, offload, run)
    except SafetensorError as error:  # the library's own for every fault of a disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None
    finally:
        shutil.rmtree(offload)


def _run_with_the_least(
    load: Callable[..., PreTrainedModel], offload: Path, run: Callable[[PreTrainedModel], Result]
) -> Result:
    """`run_from_disk`, with no more in memory than the model cannot do without."""
    with _without_notes():
        model = load(device_map={"": "disk"}, offload_folder=offload)
    try:
        return run(model)
    except RuntimeError as error:
        _say_what_goes_on(error, "all but the layers")
    device_map = dict(_layers_on_disk(model))
    with _without_notes():
        model = load(device_map=device_map, offload_folder=offload)
    try:
        return run(model)
    except RuntimeError as error:
        _say_what_goes_on(error, "everything")
    finally:
        del model
        gc.collect()  # accelerate's hooks hold a model in cycles, and this one has parts in memory
    return run(load())


def _say_what_goes_on(error: RuntimeError, in_memory: str) -> None:
    """Warn that a model runs again with this in memory, if it was for want of weights that it did not, or raise."""
    reason = str(error).partition("\n")[0]
    if "meta" not in reason:  # where weights that are not there are
        raise error
    logger.warning(f"Run with {in_memory} in memory, for it cannot run module by module: {reason}.")


def _layers_on_disk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Where each part of a model is, as a `device_map`, if only its lists of layers are on the disk."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + name, "cpu"
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, "disk"
        elif any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from _layers_on_disk(child, f"{prefix}{name}.")
        else:
            yield prefix + name, "cpu"


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without what host and accelerate tell whoever did not ask for weights on the disk."""
    notes, bar = getLogger("accelerate.big_modeling"), logging.is_progress_bar_enabled()
    level = notes.level
    notes.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        notes.setLevel(level)
        if bar:
            logging.enable_progress_bar()


class Reference(NamedTuple):
    """What a mixture is compared with.

    Attributes:
        inputs, mask: as `inputs_of` gives them.
        outputs: of the dense model.
    """

    inputs: Tensor
    mask: Tensor
    outputs: Outputs


def run_dense(source: str | Path, place: Path, text: str | None = None) -> Reference:
    """Run a dense checkpoint on a proof's inputs, one module in memory at a time.

    Args:
        source: the checkpoint's folder.
        place: as for `run_from_disk`.
        text: what it runs on, see `proof_tokens`.

    Raises:
        ValueError: when the text cannot be read in the model's tokens.
    """

    def run(dense: PreTrainedModel) -> Reference:
        inputs, mask = inputs_of(dense, proof_tokens(source, dense, text), None)
        return Reference(inputs, mask, outputs_of(dense, inputs, mask))

    return run_from_disk(partial(load_dense, source), place, run)


def compare_folder(reference: Reference, folder: Path) -> IdentityProof:
    """Compare the outputs of the mixture in a folder, one module in memory at a time, with its dense parent's."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    load = partial(load_from_disk, getattr(modeling, name), folder, "auto")
    inputs, mask, theirs = reference
    ours = run_from_disk(load, folder.parent, lambda sparse: outputs_of(sparse, inputs, mask))
    return compared(theirs, ours, inputs, mask)


def load_from_disk(model_class: Any, source: str | Path, dtype: str | torch.dtype, **placement: Any) -> PreTrainedModel:
    """A model for `run_from_disk`, with experts in the plain loop, which reads them one by one.

    Args:
        model_class: a model's or an Auto class.
        source: folder, or name on the Hub.
        dtype: as for `from_pretrained`.
        placement: `device_map` and `offload_folder`, as for `from_pretrained`.
    """
    return model_class.from_pretrained(
        source, dtype=dtype, use_safetensors=True, experts_implementation="eager", **placement
    )
