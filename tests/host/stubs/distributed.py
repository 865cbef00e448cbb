"""Stands in for the host's process tools, which its source distribution leaves out: CPU ranks over gloo."""

import datetime
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
RUN_TIMEOUT_SECONDS = 180.0
START_METHOD = "forkserver"
"""The server imports the libraries once and forks a rank from there, which saves seconds for each rank."""

mp.get_context(START_METHOD).set_forkserver_preload(["torch", "transformers.testing_utils", "st_moe"])


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate ``function(rank, *args)`` so that a call runs it in ``world_size`` ranks of one gloo group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = Path(folder) / "rendezvous"
                _start_rank_processes(_in_process_group, (function, world_size, str(rendezvous), args), world_size)

        return run

    return decorate


def _start_rank_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Run ``function(rank, *args)`` in every rank; the first failure or the time limit ends all of them."""
    context = mp.start_processes(_single_threaded, (function, args), nprocs, join=False, start_method=START_METHOD)
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{nprocs} ranks of {function.__name__} did not end in {RUN_TIMEOUT_SECONDS:.0f} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _single_threaded(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the ranks share the machine's cores
    function(rank, *args)


def _in_process_group(
    rank: int, function: Callable[..., None], world_size: int, rendezvous: str, args: tuple[Any, ...]
) -> None:
    """Join the group that meets in the file ``rendezvous``, run the function, leave the group."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    # A rank that fails at once must not leave another one in the middle of connecting, which would fail for that alone.
    dist.barrier()
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    """The host calls it with the rank, but every CPU rank lives on the one CPU."""
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """CPU ranks have no device of their own to select."""
