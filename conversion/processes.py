"""One run per destination, and steps of it in processes of their own that do not outlive it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import gettempdir
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_M_ARENA_MAX = -8  # of glibc's mallopt
_INTERRUPTED = 130
_PATIENCE = 5.0  # seconds in which a process that is being killed is gone


@contextmanager
def only_run(target: Path) -> Iterator[None]:
    """Refuse a second run for one destination while a first is at work on this machine.

    The lock is a file in the folder of temporary files, which the system lets go of when the process ends, however.

    Raises:
        ValueError: when another run holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    digest = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    path = Path(gettempdir()) / f"st_moe-{os.getuid()}-{digest}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        last = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > last:
                    raise ValueError(
                        f"destination: another run is at work on {target}; wait for it, or stop it and run this again"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns: run in a child, whose memory ends with it, where no model classes are in this process.

    Raises:
        RuntimeError: when the child ends without an answer; what the function raises is raised here.
    """
    if sys.platform != "linux" or "transformers.modeling_utils" in sys.modules:
        return function(*arguments)
    return in_a_child(function, *arguments)


def in_a_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a forked process, which shares what is imported here and ends with it; see `apart`."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, os.getpid(), function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        answer, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"A process of the conversion ended with code {process.exitcode}; was there enough memory?"
        ) from None
    process.join()
    if error is not None:
        raise error
    return answer


def return_freed_memory() -> None:
    """Give the system what the C library keeps for later, which can be several tens of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc alone has it
    if trim is not None:
        trim(0)


def _answer(sender: Any, parent: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run the function and send what comes of it; die with the parent, which nobody else could stop."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _spare_memory(libc)
    answers: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            answers.append((function(*arguments), None))
        except Exception as error:  # noqa: BLE001 -- raised again by the parent
            answers.append((None, error))

    # OpenMP's pool belongs to the thread that started it and is gone after a fork, where that thread would wait for it
    # forever. A new thread starts a pool of its own.
    thread = Thread(target=run)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)  # the parent was interrupted too, and says so
    if answers:
        sender.send(answers[0])


def _spare_memory(libc: Any) -> None:
    """Keep no memory for later that is of little use in a process that soon ends."""
    if hasattr(libc, "mallopt"):  # glibc alone has it
        libc.mallopt(_M_ARENA_MAX, 1)
    # oneDNN would keep a kernel for every number of rows that it has seen.
    os.environ |= {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    gc.set_threshold(50_000, 20, 100)  # imports make many objects, and a third of their time went into looking at them
