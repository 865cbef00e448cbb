"""Does the router z-loss keep training stable? `python -m benchmarks.quality.stability`.

After table 2 of ST-MoE (Zoph et al. 2022): small sparse language models are trained from scratch at learning rates that
are too high, with and without the z-loss, over several seeds, on the demo's text. A run has diverged when its training
loss is not finite, or ends less than MARGIN below the loss of guessing every token by its frequency in the training
text: it has learnt nothing but that. The held-out loss is mean and standard deviation of the runs that did not diverge.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import set_seed
from transformers.utils import logging

from benchmarks.measure import setting
from st_moe import STMoEConfig, STMoEForCausalLM
from st_moe.demo_text import load_documents, train_tokenizer

VOCAB, LENGTH, BATCH, HELD_OUT = 1024, 64, 16, 64
LEARNING_RATES = (3e-3, 1e-2, 1.5e-2, 2e-2, 3e-2)
Z_LOSSES = (0.0, 1e-3, 1e-2)
MARGIN = 0.1  # nats per token


@dataclass(frozen=True)
class Run:
    """How one run ended; losses in nats per token."""

    diverged: bool
    held_out: float
    largest_logit: float


def load_blocks() -> tuple[Tensor, Tensor, float]:
    """Training and held-out blocks int64 [n, LENGTH], and the entropy of a token's frequency in training, in nats."""
    training, held_out = load_documents(1_500_000)
    tokenizer = train_tokenizer(training, vocab_size=VOCAB)
    blocks = []
    for documents in (training, held_out):
        ids = torch.tensor([i for document in documents for i in tokenizer(document.text)["input_ids"]])
        blocks.append(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    share = torch.bincount(blocks[0].flatten(), minlength=VOCAB).double() / blocks[0].numel()
    return (
        blocks[0],
        blocks[1][:: max(len(blocks[1]) // HELD_OUT, 1)][:HELD_OUT],
        torch.special.entr(share).sum().item(),
    )


def train(blocks: Tensor, held_out: Tensor, guessing: float, rate: float, z_loss: float, seed: int, steps: int) -> Run:
    """Train one model without warm-up or clipping, which would hide the instability."""
    set_seed(seed)
    model = STMoEForCausalLM(
        STMoEConfig(
            vocab_size=VOCAB,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            num_experts=8,
            num_experts_per_tok=2,
            router_z_loss_coef=z_loss,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    recent: list[float] = []
    for step in range(steps):
        ids = blocks[order[step * BATCH : (step + 1) * BATCH]]
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-9:], output.lm_loss.item()]
    model.eval()
    with torch.no_grad():
        output = model(input_ids=held_out, labels=held_out, output_router_logits=True)
    largest = max(logits.abs().max().item() for logits in output.router_logits)
    # A comparison with NaN is false: such a run has diverged.
    return Run(not statistics.mean(recent) < guessing - MARGIN, output.lm_loss.item(), largest)


def main() -> None:
    """Train every combination and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6, help="runs per row")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per run")
    parser.add_argument("--learning-rate", type=float, action="append", help="only these rates; repeatable")
    options = parser.parse_args()
    logging.set_verbosity_error()
    blocks, held_out, guessing = load_blocks()
    rows = [(rate, z_loss) for rate in options.learning_rate or LEARNING_RATES for z_loss in Z_LOSSES]
    tokens = options.steps * BATCH * LENGTH
    table = Table(
        title=f"{options.seeds} seeds, {tokens:,} tokens each; guessing by frequency: {guessing:.3f} nats/token"
    )
    for column in (
        "learning rate",
        "z-loss coefficient",
        "diverged",
        "held-out loss (nats/token)",
        "largest router logit",
    ):
        table.add_column(column, justify="right")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=len(rows) * options.seeds)
        for rate, z_loss in rows:
            runs = []
            for seed in range(options.seeds):
                runs.append(train(blocks, held_out, guessing, rate, z_loss, seed, options.steps))
                progress.advance(task)
            losses = [run.held_out for run in runs if not run.diverged]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            mean = f"{statistics.mean(losses):.3f}{spread}" if losses else "-"
            largest = statistics.median(run.largest_logit for run in runs)
            diverged = f"{len(runs) - len(losses)} of {len(runs)}"
            table.add_row(f"{rate:g}", f"{z_loss:g}", diverged, mean, f"{largest:.1f}")
    console = Console(width=140)
    console.print(table)
    console.print(setting())


if __name__ == "__main__":
    main()
