"""Models that run with their weights on the disk, module by module: the proof of a conversion, and what routers see."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import logging

from st_moe import modeling
from st_moe.conversion.processes import return_freed_memory
from st_moe.conversion.proof import IdentityProof, compared, inputs_of, outputs_of, proof_tokens
from st_moe.conversion.streaming import checkpoint_of_progress
from st_moe.conversion.upcycle import load_dense

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

_MADV_DONTNEED = 4  # of Linux' madvise
_LEAST_GIVEN_BACK = 4 * 2**20  # bytes in one operation; less goes with its module, and is not worth the look


class GivingBack(TorchFunctionMode):
    """Gives the pages of weights that are mapped from files back to the system after each operation that read them.

    What is in memory at once is then what one operation reads, such as one expert, and not what one module holds. Pages
    that are needed again come from the system's cache of files. Only on Linux; elsewhere nothing is given back.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation as ever."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and sys.platform == "linux":
            read = [tensor for tensor in _tensors((*args, *kwargs.values())) if _reads(tensor, result)]
            if sum(tensor.nbytes for tensor in read) >= _LEAST_GIVEN_BACK and _give_back(read):
                return_freed_memory()
        return result


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _reads(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether an operation that made this result has read a tensor in memory, and not made a view of it."""
    plain = tensor.device.type == result.device.type == "cpu" and tensor.layout == result.layout == torch.strided
    return plain and tensor.untyped_storage().data_ptr() != result.untyped_storage().data_ptr()


def _give_back(tensors: Iterable[torch.Tensor]) -> bool:
    """Give pages of tensors back that are mapped from a file and as they are there; what others hold would be lost."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_bytes().splitlines()]
    # The fifth field is the number of the file; memory of its own has none.
    mapped = [[int(address, 16) for address in fields[0].split(b"-")] for fields in maps if fields[4] != b"0"]
    found = False
    for tensor in tensors:
        first = tensor.data_ptr()
        end = next((end for start, end in mapped if start <= first < end), None)
        # Nobody knows whether an inference tensor was written to; of others the version does.
        if end is not None and not tensor.is_inference() and not tensor._version:
            page = first - first % mmap.PAGESIZE
            size = min(first + tensor.nbytes, end) - page  # an expanded view has more bytes than memory
            ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), _MADV_DONTNEED)
            found = True
    return found


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
