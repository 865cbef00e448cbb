"""What the benchmarks share: CPU time in interleaved rounds, peak memory, the machine's name, and tables in pages."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

_END = "<!-- end of the table -->"


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU time of one call, averaged over `repeats`."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each run, measured in rounds that take every run once, each round in another order."""
    # Short calls are repeated until one sample takes about 50 ms, or the clock's grain would show.
    repeats = {name: max(1, int(0.05 / max(cpu_seconds(run, 2), 1e-6))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples[name].append(cpu_seconds(runs[name], repeats[name]))
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


def peak_mib() -> float:
    """Peak resident set of this process since its mark was reset, in MiB (Linux)."""
    # getrusage would start from the peak of the process that started this one; the kernel's own mark starts anew.
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**10


def growth_mib(run: Callable[[], object]) -> float:
    """MiB by which a call raises this process's resident set at its peak (Linux)."""
    # Resets the mark to what is resident now, so that what was made and thrown away before does not count.
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    before = peak_mib()
    run()
    return peak_mib() - before


def setting(seed: int = 0) -> str:
    """Date, versions, machine and seed, for the line below a table."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    threads = torch.get_num_threads()
    return f"{datetime.date.today()}; {versions}; {_cpu()}, {threads} thread{'s' * (threads > 1)}; seed {seed}"


def _cpu() -> str:
    """Name of this machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a fraction of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def markdown_table(name: str, said: Iterable[str], columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table of the benchmark `name` below paragraphs about it, between the marks that `write_table` looks for."""
    lines = [_start(name), "", *(line for paragraph in said for line in (paragraph, ""))]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", _END])


def write_table(path: Path, name: str, table: str) -> None:
    """Put a `markdown_table` into a page, in the place of the one that is there, if any."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"{_start(name)}{_END}\n"
    before, _, rest = page.partition(_start(name))
    path.write_text(before + table + rest.partition(_END)[2], encoding="utf-8")


def _start(name: str) -> str:
    """The mark before a benchmark's table."""
    return f"<!-- table of {name} -->"
