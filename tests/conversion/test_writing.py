"""Writing behind: the same bytes in the same order, nothing swallowed, and little that waits."""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from st_moe.conversion import writing
from st_moe.conversion.writing import WriteBehind, made_ahead

pytestmark = pytest.mark.timeout(60)


def pieces_of(seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(chance.choice([0, 1, 1000, 70_000])) for _ in range(40)]


def write(path: Path, pieces: list[Any]) -> None:
    with path.open("wb", buffering=0) as file, WriteBehind(file) as behind:
        for piece in pieces:
            behind.write(piece)
        behind.finish()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("between", [1, 100_000, 2**28])
def test_bytes_arrive_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, between: int) -> None:
    monkeypatch.setattr(writing, "_BETWEEN_SYNCS", between)
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(writing.os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    pieces = pieces_of(seed)
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert len(synced) == 1 if between == 2**28 else len(synced) >= 2, "the last time for the rest"


def test_no_more_than_two_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third call returns only when the first buffer is written and may be used again."""
    allowed, written = threading.Semaphore(0), []

    def slow(file: Any, data: bytes) -> None:
        allowed.acquire()
        written.append(data)

    monkeypatch.setattr(writing, "write_all", slow)
    with (tmp_path / "file").open("wb", buffering=0) as file, WriteBehind(file) as behind:
        behind.write(b"1")
        behind.write(b"2")
        assert written == []
        third = threading.Thread(target=behind.write, args=(b"3",))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        allowed.release()
        third.join(10)
        assert not third.is_alive()
        assert written == [b"1"]
        allowed.release(2)
        behind.wait()
        assert written == [b"1", b"2", b"3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["write_all", "fsync"])
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
    monkeypatch.setattr(writing if place == "write_all" else writing.os, place, fail)
    for pieces in ([b"x" * 1000], [b"x" * 1000] * 5):
        calls.clear()
        with pytest.raises(type(error)):
            write(tmp_path / "file", pieces)
    threads = {thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name}
    assert not threads, "left behind"


class Slow:
    """Pieces that take a while to make, the later the shorter, and of which one may be broken."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.count, self.broken = count, broken
        self.lock, self.begun, self.used, self.most = threading.Lock(), 0, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        if number >= self.count:
            raise IndexError(number)
        with self.lock:
            self.begun += 1
            self.most = max(self.most, self.begun - self.used)
        time.sleep(0.02 * (self.count - number) / self.count)
        if number == self.broken:
            raise ValueError(f"piece {number}")
        return number


@pytest.mark.parametrize("threads", [0, 1, 2, 5, 30])
def test_pieces_are_made_ahead_in_order_and_not_too_many(threads: int) -> None:
    pieces = Slow(12)
    found = []
    for piece in made_ahead(pieces, threads):
        found.append(piece)
        pieces.used += 1
    assert found == list(range(12))
    assert min(2, threads) <= pieces.most <= max(1, threads + 1)
    assert list(made_ahead(Slow(0), threads)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_broken_piece_is_an_error_in_its_turn(threads: int) -> None:
    found: list[int] = []
    with pytest.raises(ValueError, match="piece 4"):
        found.extend(made_ahead(Slow(9, broken=4), threads))
    assert found == [0, 1, 2, 3]


def test_who_stops_early_leaves_no_thread_behind() -> None:
    ahead = made_ahead(Slow(1000), 3)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
