"""Files that are written while what comes next is made, and that are on the disk when they are done."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def made_ahead(pieces: Sequence[Any], threads: int) -> Iterator[Any]:
    """The pieces in their order, of which so many are made, each in a thread of its own, while one is used.

    With one thread none is made ahead. An error of a piece is raised in its turn.
    """
    if threads < 2:
        yield from pieces
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for number in range(len(pieces)):
            waiting.append(pool.submit(pieces.__getitem__, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class WriteBehind:
    """Writes a file in one thread and has it on the disk bit by bit in another, while the caller makes what comes next.

    Two pieces at most wait to be written. What goes wrong is raised by a later call, at the latest by `finish`.

    Args:
        file: unbuffered and open, until the block that this is used in has ended.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None
        self._since_sync = 0

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *error: object) -> None:
        for thread in (self._writer, self._syncer):
            thread.shutdown(cancel_futures=True)

    def write(self, data: Any) -> None:
        """Have a buffer written; it must stay as it is until `wait` or two more calls."""
        while len(self._waiting) > 1:
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(self._write, data))

    def wait(self) -> None:
        """Return when all buffers are written."""
        while self._waiting:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Return when everything is written and on the disk."""
        self.wait()
        if self._sync is not None:
            self._sync.result()
        to_disk(self._file.fileno())

    def _write(self, data: Any) -> None:
        write_all(self._file, data)
        self._since_sync += len(data)
        if self._since_sync >= _BETWEEN_SYNCS and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()  # an error is told to the first that asks, and to nobody else
            self._sync = self._syncer.submit(os.fsync, self._file.fileno())
            self._since_sync = 0
