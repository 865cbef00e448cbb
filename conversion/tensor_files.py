"""Safetensors files, read and written tensor by tensor: nothing is mapped into memory, and no header is believed.

A file is 8 bytes (little-endian length of the header), the header (JSON), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Element types in the order in which safetensors writes them, the widest first.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The limit of the safetensors library itself, in bytes.
_LONGEST_HEADER = 100_000_000
_CHUNK = 2**20


class StoredTensor(NamedTuple):
    """Where a tensor's bytes lie.

    Attributes:
        key: the tensor's name in the file.
        path: the file.
        dtype: a key of `DTYPES`.
        shape: sizes.
        offset: of the first byte, from the start of the file.
    """

    key: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return num_bytes(self.dtype, self.shape)


def num_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, after every claim of its header has been held against the file.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        return _read_header(path)
    except OSError as error:
        raise ValueError(f"source: {path} must be readable, but {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"source: {path} must be a whole safetensors file, but {error}") from None


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _LONGEST_HEADER:
            raise ValueError(f"its header should be {length} bytes long and the file has {size}")
        text = file.read(length).decode("utf-8")
    header = json.loads(text, object_pairs_hook=without_duplicates)
    if not isinstance(header, dict):
        raise ValueError(f"its header is no JSON object but a {type(header).__name__}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    start = 8 + length
    found = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    expected = start
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != expected:
            kind = "overlaps" if tensor.offset < expected else "leaves a gap behind"
            raise ValueError(f"tensor {name!r} {kind} the tensor before it")
        expected += tensor.num_bytes
    if expected != size:
        kind = "is cut off" if expected > size else "goes on behind its last tensor"
        raise ValueError(f"it {kind}: its tensors end at byte {expected}, the file at {size}")
    return found


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dictionary.

    Raises:
        ValueError: when a name is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One entry of a header, checked."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    for what, sizes in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"tensor {name!r} has the {what} {sizes!r}, no list of sizes")
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes(dtype, shape):
        raise ValueError(f"tensor {name!r}, {dtype} {shape}, does not fit its data_offsets {offsets}")
    return StoredTensor(name, str(path), dtype, tuple(shape), start + offsets[0])


def chunks_of(tensor: StoredTensor) -> Iterator[memoryview]:
    """A tensor's bytes in pieces of a megabyte; a piece is valid until the next one is asked for.

    Raises:
        ValueError: when the file has become shorter.
    """
    buffer = memoryview(bytearray(min(_CHUNK, tensor.num_bytes)))
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.num_bytes, _CHUNK):
            piece = buffer[: tensor.num_bytes - start]
            filled = 0
            while filled < len(piece):  # a read may end early
                count = file.readinto(piece[filled:])
                if not count:
                    raise ValueError(
                        f"source: {tensor.path} has become shorter while it was read; run the command again"
                    )
                filled += count
            yield piece


def mean_chunks_of(tensors: Sequence[StoredTensor]) -> Iterator[memoryview]:
    """As `chunks_of`, of the mean of tensors of one dtype and shape; see `mean_of`."""
    if len(tensors) == 1:
        yield from chunks_of(tensors[0])
        return
    dtype = DTYPES[tensors[0].dtype]
    for chunks in zip(*map(chunks_of, tensors), strict=True):
        yield bytes_of(mean_of([torch.frombuffer(chunk, dtype=dtype) for chunk in chunks])).data


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one dtype and shape, taken in float32 or wider, in their dtype."""
    first = tensors[0]
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    for tensor in tensors[1:]:
        total = total + tensor.to(total)
    return (total / len(tensors)).to(first.dtype)


def read_into(target: Tensor, tensor: StoredTensor) -> None:
    """Fill a contiguous tensor of the same type and number of elements with a stored one."""
    flat = memoryview(bytes_of(target))
    done = 0
    for chunk in chunks_of(tensor):
        flat[done : done + len(chunk)] = chunk
        done += len(chunk)


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor as a writable array, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def count_non_finite(data: Any, dtype: str) -> int:
    """How many of these elements are NaN or infinite; `data` is a writable buffer."""
    if not DTYPES[dtype].is_floating_point or not len(data):
        return 0
    values = torch.frombuffer(data, dtype=DTYPES[dtype])
    # Extremes take no memory, and are NaN or infinite if anything is.
    if all(math.isfinite(extreme) for extreme in torch.aminmax(values)):
        return 0
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in values.split(_CHUNK))


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """The first bytes of a file of these tensors (dtype and shape by name), and the order of their data.

    Bytes and order are those that the safetensors library would write.
    """
    rank = {dtype: place for place, dtype in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name][0]], name.encode("utf-8")))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order
