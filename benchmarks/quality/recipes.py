"""Where does each recipe start, and how far is it after some training? `python -m benchmarks.quality.recipes`.

A small dense language model is trained on the demo's text. Every row upcycles it and trains the mixture further, and
the first row goes on with the dense model on the same tokens. Losses are held-out cross-entropy in nats per token, mean
and standard deviation over the seeds of mixture and training; the dense model is one. The parameters that a token
passes tell what a row costs.

A toy: it says what happens at the start, and nothing about the lengths of training that the papers are about.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.measure import setting
from benchmarks.quality.stability import BATCH, LENGTH, VOCAB, load_blocks
from st_moe import upcycle

RATE = 1e-3


class Case(NamedTuple):
    """One row: how the mixture is made of the dense model."""

    recipe: str
    options: dict[str, Any]
    num_experts: int = 8
    num_experts_per_tok: int = 2


CASES = (
    Case("copy", {}),
    Case("noise", {}),
    Case("drop", {"ratio": 0.25}),
    Case("drop", {"ratio": 0.5}),
    Case("drop", {"ratio": 0.5, "shared_set": False}),
    Case("granular", {"granularity": 2}, 16, 4),
    Case("shared", {"num_shared": 1}),
    Case("shared", {"num_shared": 1, "routed": "split"}, 7, 1),
    Case("split", {}),
    Case("split", {"partition": "kmeans"}),
    Case("split", {"rescale": 1.0}),
    Case("split", {"rescale": 2.0}),
    Case("split", {"rescale": 8.0}),
    Case("split", {}, 8, 4),
    Case("split", {"rescale": 32**0.5}, 8, 4),
)


def dense_model() -> LlamaForCausalLM:
    """The dense parent, as it is drawn."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(model: PreTrainedModel, blocks: Tensor, steps: int, seed: int) -> None:
    """Train on blocks int64 [n, LENGTH] that this seed draws, with AdamW and a linear warm-up."""
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    for _ in range(steps):
        ids = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
    model.eval()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, held_out: Tensor) -> float:
    """Cross-entropy in nats per token, without the losses of routers."""
    output = model.eval()(input_ids=held_out, labels=held_out)
    return getattr(output, "lm_loss", output.loss).item()


def measure(
    dense: PreTrainedModel, case: Case, blocks: Tensor, held_out: Tensor, steps: int, seed: int
) -> tuple[float, float, int]:
    """Held-out loss before and after training, and the parameters that a token passes."""
    mixture = upcycle(
        dense,
        recipe=case.recipe,
        recipe_options=case.options,
        num_experts=case.num_experts,
        num_experts_per_tok=case.num_experts_per_tok,
        seed=seed,
        verify=False,
    )
    start = held_out_loss(mixture, held_out)
    train(mixture, blocks, steps, seed)
    return start, held_out_loss(mixture, held_out), mixture.config.num_parameters(active=True)


def _told(losses: list[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def main() -> None:
    """Train every row and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="mixtures per row")
    parser.add_argument("--dense-steps", type=int, default=700, help="optimizer steps of the dense model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each mixture")
    parser.add_argument("--recipe", action="append", help="only these recipes; repeatable")
    options = parser.parse_args()
    logging.set_verbosity_error()
    blocks, held_out, _ = load_blocks()
    first, later = (steps * BATCH * LENGTH for steps in (options.dense_steps, options.steps))
    set_seed(0)
    dense = dense_model()
    cases = [case for case in CASES if case.recipe in (options.recipe or {each.recipe for each in CASES})]
    table = Table(title=f"held-out loss, nats/token; {later:,} tokens after {first:,}")
    for column in ("recipe", "options", "experts", "active parameters", "at step 0", f"after {options.steps} steps"):
        table.add_column(column, justify="left" if column in ("recipe", "options") else "right")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=1 + (1 + len(cases)) * options.seeds)
        train(dense, blocks, options.dense_steps, seed=1_000)
        progress.advance(task)
        continued = []
        for seed in range(options.seeds):
            model = copy.deepcopy(dense)
            train(model, blocks, options.steps, seed)
            continued.append(held_out_loss(model, held_out))
            progress.advance(task)
        size = f"{dense.num_parameters():,}"
        table.add_row("dense, continued", "", "", size, f"{held_out_loss(dense, held_out):.3f}", _told(continued))
        for case in cases:
            rows = []
            for seed in range(options.seeds):
                rows.append(measure(dense, case, blocks, held_out, options.steps, seed))
                progress.advance(task)
            told = ", ".join(
                f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in case.options.items()
            )
            start, end, active = zip(*rows, strict=True)
            sizes = f"{case.num_experts}, {case.num_experts_per_tok} per token"
            table.add_row(case.recipe, told, sizes, f"{active[0]:,}", _told(list(start)), _told(list(end)))
    console = Console(width=150)
    console.print(table)
    console.print(setting())


if __name__ == "__main__":
    main()
