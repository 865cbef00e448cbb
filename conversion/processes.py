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
from contextlib import contextmanager, suppress
from multiprocessing import current_process, get_context
from pathlib import Path
from tempfile import gettempdir
from threading import Thread
from traceback import format_exc
from typing import Any, Protocol, TypeVar

import torch
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


class Steps(Protocol):
    """What a generator yields, asked for one by one."""

    def begin(self) -> None:
        """Have the next one made meanwhile, where somebody else can."""

    def __next__(self) -> Any:
        """The next one; what the generator raises is raised here."""

    def close(self) -> None:
        """No more will be asked for."""


@contextmanager
def steps_in_a_child_if_light(steps: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Steps]:
    """A generator's steps: in a child, whose memory ends with the block, as long as this process has no model classes.

    Raises:
        ChildProcessError: in the block, when the child ends without an answer.
    """
    light = sys.platform == "linux" and "transformers.modeling_utils" not in sys.modules
    if light and not current_process().daemon:  # those may not have children
        with Child(steps, *arguments) as child:
            yield child
    else:
        yield _StepsHere(steps(*arguments))


def in_a_child_if_light(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns, as the one step of `steps_in_a_child_if_light`."""
    with steps_in_a_child_if_light(_only, function, *arguments) as steps:
        return next(steps)


class _StepsHere:
    """Steps in this process."""

    def __init__(self, steps: Iterator[Any]) -> None:
        self._steps = steps

    def begin(self) -> None:
        """Nobody else can."""

    def __next__(self) -> Any:
        return next(self._steps)

    def close(self) -> None:
        """What was imported stays."""


class Child:
    """Steps in a forked process, which shares what is imported here and ends with the block that this is used in.

    Args:
        steps: a generator function.
        arguments: of it.
    """

    def __init__(self, steps: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        ends = (self._pipe, theirs)
        self._process = context.Process(target=_live, args=(ends, os.getpid(), steps, arguments), daemon=True)
        self._begun = False
        try:
            with _undisturbed():
                self._process.start()
            theirs.close()
        except KeyboardInterrupt:
            if self._process.pid is not None:
                self._process.kill()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._process.kill()
        self.close()
        if kind is KeyboardInterrupt:
            Console(stderr=True).show_cursor()  # which the child's bar had hidden

    def close(self) -> None:
        """Return when the process has ended."""
        if self._begun:
            self._process.kill()
        self._pipe.close()  # which the child, where it waits for another step, takes as the end
        self._process.join()

    def begin(self) -> None:
        """Have the next step made, and do not wait for it."""
        self._ask(meanwhile=True)

    def _ask(self, meanwhile: bool) -> None:
        if not self._begun:
            with suppress(ConnectionError):  # it is gone, which is told to whoever waits for the step
                self._pipe.send(meanwhile)
        self._begun = True

    def __next__(self) -> Any:
        """What the next step yields.

        Raises:
            ChildProcessError: when the child ends without an answer.
        """
        self._ask(meanwhile=False)
        try:
            answer, error, trace = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            reason = "; was there enough memory?" if code == -signal.SIGKILL else ""
            raise ChildProcessError(f"a step of the conversion ended with code {code}{reason}") from None
        self._begun = False
        if error is not None:
            raise error from ChildTrace(trace)
        return answer


@contextmanager
def _undisturbed() -> Iterator[None]:
    """An interruption waits for the end of the block: in what Python does around a fork it would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _only(function: Callable[..., Result], *arguments: Any) -> Iterator[Result]:
    yield function(*arguments)


class ChildTrace(Exception):
    """Where in a child its exception was raised, as text."""

    def __str__(self) -> str:
        return f"in a child:\n{self.args[0]}"


def return_freed_memory() -> None:
    """Give the system what the C library keeps for later, which can be several tens of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc alone has it
    if trim is not None:
        trim(0)


def _live(ends: tuple[Any, Any], parent: int, steps: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    """Go through the steps as the parent asks for them; die with the parent, which nobody else could stop."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    ends[0].close()  # or the parent's end would stay open here when the parent closes it
    _spare_memory(libc)
    # OpenMP's pool belongs to the thread that started it and is gone after a fork, where that thread would wait for it
    # forever. A new thread starts a pool of its own.
    thread = Thread(target=_answer, args=(ends[1], steps, arguments))
    thread.start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        thread.join()
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)  # the parent was interrupted too, and says so


def _answer(pipe: Any, steps: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    """Send what each step yields, or what goes wrong, whenever one is asked for."""
    left, threads = steps(*arguments), torch.get_num_threads()
    while True:
        try:
            meanwhile = pipe.recv()
        except EOFError:
            return
        # Threads of one operation wait for each other, and do not rest while they do: too many cost all of them time.
        torch.set_num_threads(max(1, threads // 2) if meanwhile else threads)
        answer: tuple[Any, BaseException | None, str]
        try:
            answer = next(left), None, ""
        except BaseException as error:  # noqa: BLE001 -- raised again by the parent
            answer = None, _that_travels(error), format_exc()
        pipe.send(answer)
        del answer
        return_freed_memory()


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
    os.environ |= {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    if _HUGE_PAGES.exists():
        # Of PyTorch, which looks when it first allocates: the system hands large tensors out five times as fast.
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    gc.set_threshold(50_000, 20, 100)  # imports make many objects, and a third of their time went into looking at them
