"""One run per destination, and steps of it in processes of their own that do not outlive it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import current_process, get_context
from pathlib import Path
from tempfile import gettempdir
from threading import Thread
from traceback import format_exc
from typing import Any, TypeVar

from rich.console import Console

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_M_ARENA_MAX = -8  # of glibc's mallopt
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # where the kernel has them
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
    last = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:  # the run that held it has removed it, as it does below
            pass
        except BlockingIOError:
            if time.monotonic() > last:
                os.close(descriptor)
                raise ValueError(
                    f"destination: another run is at work on {target}; wait for it, or stop it and run this again"
                ) from None
            time.sleep(0.05)
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def in_a_child_if_light(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns: run in a child, whose memory ends with it, as long as this process has no model classes.

    Raises:
        ChildProcessError: when the child ends without an answer; what the function raises is raised here.
    """
    light = sys.platform == "linux" and "transformers.modeling_utils" not in sys.modules
    if light and not current_process().daemon:  # those may not have children
        return in_a_child(function, *arguments)
    return function(*arguments)


def in_a_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a forked process, which shares what is imported here and ends with it."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, os.getpid(), function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        answer, error, trace = receiver.recv()
    except EOFError:
        process.join()
        reason = "; was there enough memory?" if process.exitcode == -signal.SIGKILL else ""
        raise ChildProcessError(f"a step of the conversion ended with code {process.exitcode}{reason}") from None
    except KeyboardInterrupt:
        process.kill()
        process.join()
        Console(stderr=True).show_cursor()  # which the child's bar had hidden
        raise
    process.join()
    if error is not None:
        raise error from ChildTrace(trace)
    return answer


class ChildTrace(Exception):
    """Where in a child its exception was raised, as text."""

    def __str__(self) -> str:
        return f"in a child:\n{self.args[0]}"


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
    answers: list[tuple[Any, BaseException | None, str]] = []

    def run() -> None:
        try:
            answers.append((function(*arguments), None, ""))
        except BaseException as error:  # noqa: BLE001 -- raised again by the parent
            answers.append((None, _that_travels(error), format_exc()))

    # OpenMP's pool belongs to the thread that started it and is gone after a fork, where that thread would wait for it
    # forever. A new thread starts a pool of its own.
    thread = Thread(target=run)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)  # the parent was interrupted too, and says so
    sender.send(answers[0])


def _that_travels(error: BaseException) -> BaseException:
    """An exception that comes through a pipe: itself, or if it cannot be packed or unpacked, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 -- whatever its methods raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _spare_memory(libc: Any) -> None:
    """Keep no memory for later that is of little use in a process that soon ends."""
    if hasattr(libc, "mallopt"):  # glibc alone has it
        libc.mallopt(_M_ARENA_MAX, 1)
    # oneDNN would keep a kernel for every number of rows that it has seen.
    os.environ |= {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    if _HUGE_PAGES.exists():
        # Of PyTorch, which looks when it first allocates: the system hands large tensors out five times as fast.
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    gc.set_threshold(50_000, 20, 100)  # imports make many objects, and a third of their time went into looking at them
