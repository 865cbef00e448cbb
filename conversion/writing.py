"""Files that are written while what comes next is made, and that are on the disk when they are done."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BETWEEN_SYNCS = 2**28  # bytes; more that the disk does not have yet would have to be waited for at the end


def checkpoint_of_progress(event: str) -> None:
    """Called before every step that changes the disk is taken, or handed to a thread; tests stop a run here."""


def to_disk(descriptor: int) -> None:
    """Have a file's data, or a folder's names, on the disk."""
    checkpoint_of_progress("sync")
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        to_disk(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: Any, data: Any) -> None:
    """Write all bytes of a buffer to an unbuffered file."""
    view = memoryview(data)
    while view:
        # No more at a time than the processor's cache holds.
        view = view[file.write(view[: 2**20]) :]


class Later(NamedTuple):
    """A piece of a file that is still to be made.

    Attributes:
        size: in bytes.
        fill: makes it in a uint8 tensor of that size.
    """

    size: int
    fill: Callable[[Tensor], object]


class WriteBehind:
    """Makes pieces of a file in some threads, writes them in one, and has them on the disk bit by bit in another.

    Pieces are made in buffers that are used again: fresh memory from the system takes as long as writing to it.

    The caller goes on meanwhile, at most `threads` pieces ahead of the one that is written. What goes wrong is raised
    by a later call, at the latest by `finish`.

    Args:
        file: unbuffered and open, until the block that this is used in has ended.
        threads: how many pieces are made at once.
        advance: told the bytes of each piece when it is written, in another thread.
    """

    def __init__(self, file: Any, threads: int, advance: Callable[[int], None]) -> None:
        self._file, self._threads, self._advance = file, threads, advance
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        # Operations that took more processors than there are would only wait for each other.
        self._torch_threads = torch.get_num_threads()
        share = max(1, self._torch_threads // threads)
        self._makers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,))
        self._waiting: deque[Future[None]] = deque()
        self._free: deque[Tensor] = deque()
        self._sync: Future[None] | None = None
        self._since_sync = 0

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for threads in (
                self._writer,
                self._makers,
                self._syncer,
            ):  # the first waits for the next, and asks the last
                threads.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(self._torch_threads)  # for threads to come: it holds for its own thread and for those

    def write(self, piece: Any) -> None:
        """Have a piece written: a buffer, which must stay as it is until `wait`, or one for `Later`."""
        while len(self._waiting) > self._threads:
            self._waiting.popleft().result()
        made = self._makers.submit(self._make, piece) if isinstance(piece, Later) else piece
        self._waiting.append(self._writer.submit(self._write, made))

    def wait(self) -> None:
        """Return when all pieces are written."""
        while self._waiting:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Return when everything is written and on the disk."""
        self.wait()
        if self._sync is not None:
            self._sync.result()
        to_disk(self._file.fileno())

    def _make(self, piece: Later) -> tuple[Tensor, int]:
        """A buffer with the piece at its start, and the piece's size."""
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = torch.empty(0, dtype=torch.uint8)
        if len(buffer) < piece.size:
            del buffer  # before another takes its place
            buffer = torch.empty(piece.size, dtype=torch.uint8)
        piece.fill(buffer[: piece.size])
        return buffer, piece.size

    def _write(self, piece: Any) -> None:
        if isinstance(piece, Future):
            buffer, size = piece.result()
            write_all(self._file, buffer[:size].numpy())
            self._free.append(buffer)
        else:
            size = len(piece)
            write_all(self._file, piece)
        self._advance(size)
        self._since_sync += size
        if self._since_sync >= _BETWEEN_SYNCS and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()  # an error is told to the first that asks, and to nobody else
            self._sync = self._syncer.submit(os.fsync, self._file.fileno())
            self._since_sync = 0
