"""Weights that are mapped from files leave memory as soon as they are read."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from st_moe.conversion.processes import return_freed_memory

_MADV_DONTNEED = 4  # of Linux' madvise
_LEAST_GIVEN_BACK = 4 * 2**20  # bytes in one operation; less goes with its module, and is not worth the look
_BETWEEN_RETURNS = 2**27  # bytes read; what operations have freed is there for the next ones until then, and mapped


class GivingBack(TorchFunctionMode):
    """Gives the pages of weights that are mapped from files back to the system after each operation that read them.

    What is in memory at once is then what one operation reads, such as one expert, and not what one module holds. Pages
    that are needed again come from the system's cache of files. Only on Linux; elsewhere nothing is given back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mappings: list[tuple[int, int]] = []
        self._since_return = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation as ever."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and sys.platform == "linux":
            tensors = [each for each in _tensors((*args, *kwargs.values())) if each.layout == torch.strided]
            large = _size(tensors) >= _LEAST_GIVEN_BACK  # which is sooner seen than what was read
            read = [tensor for tensor in tensors if _reads(tensor, result)] if large else []
            if _size(read) >= _LEAST_GIVEN_BACK:
                self._give_back(read)
        return result

    def _give_back(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give the pages of tensors back that are mapped from a file and as they are there."""
        if _size(tensor for tensor in tensors if self._mapping_of(tensor) is None) >= _LEAST_GIVEN_BACK:
            self._mappings = _file_mappings()
        for tensor in tensors:
            mapping = self._mapping_of(tensor)
            # What was written to would be lost. Nobody knows of an inference tensor; of others the version tells.
            if mapping is not None and not tensor.is_inference() and not tensor._version:
                page = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
                last = min(tensor.data_ptr() + tensor.nbytes, mapping[1])  # an expanded view has more bytes than memory
                ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(last - page), _MADV_DONTNEED)
                self._since_return += last - page
        if self._since_return >= _BETWEEN_RETURNS:
            return_freed_memory()
            self._since_return = 0

    def _mapping_of(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The mapping that a tensor lies in, of those that are known and still there."""
        first = tensor.data_ptr()
        mapping = next((limits for limits in self._mappings if limits[0] <= first < limits[1]), None)
        return mapping if mapping is not None and _is_there(mapping) else None


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _reads(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether an operation that made this result has read a (strided) tensor in memory, and not made a view of it."""
    plain = tensor.device.type == result.device.type == "cpu" and result.layout == torch.strided
    return plain and tensor.untyped_storage().data_ptr() != result.untyped_storage().data_ptr()


def _is_there(mapping: tuple[int, int]) -> bool:
    """Whether memory within these very limits is mapped from a file; takes a hundredth of the time of reading all."""
    try:
        # Only who asks for the file is told when there is none any more: that the name exists may be remembered.
        os.readlink(f"/proc/self/map_files/{mapping[0]:x}-{mapping[1]:x}")
    except OSError:
        return False
    return True


def _file_mappings() -> list[tuple[int, int]]:
    """First and last address, exclusive, of each part of this process's memory that is mapped from a file."""
    fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_bytes().splitlines())
    # The fifth field is the number of the file; memory of its own has none.
    ranges = (row[0].split(b"-") for row in fields if row[4] != b"0")
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
