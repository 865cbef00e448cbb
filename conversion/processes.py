"""One run per destination, and a planner in a process of its own that does not outlive its parent."""

from __future__ import annotations

import ctypes
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
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # of Linux' prctl
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


def in_a_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a forked process, which shares what is imported here and ends with it.

    Raises:
        RuntimeError: when the process ends without an answer; what the function raises is raised here.
    """
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
            f"The process that plans the conversion ended with code {process.exitcode}; was there enough memory?"
        ) from None
    process.join()
    if error is not None:
        raise error
    return answer


def _answer(sender: Any, parent: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run the function and send what comes of it; die with the parent, which nobody else could stop."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)  # a pool of threads does not survive the fork, and would be waited for
    answer: tuple[Any, Exception | None]
    try:
        answer = function(*arguments), None
    except Exception as error:  # noqa: BLE001 -- raised again by the parent
        answer = None, error
    sender.send(answer)
