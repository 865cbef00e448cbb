"""Writing behind: the same bytes in the same order, nothing swallowed, and few pieces that wait."""

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from st_moe.conversion import writing
from st_moe.conversion.writing import Later, WriteBehind

pytestmark = pytest.mark.timeout(60)


def write(path: Path, pieces: Iterable[Any], threads: int = 2) -> list[int]:
    told: list[int] = []
    with path.open("wb", buffering=0) as file, WriteBehind(file, threads, told.append) as behind:
        for piece in pieces:
            behind.write(piece)
        behind.finish()
    return told


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


def later(data: bytes, seconds: float = 0) -> Later:
    def fill(buffer: Tensor) -> None:
        assert buffer.nbytes == len(data)
        time.sleep(seconds)
        buffer.numpy()[:] = list(data)

    return Later(len(data), fill)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("between", [1, 100_000, 2**28])
def test_bytes_arrive_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, threads: int, between: int
) -> None:
    """Buffers, and pieces that take their time to be made, mixed."""
    monkeypatch.setattr(writing, "_BETWEEN_SYNCS", between)
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(writing.os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    chance = random.Random(seed)
    expected = [chance.randbytes(chance.choice([0, 1, 1000, 70_000])) for _ in range(40)]
    pieces = [data if chance.random() < 0.5 else later(data, chance.choice([0, 0.003])) for data in expected]
    assert write(tmp_path / "file", pieces, threads) == [len(data) for data in expected]
    assert (tmp_path / "file").read_bytes() == b"".join(expected)
    assert len(synced) == 1 if between == 2**28 else len(synced) >= 2, "the last time for the rest"
    assert not threads_left()


@pytest.mark.parametrize(("makers", "share"), [(1, 5), (2, 2), (7, 1)])
def test_makers_share_the_threads_of_operations(tmp_path: Path, makers: int, share: int) -> None:
    """More would wait for each other; who called, and whoever starts later, has as many as before."""
    found: list[int] = []

    def make(buffer: Tensor | None = None) -> None:
        found.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        write(tmp_path / "file", [Later(1, make)] * 3, makers)
        assert found == [share] * 3
        later = threading.Thread(target=make)
        later.start()
        later.join()
        assert (found[3], torch.get_num_threads()) == (5, 5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_few_pieces_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """One that is written, and as many as there are threads that make them; the next call waits for the first."""
    allowed, written, lock = threading.Semaphore(0), [], threading.Lock()
    made: list[int] = []

    def slow(file: Any, data: Any) -> None:
        allowed.acquire()
        written.append(bytes(data))

    def make(number: int, buffer: Tensor) -> None:
        with lock:
            made.append(number)
        buffer.fill_(number)

    monkeypatch.setattr(writing, "write_all", slow)
    with (tmp_path / "file").open("wb", buffering=0) as file, WriteBehind(file, threads, lambda count: None) as behind:
        for number in range(threads + 1):
            behind.write(Later(1, partial(make, number)))
        late = threading.Thread(target=behind.write, args=(Later(1, partial(make, 99)),))
        late.start()
        late.join(0.2)
        assert late.is_alive()
        assert sorted(made) == list(range(threads + 1))
        assert written == []
        allowed.release()
        late.join(10)
        assert not late.is_alive()
        assert written == [b"\0"]
        allowed.release(threads + 1)
        behind.wait()
        assert written == [*(bytes([number]) for number in range(threads + 1)), bytes([99])]


def test_pieces_are_made_at_once(tmp_path: Path) -> None:
    """Each waits until the other is begun."""
    both = threading.Barrier(2, timeout=30)

    assert write(tmp_path / "file", [Later(1, lambda buffer: both.wait())] * 6) == [1] * 6


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_are_made_in_few_buffers(tmp_path: Path, threads: int) -> None:
    """One for each that is made, one for the one that is written; a larger piece gets a larger one."""
    buffers: set[int] = set()
    kept: list[Tensor] = []  # so that no two have the same address

    def make(buffer: Tensor) -> None:
        buffers.add(buffer.data_ptr())
        kept.append(buffer)
        buffer.fill_(len(buffer) % 251)

    sizes = [4000, *[300] * 30, 1, 4000, 0, *[4001] * 30]
    write(tmp_path / "file", [Later(size, make) for size in sizes], threads)
    assert 1 <= len(buffers) <= 2 * (threads + 1) + 2 < 10
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([size % 251]) * size for size in sizes)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["write_all", "fsync", "make"])
def test_what_goes_wrong_in_a_thread_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    """Also when only a sync on the way fails, for the system tells of a lost write but once."""
    calls: list[Any] = []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(writing, "_BETWEEN_SYNCS", 1000)
    if place != "make":
        monkeypatch.setattr(writing if place == "write_all" else writing.os, place, fail)
    piece: bytes | Later = Later(1000, fail) if place == "make" else b"x" * 1000
    for pieces in ([piece], [piece] * 9):
        calls.clear()
        with pytest.raises(type(error)):
            write(tmp_path / "file", pieces)
    assert not threads_left()


def test_an_error_of_the_caller_ends_the_threads(tmp_path: Path) -> None:
    """Nothing is written to a file that is closed, and what is not begun is left."""
    made: list[int] = []

    def pieces() -> Iterator[Any]:
        for number in (1, 2):
            yield Later(1, lambda buffer, number=number: (time.sleep(0.05), made.append(number)))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "file", pieces(), 1)
    assert not threads_left()
    assert len(made) <= 2
