"""Weights that are mapped from files leave memory as soon as they are read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from st_moe.conversion.processes import return_freed_memory

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
