"""Fine-tune a saved mixture on text: what `st-moe finetune` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from st_moe.conversion import check_checkpoint
from st_moe.finetune.data import load_text_dataset, split_dataset
from st_moe.finetune.trainer import STMoETrainer
from st_moe.modeling import STMoEForCausalLM


def finetune(
    model: str | Path,
    data: str,
    output: str | Path,
    *,
    max_length: int = 512,
    eval_fraction: float = 0.05,
    resume: bool = False,
    report_to: Sequence[str] = (),
    **training_arguments: Any,
) -> dict[str, float]:
    """Fine-tune a mixture on a jsonl file, a folder of text or a Hub data set; the result is saved in `output`.

    Args:
        model: folder or Hub name of a mixture with its tokenizer.
        data: as for `st_moe.finetune.data.load_text_dataset`.
        output: folder of checkpoints, logs and the final model.
        max_length: tokens per training block.
        eval_fraction: share of the blocks held out for `eval_loss`; 0 evaluates nothing.
        resume: whether to go on from the last checkpoint in `output`.
        report_to: the host's logging integrations, such as `"tensorboard"`.
        training_arguments: fields of the host's `TrainingArguments`.

    Returns:
        The last metrics: `train_loss`, and `eval_loss` if something is held out.

    Raises:
        ValueError: when an argument, the model or the data is at fault; nothing is written then.
    """
    out = Path(output)
    checkpoint = get_last_checkpoint(out) if resume and out.is_dir() else None
    if resume and checkpoint is None:
        raise ValueError(f"resume: {out} must hold a checkpoint-N folder to go on from, but holds none")
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"output: must be a new or empty folder, but {out} is not; pass resume to go on from it")
    check_checkpoint(model)
    tokenizer = load_tokenizer(model)
    blocks = load_text_dataset(data, tokenizer, max_length=max_length)
    seed = training_arguments.setdefault("seed", 42)
    train, held_out = split_dataset(blocks, eval_fraction, seed) if eval_fraction else (blocks, None)
    training_arguments.setdefault("eval_strategy", "no" if held_out is None else "epoch")
    arguments = TrainingArguments(output_dir=str(out), report_to=list(report_to), **training_arguments)
    # Half-precision training keeps float32 weights and casts in autocast, as the host's Trainer expects.
    mixed = arguments.bf16 or arguments.fp16
    mixture = STMoEForCausalLM.from_pretrained(model, dtype=torch.float32 if mixed else "auto")
    trainer = STMoETrainer(
        model=mixture,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if held_out is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return metrics


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: when there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {model} must hold its tokenizer (tokenizer.json or the like), but none could be loaded; save one "
            f"there with tokenizer.save_pretrained() ({type(error).__name__})"
        ) from None
