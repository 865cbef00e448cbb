"""Time and memory of the routers on this CPU: `python -m benchmarks.routing`.

Time of a forward pass in training mode without gradients, from router logits that are given (`--from logits`, the
strict comparison: what a router adds to a bare softmax and top-k) or from hidden states (`--from hidden`, the router's
matrix product included; mixture_of_depths has one expert and is no row). Where st-moe-pytorch is installed, its gating
is timed too (K >= 2 only). One thread, CPU time, interleaved rounds, medians: the ratios hold on a busy machine, the
milliseconds do not. `--memory` adds the growth of a fresh process's peak resident set over one pass, weights and inputs
not counted.

Shape letters: T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.measure import growth_mib, interleaved, setting
from st_moe import STMoEConfig
from st_moe.modeling.routing import router_class

TOKENS, HIDDEN, SEQUENCES = 8192, 256, 4
SIZES = tuple((experts, choices) for experts in (8, 64, 128) for choices in (1, 2, 8))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REFERENCE = "st-moe-pytorch"

#: Rows by name: fields of the config. "bare" is not a router: softmax, top-k and the division by the sum.
ROUTERS: dict[str, dict[str, Any]] = {
    "bare": {},
    "top_k": {"router_type": "top_k"},
    "capacity": {"router_type": "top_k", "capacity_factor": 1.25},
    "capacity, by probability": {"router_type": "top_k", "capacity_factor": 1.25, "drop_priority": "router_prob"},
    "noisy_top_k": {"router_type": "noisy_top_k"},
    "sigmoid_top_k": {"router_type": "sigmoid_top_k"},
    "coordinate_descent": {"router_type": "coordinate_descent"},
    "top_any": {"router_type": "top_any"},
    "expert_choice": {"router_type": "expert_choice", "allow_non_causal_routing": True},
    "soft": {"router_type": "soft", "allow_non_causal_routing": True},
    "hash": {"router_type": "hash", "hash_by": "position"},
    "uniform": {"router_type": "uniform"},
    REFERENCE: {},
}
#: Routers that read given logits in the place of their own product.
FROM_LOGITS = ("bare", "top_k", "capacity", "capacity, by probability", "coordinate_descent")


def build(name: str, experts: int, choices: int, dtype: torch.dtype, start: str) -> Callable[[], object] | None:
    """A call that routes `TOKENS` tokens once; None where the router has no such size."""
    torch.manual_seed(0)
    width = HIDDEN if start == "hidden" else experts
    tokens = torch.randn(TOKENS, width).to(dtype)
    mask = torch.ones(SEQUENCES, TOKENS // SEQUENCES, dtype=torch.bool)
    if name == "bare":
        weight = torch.randn(experts, width) * 0.02 if start == "hidden" else None
        return lambda: bare(tokens, weight, choices)
    if name == REFERENCE:
        return reference(tokens.view(SEQUENCES, -1, width), experts, choices, start)
    config = STMoEConfig(num_hidden_layers=1, num_experts=experts, num_experts_per_tok=choices, **ROUTERS[name])
    router = router_class(config.router_type)(config, width).train()
    router.reset_parameters()
    if start == "logits":
        router.logits_of = lambda x: x
    return lambda: router(tokens, mask)


def bare(tokens: Tensor, weight: Tensor | None, choices: int) -> tuple[Tensor, Tensor]:
    """The least that routing can be: (product,) softmax, top-k, division by the sum."""
    logits = tokens.float() if weight is None else tokens.float() @ weight.t()
    values, index = logits.softmax(-1).topk(choices, dim=-1)
    return values / values.sum(-1, keepdim=True), index


def reference(tokens: Tensor, experts: int, choices: int, start: str) -> Callable[[], object] | None:
    """st-moe-pytorch's gating, capacity included, on [sequences, S, H]; it knows K >= 2 and float32 only."""
    try:
        from st_moe_pytorch.st_moe_pytorch import TopNGating
    except ImportError:
        return None
    if choices < 2 or tokens.dtype != torch.float32:
        return None
    gating = TopNGating(tokens.shape[-1], num_gates=experts, top_n=choices, capacity_factor_train=1.25).train()
    if start == "logits":
        gating.to_gates = torch.nn.Identity()
    return lambda: gating(tokens)


@torch.no_grad()
def measure(experts: int, choices: int, dtype: str, start: str, names: list[str], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds by router."""
    runs = {name: build(name, experts, choices, DTYPES[dtype], start) for name in names}
    return interleaved({name: run for name, run in runs.items() if run is not None}, rounds)


@torch.no_grad()
def child(name: str, experts: int, choices: int, dtype: str, start: str) -> None:
    """Print the growth of this process's peak resident set over one pass, in MiB."""
    run = build(name, experts, choices, DTYPES[dtype], start)
    assert run is not None, "the parent asks for what it has measured"
    bare(torch.randn(4, 8), None, 2)  # what the first call of anything costs
    print(growth_mib(run))


def peak_growth(*arguments: Any) -> float:
    """MiB by which one pass raises the peak of a fresh process that already holds weights and inputs."""
    command = [sys.executable, "-m", "benchmarks.routing", "--child", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(finished.stdout.split()[-1])


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="start", choices=("logits", "hidden"), default="logits")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per row")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="only these dtypes")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in fresh processes")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        name, experts, choices, dtype, start = options.child
        child(name, int(experts), int(choices), dtype, start)
        return
    known = [name for name in ROUTERS if options.start == "hidden" or name in (*FROM_LOGITS, REFERENCE)]
    rows = [(size, dtype) for size in SIZES for dtype in options.dtype or DTYPES]
    unit = "CPU ms (ratio to bare)" + ("; peak growth in MiB" if options.memory else "")
    table = Table(title=f"{TOKENS} tokens, from {options.start}: {unit}, median of {options.rounds}")
    for column in ("E", "K", "dtype", *known):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for (experts, choices), dtype in progress.track(rows, description="measuring"):
            times = measure(experts, choices, dtype, options.start, known, options.rounds)
            cells = []
            for name in known:
                cell = f"{times[name]:.2f} ({times[name] / times['bare']:.2f})" if name in times else "-"
                if options.memory and name in times:
                    cell += f"; {peak_growth(name, experts, choices, dtype, options.start):.1f}"
                cells.append(cell)
            table.add_row(str(experts), str(choices), dtype, *cells)
    console = Console(width=280)
    console.print(table)
    console.print(setting())


if __name__ == "__main__":
    main()
