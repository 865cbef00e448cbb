"""Speed and memory of a layer's experts on this CPU: `python -m benchmarks.layer`.

Compared, with one routing for all: this project's experts, the host's (Mixtral's) by its eager loop and by grouped_mm,
and a dense gated FFN of the same active FLOPs. One thread, CPU time, interleaved rounds, medians: the ratios hold on a
busy machine, the milliseconds do not. Memory is the growth of a fresh process's peak resident set.

Shape letters: T tokens, H hidden size, I expert width, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.measure import growth_mib, interleaved, setting
from st_moe import STMoEConfig, locate_ffns
from st_moe.modeling.experts import tensor_experts

IMPLEMENTATIONS = ("st_moe", "grouped_mm", "eager")


class Case(NamedTuple):
    """One row: a shape, and whether it is trained or only run forward."""

    name: str
    hidden: int
    width: int
    experts: int
    choices: int
    tokens: int
    trains: bool = True


CASES = (
    Case("fine_512", 512, 1408, 8, 2, 2048),
    Case("small_1024", 1024, 2816, 8, 2, 1024),
    Case("many_768", 768, 256, 64, 8, 2048),
    Case("dec1_512", 512, 1408, 8, 2, 1, trains=False),
    Case("dec8_512", 512, 1408, 8, 2, 8, trains=False),
    Case("dec1_1024", 1024, 2816, 8, 2, 1, trains=False),
    Case("dec8_1024", 1024, 2816, 8, 2, 8, trains=False),
    Case("dec1_768", 768, 256, 64, 8, 1, trains=False),
    Case("dec8_768", 768, 256, 64, 8, 8, trains=False),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DenseFFN(nn.Module):
    """Gated FFN of the same active FLOPs: width K * I."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(case.hidden, 2 * case.choices * case.width, bias=False)
        self.down_proj = nn.Linear(case.choices * case.width, case.hidden, bias=False)

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """[T, H] -> [T, H]; the routing is ignored."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


def build(case: Case, dtype: torch.dtype, name: str) -> nn.Module:
    """A layer's experts under one implementation, or the dense FFN."""
    torch.manual_seed(0)
    if name == "dense":
        return DenseFFN(case).to(dtype)
    config = STMoEConfig(
        hidden_size=case.hidden,
        intermediate_size=case.width,
        num_attention_heads=8,
        num_hidden_layers=1,
        vocab_size=8,
        num_experts=case.experts,
        num_experts_per_tok=case.choices,
    )
    if name != "st_moe":
        host = transformers.MixtralConfig(**config.dense_config().to_dict(), num_local_experts=case.experts)
        host._experts_implementation = name
        experts = MixtralExperts(host)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        return experts.to(dtype)
    with torch.device("meta"):
        ffn = locate_ffns(transformers.LlamaForCausalLM(config.dense_config()))[0]
    experts = tensor_experts(config, ffn, config.num_experts).to(dtype)
    config._experts_implementation = name
    return experts


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and a routing that is random and balanced on average."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(dtype)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    weight, index = scores.softmax(-1).topk(case.choices)
    return hidden.requires_grad_(case.trains), index, weight / weight.sum(-1, keepdim=True)


def forward(module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    """One forward pass without gradients."""
    with torch.no_grad():
        module(*arguments)


def forward_backward(module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    """One training pass: forward, and backward into input, routing weights and parameters."""
    hidden, index, weight = arguments
    weight = weight.clone().requires_grad_()
    module(hidden, index, weight).sum().backward()
    hidden.grad = None
    for parameter in module.parameters():
        parameter.grad = None


PASSES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor, Tensor]], None]] = {
    "fwd": forward,
    "fwd+bwd": forward_backward,
}


def measure(case: Case, dtype: torch.dtype, step: str, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds per implementation, measured in interleaved rounds."""
    arguments = inputs(case, dtype)
    runs = {}
    for name in ("dense", *IMPLEMENTATIONS):
        module = build(case, dtype, name)
        runs[name] = lambda module=module: PASSES[step](module, arguments)
    return interleaved(runs, rounds)


def peak_growth(case: Case, dtype: str, step: str, name: str) -> float:
    """MiB by which one pass raises the peak resident set of a fresh process that already holds weights and inputs."""
    command = [sys.executable, "-m", "benchmarks.layer", "--child", case.name, dtype, step, name]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(finished.stdout.split()[-1])


def child(case_name: str, dtype: str, step: str, name: str) -> None:
    """Print the growth of this process's peak resident set over one pass, in MiB."""
    case = next(case for case in CASES if case.name == case_name)
    module, arguments = build(case, DTYPES[dtype], name), inputs(case, DTYPES[dtype])
    small = Case("warm-up", 16, 16, 2, 1, 4)
    PASSES[step](build(small, DTYPES[dtype], name), inputs(small, DTYPES[dtype]))
    print(growth_mib(lambda: PASSES[step](module, arguments)))


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per row")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="only these rows")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="only these dtypes")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in fresh processes")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        child(*options.child)
        return
    rows = [
        (case, dtype, step)
        for case in CASES
        for dtype in DTYPES
        for step in PASSES
        if (step == "fwd" or case.trains)
        and case.name in (options.case or [case.name])
        and dtype in (options.dtype or [dtype])
    ]
    names = ("dense", *IMPLEMENTATIONS)
    table = Table(title=f"CPU ms, median of {options.rounds} (ratio to dense){'; MiB' if options.memory else ''}")
    for column in ("case", "dtype", "pass", *names):
        table.add_column(column, justify="left" if column in ("case", "dtype", "pass") else "right")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case, dtype, step in progress.track(rows, description="measuring"):
            times = measure(case, DTYPES[dtype], step, options.rounds)
            cells = [f"{times[name]:.2f} ({times[name] / times['dense']:.2f})" for name in names]
            if options.memory and case.trains:
                memory = {name: peak_growth(case, dtype, step, name) for name in names}
                cells = [f"{cell}; {memory[name]:.0f}" for cell, name in zip(cells, names, strict=True)]
            table.add_row(case.name, dtype, step, *cells)
    console = Console(width=160)
    console.print(table)
    console.print(setting())


if __name__ == "__main__":
    main()
