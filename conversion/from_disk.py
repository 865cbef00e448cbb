"""Models that run with their weights on the disk, module by module: the proof of a conversion, and what routers see."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from st_moe import modeling
from st_moe.conversion.giving_back import GivingBack
from st_moe.conversion.proof import IdentityProof, compared, inputs_of, outputs_of, proof_tokens
from st_moe.conversion.upcycle import load_dense
from st_moe.conversion.writing import checkpoint_of_progress

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def run_from_disk(
    load: Callable[..., PreTrainedModel], place: Path, run: Callable[[PreTrainedModel], Result]
) -> Result:
    """What `run` makes of a model of which one module's weights are in memory at a time.

    A model with a module that reads another one's weights cannot be run so (accelerate brings in a module's own): it is
    loaded whole, which a warning says.

    Args:
        load: gives the model; takes `offload`, a folder for what has to be computed from the files, or None for the
            whole model in memory.
        place: where that folder, `offload`, is made for a while.
        run: what is done with the model.

    Raises:
        OSError: when the disk is full.
    """
    offload = place / "offload"
    offload.mkdir(parents=True, exist_ok=True)
    checkpoint_of_progress("run")
    try:
        with GivingBack():
            with _without_notes():
                model = load(offload=offload)
            return run(model)
    except SafetensorError as error:  # the library's own for every fault of a disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "meta" not in reason:  # where weights that are not there are
            raise
    finally:
        shutil.rmtree(offload)
    logger.warning(f"Loaded whole, for it cannot be run module by module from the disk: {reason}.")
    return run(load(offload=None))


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


def prove_folder(source: str | Path, folder: Path, text: str | None = None) -> IdentityProof:
    """Compare the outputs of a dense checkpoint and of the mixture in a folder, one module in memory at a time.

    Args:
        source: the dense checkpoint's folder.
        folder: the mixture's.
        text: what they are compared on, see `proof_tokens`.

    Raises:
        ValueError: when the text cannot be read in the model's tokens.
    """

    def of_dense(dense: PreTrainedModel) -> Any:
        tokens, mask = inputs_of(dense, proof_tokens(source, dense, text), None)
        return tokens, mask, outputs_of(dense, tokens, mask)

    tokens, mask, theirs = run_from_disk(partial(load_dense, source), folder.parent, of_dense)
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    load = partial(load_from_disk, getattr(modeling, name), folder, "auto")
    ours = run_from_disk(load, folder.parent, lambda sparse: outputs_of(sparse, tokens, mask))
    return compared(theirs, ours, tokens, mask)


def load_from_disk(
    model_class: Any, source: str | Path, dtype: str | torch.dtype, offload: Path | None
) -> PreTrainedModel:
    """A model for `run_from_disk`, with experts in the plain loop, which reads them one by one.

    Args:
        model_class: a model's or an Auto class.
        source: folder, or name on the Hub.
        dtype: as for `from_pretrained`.
        offload: folder for what has to be computed from the files, or None for the whole model in memory.
    """
    place = {} if offload is None else {"device_map": {"": "disk"}, "offload_folder": offload}
    return model_class.from_pretrained(
        source, dtype=dtype, use_safetensors=True, experts_implementation="eager", **place
    )
