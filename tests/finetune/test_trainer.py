"""The Trainer: what it logs, what it trains, what it keeps; every number against one computed by hand."""

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from st_moe import STMoEForCausalLM, STMoEForSequenceClassification, STMoETrainer
from st_moe.finetune import ROUTER_LOG, STMoETrainerMixin
from st_moe.finetune import trainer as trainer_module
from st_moe.finetune.trainer import RouterMetrics
from tests.families import dense_model, mixture, tiny_tokenizer, token_ids

LENGTH = 12
BALANCE, Z = 0.5, 0.1  # large, so that a lost or multiplied auxiliary loss cannot hide
EXPERTS, CHOICES, LAYERS = 4, 2, 2
RATE = 0.1
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


class InOrder(STMoETrainer):
    """Takes the rows as they come, so that a test knows the micro-batches."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def model_of(**fields: Any) -> Any:
    return mixture(**{"balance_loss_coef": BALANCE, "router_z_loss_coef": Z, **fields})


def blocks(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one length, every token a label."""
    return [{"input_ids": ids, "labels": ids} for ids in token_ids(count, LENGTH, seed).tolist()]


def ragged(count: int = 8) -> list[dict[str, Any]]:
    """Rows of several lengths; the first tokens of each are a prompt without labels."""
    rows = []
    for number, ids in enumerate(token_ids(count, LENGTH).tolist()):
        ids = ids[: 5 + number]
        rows.append({"input_ids": ids, "labels": [-100] * (1 + number % 3) + ids[1 + number % 3 :]})
    return rows


def padding_collator(side: str = "left") -> DataCollatorForSeq2Seq:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)


def trainer_of(
    model: nn.Module,
    output: Path,
    rows: list[dict[str, Any]],
    *,
    trainer_class: type[Trainer] = InOrder,
    held_out: list[dict[str, Any]] | None = None,
    collator: Any = None,
    extra: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A trainer with plain SGD on the CPU that logs every step; `extra` goes to the trainer itself."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return trainer_class(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        data_collator=collator or default_data_collator,
        **(extra or {}),
    )


def training_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def router_log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / ROUTER_LOG).read_text(encoding="utf-8").splitlines()]


def lm_loss_of(logits: Tensor, labels: Tensor, smoothing: float = 0.0, total: int | None = None) -> Tensor:
    """Cross-entropy of the next token in nats, summed over label tokens and divided by `total` (their number)."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    targets = labels[:, 1:]
    real = targets != -100
    nll = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    nll = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
    return (nll * real).sum() / (real.sum() if total is None else total)


def balance_of(logits: Tensor, mask: Tensor) -> Tensor:
    """E * sum over experts of (share of first choices) * (mean probability), over real tokens."""
    real = logits[mask.flatten().bool()]
    first = nn.functional.one_hot(real.argmax(-1), real.shape[-1]).float().mean(0)
    return real.shape[-1] * (first * real.softmax(-1).mean(0)).sum()


def z_of(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask.flatten().bool()].exp().sum(-1).log().square().mean()


def load_of(logits: Tensor, mask: Tensor) -> Tensor:
    real = logits[mask.flatten().bool()]
    chosen = real.topk(CHOICES, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()


def mean_over_layers(function: Callable[[Tensor, Tensor], Tensor], output: Any, mask: Tensor) -> Tensor:
    return torch.stack([function(logits, mask) for logits in output.router_logits]).mean()


def outputs_of(model: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """The model's output in training mode (without dropout it is the evaluation's) and the mask of real tokens."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    model.train()
    return model(input_ids=batch["input_ids"], attention_mask=mask, output_router_logits=True), mask


# ------------------------------------------------------------------------------------------------ what is logged


@pytest.mark.parametrize("padded", [False, True], ids=["blocks", "padded"])
def test_logs_equal_hand_computation(tmp_path: Path, padded: bool) -> None:
    model = model_of()
    rows, collator = (ragged(), padding_collator()) if padded else (blocks(), default_data_collator)
    batch = collator([dict(row) for row in rows])
    with torch.no_grad():
        output, mask = outputs_of(copy.deepcopy(model), batch)
    trainer = trainer_of(model, tmp_path, rows, collator=collator)
    trainer.train()
    log = training_logs(trainer)[0]
    load = torch.stack([load_of(logits, mask) for logits in output.router_logits])
    log_p = torch.stack(output.router_logits)[:, mask.flatten().bool()].log_softmax(-1)
    expected = {
        "lm_loss": lm_loss_of(output.logits, batch["labels"]),
        "balance_loss": mean_over_layers(balance_of, output, mask),
        "router_z_loss": mean_over_layers(z_of, output, mask),
        "router/entropy": -(log_p.exp() * log_p).sum(-1).mean() / math.log(EXPERTS),
        "router/max_load": load.max() * EXPERTS,
        "router/dead_experts": (load == 0).sum(),
    }
    expected["loss"] = expected["lm_loss"] + BALANCE * expected["balance_loss"] + Z * expected["router_z_loss"]
    for name, value in expected.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-5), name
    assert router_log(tmp_path)[0]["expert_load"] == pytest.approx(load.numpy(), rel=1e-5)
    # The numbers are told apart: none could stand for another.
    assert len({round(log[name], 3) for name in expected}) == len(expected)


@pytest.mark.parametrize(("size", "accumulate"), SPLITS)
def test_loss_is_the_sum_of_its_parts_however_accumulated(tmp_path: Path, size: int, accumulate: int) -> None:
    trainer = trainer_of(
        model_of(),
        tmp_path,
        ragged(),
        collator=padding_collator(),
        max_steps=3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 3
    for log in logs:
        parts = log["lm_loss"] + BALANCE * log["balance_loss"] + Z * log["router_z_loss"]
        assert log["loss"] == pytest.approx(parts, rel=1e-5)


def test_logs_are_means_since_the_last_log(tmp_path: Path) -> None:
    every, third = (
        trainer_of(model_of(), tmp_path / str(steps), blocks(24), max_steps=6, logging_steps=steps) for steps in (1, 3)
    )
    every.train()
    third.train()
    names = ("loss", "lm_loss", "balance_loss", "router_z_loss", "router/entropy")
    for number, log in enumerate(training_logs(third)):
        window = training_logs(every)[3 * number : 3 * number + 3]
        for name in names:
            assert log[name] == pytest.approx(np.mean([entry[name] for entry in window]), rel=1e-5), name
    loads = np.array([line["expert_load"] for line in router_log(tmp_path / "1") if "expert_load" in line])
    assert router_log(tmp_path / "3")[0]["expert_load"] == pytest.approx(loads[:3].mean(0), rel=1e-5)


def test_dead_experts_are_counted_over_all_layers(tmp_path: Path) -> None:
    model = model_of(num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.model.sparse_blocks:
            block.gate.weight[3] = block.gate.weight[0]  # a tie goes to the lower index
    trainer = trainer_of(model, tmp_path, blocks())
    trainer.train()
    log = training_logs(trainer)[0]
    load = np.array(router_log(tmp_path)[0]["expert_load"])
    assert log["router/dead_experts"] == (load == 0).sum()
    assert load[:, 3].tolist() == [0.0] * LAYERS
    assert log["router/max_load"] == pytest.approx(EXPERTS * load.max())


def test_without_coefficients_the_loss_is_the_language_model_loss(tmp_path: Path) -> None:
    trainer = trainer_of(model_of(balance_loss_coef=0.0, router_z_loss_coef=0.0), tmp_path, blocks(), max_steps=2)
    trainer.train()
    for log in training_logs(trainer):
        assert log["loss"] == pytest.approx(log["lm_loss"], rel=1e-6)
        assert log["balance_loss"] > 0.9
        assert log["router_z_loss"] > 0


def test_dense_models_pass_through(tmp_path: Path) -> None:
    trainer = trainer_of(dense_model("llama"), tmp_path, blocks(), held_out=blocks(4, seed=1))
    trainer.train()
    log = training_logs(trainer)[0]
    assert not {name for name in log if name.startswith(("router", "balance", "lm_loss"))}
    assert "expert_load" not in router_log(tmp_path)[0]
    assert trainer.evaluate()["eval_loss"] > 0


def test_metrics_of_unequal_batches_are_weighted_by_label_tokens() -> None:
    metrics = RouterMetrics()
    for labels, value in ((1, 4.0), (3, 8.0)):
        load = torch.tensor([[1.0, 0.0, 0.0]]) if labels == 1 else torch.tensor([[0.5, 0.5, 0.0]])
        outputs = {
            "aux_losses": {"balance_loss": torch.tensor(value), "router_z_loss": torch.tensor(2 * value)},
            "router_entropy": torch.tensor([value, 0.0]),
            "expert_load": load,
        }
        metrics.add(outputs, torch.tensor(labels), torch.tensor(labels * value))

    class OneRank:
        def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
            assert reduction == "sum"
            return tensor

    scalars, load = metrics.reduce(OneRank(), [3])
    assert scalars == {
        "balance_loss": 7.0,
        "router_z_loss": 14.0,
        "router/entropy": 3.5,
        "lm_loss": 7.0,
        "router/max_load": 3 * 0.625,
        "router/dead_experts": 1.0,
    }
    assert load == [[0.625, 0.375, 0.0]]
    assert metrics.sums == {}


# ------------------------------------------------------------------------------------------------ evaluation


def test_eval_loss_is_the_language_model_loss_alone(tmp_path: Path) -> None:
    model = model_of(router_z_loss_coef=100.0, balance_loss_coef=100.0)
    held_out = blocks(10, seed=3)
    trainer = trainer_of(model, tmp_path, blocks(), held_out=held_out)
    loss = trainer.evaluate()["eval_loss"]
    ids = torch.tensor([row["input_ids"] for row in held_out])
    with torch.no_grad():
        log_p = model.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    chosen = log_p.gather(-1, ids[:, 1:, None])
    perplexity = chosen.double().exp().prod().item() ** (-1 / chosen.numel())
    assert math.exp(loss) == pytest.approx(perplexity, rel=1e-5)
    assert not training_logs(trainer)


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    logs = []
    for strategy in ("steps", "no"):
        trainer = trainer_of(
            model_of(router_jitter_noise=0.2),
            tmp_path / strategy,
            blocks(24),
            held_out=blocks(4, seed=3),
            max_steps=3,
            logging_steps=3,
            eval_strategy=strategy,
            eval_steps=1,
        )
        trainer.train()
        logs.append(training_logs(trainer))
    assert logs[0] == logs[1]
    lines = router_log(tmp_path / "steps")
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2, 3]
    assert not any("expert_load" in line for line in lines if "eval_loss" in line)


def test_predict_returns_plain_logits(tmp_path: Path) -> None:
    model = model_of(output_router_logits=True)
    rows = blocks(6, seed=2)
    predicted = trainer_of(model, tmp_path, blocks()).predict(Dataset.from_list(rows))
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
    assert isinstance(predicted.predictions, np.ndarray)
    assert predicted.predictions == pytest.approx(expected.numpy(), abs=1e-5)
    assert predicted.label_ids.tolist() == [row["labels"] for row in rows]


# ------------------------------------------------------------------------------------------------ gradients


def weighted_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own: twice the cross-entropy."""
    total = None if num_items_in_batch is None else int(num_items_in_batch)
    return 2 * lm_loss_of(outputs["logits"], labels, total=total)


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[..., Tensor]]] = {
    "plain": ({}, {}, lm_loss_of),
    "smoothing": (
        {"label_smoothing_factor": 0.2},
        {},
        lambda logits, labels, total: lm_loss_of(logits, labels, 0.2, total),
    ),
    "own": (
        {},
        {"compute_loss_func": weighted_loss},
        lambda logits, labels, total: 2 * lm_loss_of(logits, labels, total=total),
    ),
}


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("kind", LOSSES)
def test_one_step_equals_a_step_by_hand(tmp_path: Path, kind: str, size: int, accumulate: int) -> None:
    arguments, extra, by_hand = LOSSES[kind]
    model, reference = model_of(), model_of()
    collator = padding_collator()
    rows = ragged()
    total = sum(label != -100 for row in rows for label in row["labels"][1:])
    lm_part = aux_part = 0.0
    for start in range(0, 8, size):
        batch = collator([dict(row) for row in rows[start : start + size]])
        output, mask = outputs_of(reference, batch)
        loss = by_hand(output.logits, batch["labels"], total=total)
        share = (batch["labels"][:, 1:] != -100).sum() / total
        balance, z = (mean_over_layers(function, output, mask) for function in (balance_of, z_of))
        aux = share * (BALANCE * balance + Z * z)
        (loss + aux).backward()
        lm_part, aux_part = lm_part + loss.item(), aux_part + aux.item()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(
        model,
        tmp_path,
        rows,
        collator=collator,
        extra=extra,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        **arguments,
    )
    trainer.train()
    for name, parameter in reference.named_parameters():
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, RATE * parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
    log = training_logs(trainer)[0]
    assert log["lm_loss"] == pytest.approx(lm_part, rel=1e-5)
    assert log["loss"] == pytest.approx(lm_part + aux_part, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_auxiliary_gradient_reaches_the_router(tmp_path: Path, kind: str) -> None:
    """The other side of the step by hand: without coefficients the routers move elsewhere."""
    arguments, extra, _ = LOSSES[kind]
    moved = []
    for coefficient in (0.0, 10.0):
        model = model_of(balance_loss_coef=coefficient, router_z_loss_coef=0.0)
        before = model.model.sparse_blocks[0].gate.weight.detach().clone()
        trainer_of(model, tmp_path / str(coefficient), blocks(), extra=extra, **arguments).train()
        moved.append(model.model.sparse_blocks[0].gate.weight.detach() - before)
    assert (moved[1] - moved[0]).norm() > moved[0].norm()


def weights_after(
    tmp_path: Path, rows: list[dict[str, Any]], split: tuple[int, int], **settings: Any
) -> dict[str, Tensor]:
    """Weights after 2 steps of 8 rows each."""
    model = settings.pop("model", None) or model_of(**settings.pop("fields", {}))
    size, accumulate = split
    trainer_of(
        model,
        tmp_path / f"{size}x{accumulate}",
        rows,
        max_steps=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        **settings,
    ).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max().item() <= tolerance, name


@pytest.mark.parametrize("case", ["z-loss", "padded", "repeated"])
def test_accumulation_changes_nothing(tmp_path: Path, case: str) -> None:
    settings: dict[str, Any] = {
        # The balance loss is no sum over tokens: it is left out where micro-batches differ.
        "z-loss": {"fields": {"balance_loss_coef": 0.0}},
        "padded": {"fields": {"balance_loss_coef": 0.0, "router_z_loss_coef": 0.0}, "collator": padding_collator()},
        "repeated": {},
    }[case]
    rows = {"z-loss": blocks(16), "padded": ragged() * 2, "repeated": blocks(1) * 16}[case]
    whole, *split = [weights_after(tmp_path, rows, split, **copy.deepcopy(settings)) for split in SPLITS]
    for weights in split:
        assert_same_weights(weights, whole)


def test_accumulation_comparison_can_fail(tmp_path: Path) -> None:
    """Twice the coefficient is what a stock family gets from accumulating over 2 micro-batches."""
    weights = [
        weights_after(tmp_path / str(coefficient), blocks(1) * 16, (8, 1), fields={"balance_loss_coef": coefficient})
        for coefficient in (BALANCE, 2 * BALANCE)
    ]
    with pytest.raises(AssertionError):
        assert_same_weights(*weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classifiers_accumulate_to_the_same_weights(tmp_path: Path, smoothing: float) -> None:
    labels = [0, 1, 2, 1, 0, 2, 2, 1] * 2
    rows = [{"input_ids": row["input_ids"], "labels": label} for row, label in zip(blocks(16), labels, strict=True)]
    results = []
    for split in SPLITS:
        model = model_of(auto=STMoEForSequenceClassification, num_labels=3, balance_loss_coef=0.0)
        results.append(weights_after(tmp_path, rows, split, model=model, label_smoothing_factor=smoothing))
    assert not results[0]["model.layers.0.mlp.gate.weight"].equal(model_of().model.sparse_blocks[0].gate.weight)
    for weights in results[1:]:
        assert_same_weights(weights, results[0])


def test_classifier_logs(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": number % 3} for number, row in enumerate(blocks())]
    model = model_of(auto=STMoEForSequenceClassification, num_labels=3)
    batch = default_data_collator(rows)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"]).item()
    trainer = trainer_of(model, tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    log = training_logs(trainer)[0]
    assert log["lm_loss"] == pytest.approx(expected, rel=1e-5)
    assert log["loss"] == pytest.approx(
        log["lm_loss"] + BALANCE * log["balance_loss"] + Z * log["router_z_loss"], rel=1e-5
    )


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    models, lines = [], []
    for on in (False, True):
        model = model_of()
        output = tmp_path / str(on)
        trainer = trainer_of(model, output, ragged(), collator=padding_collator(), max_steps=2, **{CHECKPOINTING: on})
        trainer.train()
        assert getattr(model, f"is_{CHECKPOINTING}") == on
        models.append(dict(model.state_dict()))
        lines.append([line for line in router_log(output) if "loss" in line])
    assert_same_weights(*models, tolerance=1e-7)
    for plain, checkpointed in zip(*lines, strict=True):
        assert checkpointed["expert_load"] == plain["expert_load"]
        for name in ("loss", "lm_loss", "balance_loss", "router_z_loss", "router/entropy", "router/max_load"):
            assert checkpointed[name] == pytest.approx(plain[name], rel=1e-6), name


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    arguments = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        trainer_of(model_of(), tmp_path, blocks(), **arguments).train()


def test_bfloat16_autocast_trains(tmp_path: Path) -> None:
    logs = []
    for bf16 in (False, True):
        model = model_of()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = trainer_of(model, tmp_path / str(bf16), blocks(), max_steps=4, bf16=bf16)
        trainer.train()
        logs.append(training_logs(trainer))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(not parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert logs[1][-1]["loss"] < logs[1][0]["loss"]
    for plain, half in zip(*logs, strict=True):
        assert half["lm_loss"] != plain["lm_loss"]
        assert half["lm_loss"] == pytest.approx(plain["lm_loss"], rel=0.02)
        assert half["balance_loss"] == pytest.approx(plain["balance_loss"], rel=0.1)


def test_float16_weights_are_refused_and_frozen_ones_are_not(tmp_path: Path) -> None:
    model = model_of().half()
    with pytest.raises(ValueError, match=r"model: trainable weights must be float32 or bfloat16, got float16 .* more"):
        trainer_of(model, tmp_path, blocks()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.gate" in name)
    model.model.sparse_blocks[1].gate.float()
    trainer_of(model, tmp_path, blocks()).train()


# ------------------------------------------------------------------------------------------------ checkpoints


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def long_run(output: Path, **extra: Any) -> Any:
    """Six steps with every source of randomness in them, saved after the third and the sixth."""
    model = model_of(router_jitter_noise=0.1, expert_dropout=0.2, attention_dropout=0.1)
    return trainer_of(
        model,
        output,
        blocks(20),
        trainer_class=STMoETrainer,
        extra=extra,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
    )


def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if "loss" in entry} for entry in entries if "loss" in entry]


def same(left: Any, right: Any) -> bool:
    """Bit for bit, in nested containers."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Tensor | np.ndarray):
        return type(left) is type(right) and left.shape == right.shape and bool((left == right).all())
    return left == right


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = long_run(tmp_path / "whole")
    whole.train()
    first = long_run(tmp_path / "parts", callbacks=[StopAfter(4)])
    first.train()
    assert [line["step"] for line in router_log(tmp_path / "parts") if "loss" in line] == [1, 2, 3, 4]
    torch.manual_seed(123)  # whatever happened in between
    second = long_run(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert same(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert not same(dict(first.model.state_dict()), dict(whole.model.state_dict()))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(tmp_path / run / "checkpoint-6" / name, weights_only=False) for run in ("whole", "parts")]
        assert same(*states), name
    assert training_logs(second) == training_logs(whole)
    logs = [without_times(router_log(tmp_path / run)) for run in ("whole", "parts")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert logs[0] == logs[1]


def test_best_model_is_loaded_with_its_experts(tmp_path: Path) -> None:
    model = model_of()
    trainer = trainer_of(
        model,
        tmp_path,
        blocks(24),
        held_out=blocks(4),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first checkpoint counts as the best
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (STMoEForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (1, 3))
    assert same(dict(model.state_dict()), dict(best))
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        assert not best[name].equal(last[name])


# ------------------------------------------------------------------------------------------------ the log file


def test_log_file_holds_what_the_report_reads(tmp_path: Path) -> None:
    trainer = trainer_of(
        model_of(sparse_layers=[1]),
        tmp_path,
        blocks(24),
        held_out=blocks(4, seed=3),
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    lines = router_log(tmp_path)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4]
    for line, log in zip(training, training_logs(trainer), strict=True):
        assert line == {**log, "layers": [1], "expert_load": line["expert_load"]}
        assert np.array(line["expert_load"]).shape == (1, EXPERTS)
        assert np.array(line["expert_load"]).sum(-1) == pytest.approx(1.0)
    (evaluation,) = [line for line in lines if "eval_loss" in line]
    assert evaluation["step"] == 4
    assert {name for name in evaluation if not name.startswith("eval_")} == {"step", "epoch"}


def test_log_file_starts_anew_with_a_run(tmp_path: Path) -> None:
    (tmp_path / ROUTER_LOG).write_text('{"step": 99, "loss": 1.0}\n', encoding="utf-8")
    trainer_of(model_of(), tmp_path, blocks(), max_steps=1).train()
    assert [line["step"] for line in router_log(tmp_path)] == [1, 1]


def test_log_file_is_cut_where_a_run_resumes(tmp_path: Path) -> None:
    long_run(tmp_path).train()
    with (tmp_path / ROUTER_LOG).open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')  # killed while it wrote
    long_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [line["step"] for line in router_log(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_log_file_takes_whatever_a_user_logs(tmp_path: Path) -> None:
    trainer = trainer_of(model_of(), tmp_path, blocks())
    trainer.train()
    trainer.log({"mine": torch.tensor(2.0), "other": float("nan")})
    assert router_log(tmp_path)[-1]["step"] == 1


# ------------------------------------------------------------------------------------------------ other trainers


class UsersTrainer(Trainer):
    """A trainer as users write them: with a loss hook and metrics of its own."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "calls": float(getattr(self, "calls", 0))}, *args, **kwargs)


class UsersSTMoETrainer(STMoETrainerMixin, UsersTrainer):
    pass


def test_mixin_over_a_trainer_of_the_users(tmp_path: Path) -> None:
    ours, theirs = (
        trainer_of(model_of(), tmp_path / cls.__name__, blocks(24), trainer_class=cls, max_steps=2)
        for cls in (STMoETrainer, UsersSTMoETrainer)
    )
    ours.train()
    theirs.train()
    assert theirs.calls == 2
    logs = training_logs(theirs)
    assert [log.pop("calls") for log in logs] == [1.0, 2.0]
    assert logs == training_logs(ours)
    assert same(dict(theirs.model.state_dict()), dict(ours.model.state_dict()))


class LoRARun:
    """A mixture with adapters on its experts and its attention, after four steps."""

    def __init__(self, output: Path) -> None:
        from peft import LoraConfig, get_peft_model

        self.base = model_of(balance_loss_coef=1e-2, router_z_loss_coef=1e-3)
        self.before = {name: tensor.clone() for name, tensor in self.base.state_dict().items()}
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(copy.deepcopy(self.base), config)
        self.trainer = trainer_of(self.model, output, blocks(), max_steps=4, learning_rate=1.0)
        self.trainer.train()


def test_lora_trains_experts_and_leaves_routers(tmp_path: Path) -> None:
    from peft import PeftModel

    run = LoRARun(tmp_path)
    logs = training_logs(run.trainer)
    assert logs[-1]["lm_loss"] < logs[0]["lm_loss"]
    for log in logs:
        parts = log["lm_loss"] + 1e-2 * log["balance_loss"] + 1e-3 * log["router_z_loss"]
        assert log["loss"] == pytest.approx(parts, rel=1e-5)
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum("experts" in name for name in trained) == LAYERS * 2 * 2
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            assert parameter.abs().max() > 0, name
    assert router_log(tmp_path)[0]["layers"] == [0, 1]

    ids = token_ids(seed=5)
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
        assert (expected - run.base.eval()(input_ids=ids).logits).abs().max() > 1e-2
        run.trainer.save_model(str(tmp_path / "adapter"))
        again = PeftModel.from_pretrained(copy.deepcopy(run.base), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert isinstance(merged, STMoEForCausalLM)
    state = merged.state_dict()
    assert state.keys() == run.before.keys()
    for name, tensor in run.before.items():
        changed = any(part in name for part in ("experts", "q_proj", "v_proj"))
        assert state[name].equal(tensor) != changed, name


# TRL replaces the head's forward pass, and the model's loss with it.
def sft_trainer(output: Path, rows: list[dict[str, Any]], model: Any = None, **arguments: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    class Mixed(STMoETrainerMixin, SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    settings = {
        "output_dir": str(output),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "router_aux_loss_coef": BALANCE,
        CHECKPOINTING: False,
    }
    return Mixed(
        model=model or model_of(),
        args=SFTConfig(**{**settings, **arguments}),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
        eval_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["blocks", "padded"])
@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (2, 2)])
def test_sft_trainer_trains_like_ours(tmp_path: Path, size: int, accumulate: int, padded: bool) -> None:
    pytest.importorskip("trl")
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in (ragged() if padded else blocks())]
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    ours = trainer_of(model_of(), tmp_path / "ours", rows, collator=padding_collator("right"), max_steps=2, **split)
    theirs = sft_trainer(tmp_path / "theirs", rows, **split)
    ours.train()
    theirs.train()
    assert_same_weights(dict(theirs.model.state_dict()), dict(ours.model.state_dict()), tolerance=5e-6)
    names = ("loss", "lm_loss", "balance_loss", "router_z_loss", "router/entropy", "router/max_load")
    for log, expected in zip(training_logs(theirs), training_logs(ours), strict=True):
        for name in names:
            assert log[name] == pytest.approx(expected[name], rel=1e-4), name
    loads = [router_log(tmp_path / run)[0]["expert_load"] for run in ("theirs", "ours")]
    assert np.array(loads[0]) == pytest.approx(np.array(loads[1]), rel=1e-6)
    assert not theirs.model.config.output_router_logits
    theirs.eval_dataset = theirs.train_dataset
    ours.eval_dataset = ours.train_dataset
    assert theirs.evaluate()["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_sft_trainer_that_changes_a_coefficient_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(trainer_module.logger, "propagate", True)
    trainer = sft_trainer(tmp_path / "a", blocks(), router_aux_loss_coef=0.25)
    assert f"set balance_loss_coef from {BALANCE} to 0.25" in caplog.text
    trainer.train()
    log = training_logs(trainer)[0]
    parts = log["lm_loss"] + 0.25 * log["balance_loss"] + Z * log["router_z_loss"]
    assert log["loss"] == pytest.approx(parts, rel=1e-5)
    caplog.clear()
    sft_trainer(tmp_path / "b", blocks(), router_aux_loss_coef=BALANCE)
    assert "balance_loss_coef" not in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_with_a_loss_that_reaches_no_router_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match="label_smoothing_factor and compute_loss_func must not be set"):
        sft_trainer(tmp_path, blocks(), label_smoothing_factor=0.1)
