"""The whole way in minutes: train a small dense model, make it a mixture of experts, fine-tune, compare.

Needs no network: text and tokenizer come from the Python that runs it (`st_moe.demo_text`).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from st_moe.conversion import IdentityProof, prove_identity, upcycle
from st_moe.demo_text import Document, load_documents, train_tokenizer
from st_moe.finetune import STMoETrainer
from st_moe.finetune.data import pack_blocks
from st_moe.finetune.report import draw_report

IDENTITY_LIMIT = 1e-5  # relative: what single precision leaves of an exact equality
PROMPT = 'The "for" statement'
PROOF_BLOCKS = 8


@dataclass(frozen=True)
class DemoPlan:
    """Every size of the demo; one step is `batch_size` blocks of `block_length` tokens."""

    max_characters: int | None  # of text to read; None: all there is
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_experts: int
    num_experts_per_tok: int
    router_std: float
    block_length: int
    batch_size: int
    dense_steps: int
    dense_learning_rate: float
    tune_steps: int
    tune_learning_rate: float
    evaluations: int  # of the held-out loss during each fine-tuning
    held_out_blocks: int
    sample_tokens: int


FULL = DemoPlan(
    max_characters=None,
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=6,
    num_experts=8,
    num_experts_per_tok=2,
    router_std=0.02,
    block_length=128,
    batch_size=16,
    dense_steps=200,
    dense_learning_rate=3e-3,
    tune_steps=260,
    tune_learning_rate=3e-3,
    evaluations=4,
    held_out_blocks=160,
    sample_tokens=80,
)
FAST = DemoPlan(
    max_characters=400_000,
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    router_std=0.02,
    block_length=64,
    batch_size=8,
    dense_steps=120,
    dense_learning_rate=3e-3,
    tune_steps=60,
    tune_learning_rate=3e-3,
    evaluations=2,
    held_out_blocks=32,
    sample_tokens=24,
)


@dataclass(frozen=True)
class ModelRow:
    """One line of the comparison; losses in nats per held-out token, speed in training tokens per second."""

    model: str
    parameters: int
    active_parameters: int
    held_out_loss: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and the files it wrote."""

    plan: DemoPlan
    proof: IdentityProof
    rows: tuple[ModelRow, ...]
    verdict: str
    mixture_wins: bool
    reload_equal: bool
    sample: str
    plots: tuple[Path, ...]
    seconds: float


@dataclass(frozen=True)
class DemoData:
    """Blocks `[rows, block_length]` in the order in which they are trained on, and the held-out ones."""

    tokenizer: PreTrainedTokenizerFast
    dense: Dataset
    tune: Dataset
    held_out: Dataset


def run_demo(output_dir: Path, *, fast: bool = False, seed: int = 0, console: Console | None = None) -> DemoResult:
    """Train a dense model, upcycle it, fine-tune mixture and dense parent on the same tokens, compare, save, reload.

    Args:
        output_dir: folder for `dense/`, `mixture/`, `training/`, the plots and `demo.json`; made if need be. A second
            run into the same folder replaces these.
        fast: sizes for a test of seconds, too small to learn much, instead of those for minutes.
        seed: seed of weights, data order and sample; the same seed on the same machine gives the same numbers.
        console: where to print; a new one if None. Progress bars go to the standard error stream.

    Raises:
        ValueError: `output_dir` is a file.
        RuntimeError: the mixture differs from its dense parent at step 0, or a reloaded model from the saved one.
    """
    started = time.perf_counter()
    plan = FAST if fast else FULL
    console = console or Console()
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir must be a folder, {output_dir} is a file")
    with _few_messages():
        data = _prepare(plan, seed, console)
        dense, dense_row = _train_dense(plan, data, output_dir, seed, console)
        mixture, proof, upcycled_row = _upcycle(plan, dense, data, seed, console)
        tuned_rows, mixture = _tune_both(plan, dense, mixture, data, output_dir, seed, console)
        rows = (dense_row, upcycled_row, *tuned_rows)
        verdict, mixture_wins = _judge(plan, *tuned_rows)
        console.print(comparison_table(rows))
        console.print(verdict, style="green" if mixture_wins else "yellow")
        sample = _sample(plan, mixture, data.tokenizer, seed)
        console.print(f"[bold]Sample of the mixture:[/bold] {escape(sample)}")
        _save_and_reload(mixture, data, output_dir / "mixture")
        console.print(f"Saved to {escape(str(output_dir / 'mixture'))} and reloaded: weights are bit-equal")
    plots = tuple(draw_report(output_dir / "training", output_dir))
    result = DemoResult(
        plan=plan,
        proof=proof,
        rows=rows,
        verdict=verdict,
        mixture_wins=mixture_wins,
        reload_equal=True,
        sample=sample,
        plots=plots,
        seconds=time.perf_counter() - started,
    )
    _write_json(result, output_dir / "demo.json")
    console.print(f"Plots: {escape(', '.join(str(plot) for plot in plots))}")
    console.print(f"Done in {result.seconds:.0f} s")
    return result


def comparison_table(rows: Sequence[ModelRow]) -> Table:
    """The models side by side."""
    table = Table(title="Held-out loss at equal tokens")
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "active", "held-out loss\n(nats/token)", "training\n(tokens/s)"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        sizes = (f"{row.parameters:,}", f"{row.active_parameters:,}")
        table.add_row(row.model, *sizes, f"{row.held_out_loss:.4f}", speed)
    return table


# ------------------------------------------------------------------------------------------------ the steps


def _prepare(plan: DemoPlan, seed: int, console: Console) -> DemoData:
    """Read the text, train the tokenizer on the training side, lay the blocks out in the order of training."""
    training, held_out = load_documents(plan.max_characters)
    tokenizer = train_tokenizer(training, vocab_size=plan.vocab_size)
    blocks = _blocks(training, tokenizer, plan.block_length)
    evaluation = _blocks(held_out, tokenizer, plan.block_length)
    measured = min(plan.held_out_blocks, len(evaluation))
    evaluation = evaluation.select([index * len(evaluation) // measured for index in range(measured)])
    dense_rows, tune_rows = plan.dense_steps * plan.batch_size, plan.tune_steps * plan.batch_size
    order = _training_order(len(blocks), dense_rows + tune_rows, seed)
    console.print(
        f"Text: {len(training)} documents, {len(blocks) * plan.block_length:,} tokens to train on; {len(held_out)} "
        f"documents held out by topic, {measured * plan.block_length:,} tokens of them measured; "
        f"byte-level BPE of {len(tokenizer):,} tokens"
    )
    return DemoData(tokenizer, blocks.select(order[:dense_rows]), blocks.select(order[dense_rows:]), evaluation)


def _train_dense(
    plan: DemoPlan, data: DemoData, output_dir: Path, seed: int, console: Console
) -> tuple[PreTrainedModel, ModelRow]:
    """Train the dense parent from scratch and save it to `dense/`."""
    set_seed(seed)
    end_of_text = data.tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        max_position_embeddings=2 * plan.block_length,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    dense = LlamaForCausalLM(config)
    console.print(
        f"Dense parent: {dense.num_parameters():,} parameters, {len(data.dense) * plan.block_length:,} tokens"
    )
    arguments = _arguments(plan, output_dir / "dense", seed, plan.dense_steps, plan.dense_learning_rate)
    # Constant rate: the decay belongs to the fine-tuning that follows, of the mixture and of the dense parent alike.
    arguments.lr_scheduler_type = "constant_with_warmup"
    speed = _train(Trainer, dense, arguments, data.dense, None, "dense parent")
    dense.save_pretrained(output_dir / "dense")
    data.tokenizer.save_pretrained(output_dir / "dense")
    return dense, _row("dense, before", dense, held_out_loss(dense, data.held_out, plan.batch_size), speed)


def _upcycle(
    plan: DemoPlan, dense: PreTrainedModel, data: DemoData, seed: int, console: Console
) -> tuple[PreTrainedModel, IdentityProof, ModelRow]:
    """Make the mixture and prove that it is still the dense model."""
    mixture = upcycle(
        dense,
        num_experts=plan.num_experts,
        num_experts_per_tok=plan.num_experts_per_tok,
        router_std=plan.router_std,
        seed=seed,
        verify=False,  # on random tokens; the demo proves it on held-out text
    )
    proof = prove_identity(dense, mixture, torch.tensor(data.held_out[:PROOF_BLOCKS]["input_ids"]))
    if not proof.max_relative_difference <= IDENTITY_LIMIT:
        raise RuntimeError(f"mixture and dense parent must differ by at most {IDENTITY_LIMIT:g} at step 0: {proof}")
    before = held_out_loss(dense, data.held_out, plan.batch_size)
    after = held_out_loss(mixture, data.held_out, plan.batch_size)
    console.print(f"Upcycled to {plan.num_experts} experts, {plan.num_experts_per_tok} per token. {proof}")
    console.print(f"Held-out loss: {before:.6f} before, {after:.6f} after")
    return mixture, proof, _row("mixture, step 0", mixture, after, None)


def _tune_both(
    plan: DemoPlan,
    dense: PreTrainedModel,
    mixture: PreTrainedModel,
    data: DemoData,
    output_dir: Path,
    seed: int,
    console: Console,
) -> tuple[tuple[ModelRow, ModelRow], PreTrainedModel]:
    """Fine-tune the dense parent and the mixture with the same settings on the same blocks in the same order."""
    console.print(f"Fine-tuning both on the same {len(data.tune) * plan.block_length:,} tokens in the same order")
    rows = []
    yardstick = copy.deepcopy(dense)
    for name, model, trainer, folder in (
        ("dense, fine-tuned", yardstick, Trainer, output_dir / "dense"),
        ("mixture, fine-tuned", mixture, STMoETrainer, output_dir / "training"),
    ):
        arguments = _arguments(plan, folder, seed, plan.tune_steps, plan.tune_learning_rate)
        arguments.eval_strategy = "steps"
        speed = _train(trainer, model, arguments, data.tune, data.held_out, name.split(",")[0])
        rows.append(_row(name, model, held_out_loss(model, data.held_out, plan.batch_size), speed))
    return (rows[0], rows[1]), mixture


def _judge(plan: DemoPlan, dense: ModelRow, mixture: ModelRow) -> tuple[str, bool]:
    """Who won, in words, whichever way it went."""
    gain = dense.held_out_loss - mixture.held_out_loss
    tokens = plan.tune_steps * plan.batch_size * plan.block_length
    ratio = mixture.active_parameters / dense.active_parameters
    if gain > 0:
        words = f"the mixture beats its dense parent by {gain:.4f} nats/token"
    else:
        words = f"the mixture does NOT beat its dense parent: it is {-gain:.4f} nats/token worse"
    return f"After the same {tokens:,} tokens {words} (with {ratio:.2f}x its active parameters).", gain > 0


def _sample(plan: DemoPlan, model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Text that the model continues from `PROMPT`, at temperature 0.8."""
    set_seed(seed)
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**prompt, max_new_tokens=plan.sample_tokens, do_sample=True, temperature=0.8, top_p=0.95)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _save_and_reload(model: PreTrainedModel, data: DemoData, folder: Path) -> None:
    """Save, load through the Auto class and compare every bit of the weights, and the logits."""
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    state = reloaded.state_dict()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    if changed:
        raise RuntimeError(f"weights reloaded from {folder} must be bit-equal, {len(changed)} are not: {changed[:5]}")
    # Tensors of a file may lie at addresses for which the processor's products round differently.
    proof = prove_identity(model, reloaded, torch.tensor(data.held_out[:PROOF_BLOCKS]["input_ids"]))
    if not proof.holds:
        raise RuntimeError(f"the model reloaded from {folder} must compute what the saved one does: {proof}")


# ------------------------------------------------------------------------------------------------ training, measuring


def held_out_loss(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> float:
    """Mean next-token loss over all labelled tokens of `blocks`, in nats; the same code for every kind of model."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(blocks), batch_size):
            batch = {name: torch.tensor(column) for name, column in blocks[start : start + batch_size].items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            total, tokens = total + losses.item(), tokens + int((labels != -100).sum())
    return total / tokens


class _Progress(ProgressCallback):
    """The Trainer's bar with a name and the running loss on it, instead of a line of text per log entry."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description_str(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


class _StepClock(TrainerCallback):
    """Seconds spent in training steps alone: the Trainer's own run time counts its evaluations in."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def _train(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    arguments: TrainingArguments,
    blocks: Dataset,
    held_out: Dataset | None,
    name: str,
) -> float:
    """Train in place and return the speed in tokens per second."""
    clock = _StepClock()
    trainer = trainer_class(model=model, args=arguments, train_dataset=blocks, eval_dataset=held_out, callbacks=[clock])
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress(name))
    trainer.train()
    return len(blocks) * len(blocks[0]["input_ids"]) / clock.seconds


def _arguments(plan: DemoPlan, folder: Path, seed: int, steps: int, learning_rate: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        train_sampling_strategy="sequential",  # the blocks are shuffled already, and must come in one order
        logging_steps=max(1, steps // 40),
        eval_steps=max(1, steps // plan.evaluations),
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        use_cpu=True,  # the same numbers everywhere; at this size an accelerator gains nothing
        dataloader_pin_memory=False,
        seed=seed,
    )


def _blocks(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, block_length: int) -> Dataset:
    tokens = tokenizer([document.text for document in documents], return_attention_mask=False)["input_ids"]
    return Dataset.from_list(list(pack_blocks(tokens, block_length, eos_token_id=tokenizer.eos_token_id)))


def _training_order(blocks: int, rows: int, seed: int) -> list[int]:
    """Indices of `rows` blocks: as many shuffled passes over all blocks as it takes."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < rows:
        order.extend(torch.randperm(blocks, generator=generator).tolist())
    return order[:rows]


def _row(name: str, model: PreTrainedModel, loss: float, speed: float | None) -> ModelRow:
    parameters = model.num_parameters()
    sparse = hasattr(model.config, "num_experts")
    active = model.config.num_parameters(active=True) if sparse else parameters
    return ModelRow(name, parameters, active, loss, speed)


def _write_json(result: DemoResult, path: Path) -> None:
    path.write_text(json.dumps(asdict(result), indent=2, default=str) + "\n", encoding="utf-8")


@contextmanager
def _few_messages() -> Iterator[None]:
    """Keep the library's notes and its bars for single files out of the demo's output, and put them back after."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
