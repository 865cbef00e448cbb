"""Writing a planned mixture tensor by tensor, with at most one layer's experts in memory; a killed run goes on.

Light on purpose: nothing here imports model classes, which take more memory than the conversion itself.
Shape letters: H hidden size, I FFN width, E experts, P = 2 if gated else 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from st_moe.conversion.processes import return_freed_memory
from st_moe.conversion.recipes import RECIPES, FFNTensors, LayerTensors, Pieces
from st_moe.conversion.tensor_files import (
    DTYPES,
    StoredTensor,
    bytes_of,
    count_non_finite,
    mean_chunks_of,
    num_bytes,
    read_into,
)
from st_moe.conversion.writing import Later, WriteBehind, checkpoint_of_progress, sync_folder, to_disk

logger = logging.get_logger(__name__)


class Output(NamedTuple):
    """One tensor of the result: a copy of stored bytes, or a part of a sparse block.

    Attributes:
        name: as in the result's files.
        dtype, shape: as in safetensors.
        stored: where its bytes are copied from; several are averaged; none if it is made.
        layer: index of the decoder layer whose block it is made for; -1 if it is copied.
        part: its name in the sparse block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...] = ()
    layer: int = -1
    part: str = ""


class Shard(NamedTuple):
    """One file of the result: its name, its first bytes, and its tensors in the order of their data."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(num_bytes(output.dtype, output.shape) for output in self.outputs)


class StoredFFN(NamedTuple):
    """A dense FFN in a file: its projections, out last; no biases if it has none."""

    weights: tuple[StoredTensor, ...]
    biases: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class SparseLayer:
    """What one sparse block is made from.

    Attributes:
        num_experts, num_experts_per_tok: E and K.
        sources: the dense FFN of each source model.
        transposed: whether the weights are stored as [in, out] (Conv1D).
        in_name: name of the experts' first parameter.
        fresh: the parts that no recipe makes, ready in a file.
        generator: state of the layer's generator when the recipe gets it, in hexadecimal.
    """

    num_experts: int
    num_experts_per_tok: int
    sources: tuple[StoredFFN, ...]
    transposed: bool
    in_name: str
    fresh: Mapping[str, StoredTensor]
    generator: str


@dataclass(frozen=True)
class Plan:
    """Everything about a conversion that is known before anything is written.

    Attributes:
        sources: the checkpoint's folder; of models that are merged, all of theirs.
        recipe, options: how experts are made.
        shards: the files of weights.
        layers: the sparse blocks by layer index.
        fresh: SHA-256 of the parts that no recipe makes.
        texts: other files that follow from the config, by name.
        files: size and time of change (ns) of the sources' files.
        computed: bytes of each group of tensors that is computed from the sources' files before anything is written.
        facts: what the model card and the printed plan say.
    """

    sources: tuple[str, ...]
    recipe: str
    options: Mapping[str, Any]
    shards: tuple[Shard, ...]
    layers: Mapping[int, SparseLayer]
    fresh: str
    texts: Mapping[str, str]
    files: Mapping[str, tuple[int, int]]
    computed: tuple[int, ...]
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan: two runs with the same digest write the same bytes."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the most weights that one process holds: a layer's block, one tensor for the proof, a group thrice.

        The host stacks a group's tensors, then joins the stacks.
        """
        sizes: dict[Any, int] = {}
        for output in (output for shard in self.shards for output in shard.outputs):
            place = output.layer if output.layer >= 0 else output.name
            sizes[place] = sizes.get(place, 0) + num_bytes(output.dtype, output.shape)
        return max([*sizes.values(), *(3 * size for size in self.computed)])


def fingerprint(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds of a file."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class Journal:
    """What a run has finished, line by line, so that a killed one can go on.

    The first line names the plan; each other line one shard that is whole and safe on the disk, with the number of NaN
    and infinite values that were found in the source's tensors while it was written.

    Args:
        folder: the workshop; whatever another plan has left there is removed.
        digest: of the plan.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.path = folder / "journal.jsonl"
        lines = self._lines()
        if lines and lines[0] != {"plan": digest}:
            logger.warning(f"{folder}: left by a run of another plan or another source, so everything starts anew.")
            lines = []
        self.finished = {line["shard"]: line for line in lines[1:]}
        self.non_finite: dict[str, int] = {}
        for line in self.finished.values():
            self.non_finite |= line["non_finite"]
        if not lines:
            for path in (self.path, folder / "model"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        (folder / "model").mkdir(exist_ok=True)
        # Written whole once more, without a last line that was cut off.
        self._write([{"plan": digest}, *self.finished.values()])

    def _lines(self) -> list[dict[str, Any]]:
        """The lines that are whole."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def _write(self, lines: list[dict[str, Any]]) -> None:
        fresh = self.path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            to_disk(file.fileno())
        fresh.rename(self.path)

    def add(self, shard: str, size: int, non_finite: Mapping[str, int]) -> None:
        """Note a shard that is whole and safe on the disk."""
        line = {"shard": shard, "size": size, "non_finite": dict(non_finite)}
        self.finished[shard] = line
        self.non_finite |= non_finite
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            to_disk(file.fileno())


def write_shards(plan: Plan, workshop: Path, journal: Journal, advance: Callable[[int], None]) -> None:
    """Write every shard that the journal does not have yet.

    Args:
        plan: what to write.
        workshop: holds the folder `model`, which is filled.
        journal: of this plan.
        advance: told the bytes that are written, as they are, in another thread.

    Raises:
        ValueError: when a file of the source changes meanwhile.
        OSError: when the disk is full; shards that are whole stay for the next run.
    """
    maker = _LayerMaker(plan)
    for shard in plan.shards:
        path = workshop / "model" / shard.name
        if shard.name in journal.finished and path.is_file() and path.stat().st_size == shard.num_bytes:
            advance(shard.num_bytes)
            continue
        maker.non_finite = {}
        unfinished = path.with_name(f"{shard.name}.unfinished")
        try:
            with unfinished.open("wb", buffering=0) as file, WriteBehind(file, maker.threads, advance) as behind:
                for piece in _pieces(shard, maker, behind.wait):
                    checkpoint_of_progress("write")
                    behind.write(piece)
                    del piece
                behind.finish()
        except OSError:
            unfinished.unlink(missing_ok=True)  # what is left on a full disk had better be whole
            raise
        checkpoint_of_progress("rename")
        unfinished.rename(path)
        sync_folder(path.parent)
        for name, before in plan.files.items():
            if fingerprint(name) != before:
                raise ValueError(f"source: {name} has changed while it was read; run the command again")
        journal.add(shard.name, shard.num_bytes, maker.non_finite)


def _pieces(shard: Shard, maker: _LayerMaker, settle: Callable[[], None]) -> Iterator[Any]:
    """A file as buffers, made or for later; `settle` returns when nobody needs earlier ones any more."""
    yield shard.header
    for output in shard.outputs:
        if output.stored:
            bad = 0
            for chunk in mean_chunks_of(output.stored):
                bad += count_non_finite(chunk, output.dtype)
                yield bytes(chunk)
            maker.note(output.stored[0], bad)
            continue
        if maker.layer != output.layer and maker.holds_layer:
            settle()
        tensor = maker.part(output)
        if isinstance(tensor, Pieces):
            size = num_bytes(output.dtype, output.shape[1:])
            yield from (Later(size, partial(_fill, tensor, number)) for number in range(len(tensor)))
        else:
            # Expert by expert, so that what is no plain memory is copied in pieces only.
            yield from (bytes_of(piece.contiguous()) for piece in (tensor if tensor.ndim == 3 else (tensor,)))
        del tensor  # which would keep a layer's memory while the next one is made


def _fill(pieces: Pieces, number: int, buffer: Tensor) -> None:
    pieces.fill(number, buffer.view(pieces.dtype).view(pieces.shape[1:]))


class _Sources(Sequence[FFNTensors]):
    """FFNs of one layer of several models, each read when it is asked for; only the last one stays in memory."""

    def __init__(self, read: Callable[[int], FFNTensors], count: int) -> None:
        self._read, self._count = read, count
        self._last: tuple[int, FFNTensors] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if self._last is None or self._last[0] != index:
            self._last = None  # freed before the next one takes its place
            self._last = index, self._read(index)
        return self._last[1]


class _LayerMaker:
    """Makes the tensors of sparse blocks, and keeps those of one layer.

    Args:
        plan: the conversion.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # With the one that is written no more pieces at once than a layer has, of two weights for each expert.
        fewest = min((layer.num_experts for layer in plan.layers.values()), default=1)
        self.threads = max(1, min(torch.get_num_threads(), fewest // 2))
        self.layer = -1
        self.made: dict[str, Tensor | Pieces] = {}
        self.non_finite: dict[str, int] = {}

    @property
    def holds_layer(self) -> bool:
        """Whether what is made of the present layer is in memory, and not one FFN seen many times, or still to make."""
        tensors = (made for made in self.made.values() if isinstance(made, Tensor))
        return any(tensor.ndim == 3 and tensor.stride(0) != 0 for tensor in tensors)

    def part(self, output: Output) -> Tensor | Pieces:
        """A tensor of a block, as the plan wants it.

        Raises:
            RuntimeError: when a recipe makes another shape or dtype than the config says.
        """
        if self.layer != output.layer:
            held, self.made = self.holds_layer, {}  # freed before the next layer takes its place
            if held:
                return_freed_memory()
            self.made, self.layer = self._make(self.plan.layers[output.layer]), output.layer
        tensor = self.made[output.part]
        if (tuple(tensor.shape), tensor.dtype) != (output.shape, DTYPES[output.dtype]):
            raise RuntimeError(
                f"{output.name}: recipe {self.plan.recipe!r} made {tensor.dtype} {tuple(tensor.shape)} where the "
                f"config asks for {DTYPES[output.dtype]} {output.shape}; please report this"
            )
        return tensor

    def note(self, stored: StoredTensor, count: int) -> None:
        """Keep how many values of a source's tensor are NaN or infinite."""
        if count:
            self.non_finite[stored.key] = count

    def _make(self, layer: SparseLayer) -> dict[str, Tensor | Pieces]:
        """Every tensor of one block by its name there."""
        made = self._run_recipe(layer)
        found: dict[str, Tensor | Pieces] = {part: self._read([stored]) for part, stored in layer.fresh.items()}
        parts = (layer.in_name, "down_proj", f"{layer.in_name}_bias", "down_proj_bias")
        found |= {f"experts.{part}": t for part, t in zip(parts, made.experts, strict=True) if t is not None}
        if made.shared is not None:
            names = ["gate_proj", "up_proj"] if layer.in_name == "gate_up_proj" else ["up_proj"]
            w_in, w_out, b_in, b_out = made.shared
            for kind, inner, outer in (("weight", w_in, w_out), ("bias", b_in, b_out)):
                if inner is not None and outer is not None:
                    pieces = zip((*names, "down_proj"), (*inner.chunk(len(names)), outer), strict=True)
                    found |= {f"shared_experts.{name}.{kind}": piece for name, piece in pieces}
        return found

    def _run_recipe(self, layer: SparseLayer) -> LayerTensors:
        generator = torch.Generator()
        generator.set_state(torch.frombuffer(bytearray.fromhex(layer.generator), dtype=torch.uint8))
        recipe, options = RECIPES[self.plan.recipe], self.plan.options
        sources = _Sources(lambda index: self._read_ffn(layer.sources[index], layer.transposed), len(layer.sources))
        return recipe.make(sources, layer.num_experts, layer.num_experts_per_tok, generator, options)

    def _read_ffn(self, ffn: StoredFFN, transposed: bool) -> FFNTensors:
        weights = (ffn.weights[:-1], ffn.weights[-1:])
        w_in, w_out = (self._read(stored, transposed, count=True) for stored in weights)
        if not ffn.biases:
            return FFNTensors(w_in, w_out)
        b_in, b_out = (self._read(stored, count=True) for stored in (ffn.biases[:-1], ffn.biases[-1:]))
        return FFNTensors(w_in, w_out, b_in, b_out)

    def _read(
        self, stored: list[StoredTensor] | tuple[StoredTensor, ...], transposed: bool = False, count: bool = False
    ) -> Tensor:
        """Stored tensors as one, joined along the first axis of what is returned."""
        if transposed and len(stored) > 1:
            return torch.cat([self._read([tensor], transposed, count) for tensor in stored])
        rows = [tensor.shape[0] for tensor in stored] if stored[0].shape else [1]
        shape = (sum(rows), *stored[0].shape[1:]) if stored[0].shape else ()
        whole = torch.empty(shape, dtype=DTYPES[stored[0].dtype])
        for tensor, target in zip(stored, whole.split(rows) if shape else [whole], strict=True):
            read_into(target, tensor)
            if count:
                self.note(tensor, count_non_finite(bytes_of(target), tensor.dtype))
        return whole.t() if transposed else whole
