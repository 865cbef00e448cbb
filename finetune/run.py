"""Fine-tune a saved mixture on text: what `st-moe finetune` does."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_xla_available

from st_moe.configuration import STMoEConfig
from st_moe.conversion import check_checkpoint
from st_moe.conversion.checkpoint import mixture_config
from st_moe.finetune.data import load_text_dataset, split_dataset
from st_moe.finetune.trainer import STMoETrainer, check_trainable
from st_moe.modeling import STMoEForCausalLM

DEFAULT_MAX_LENGTH = 512

# Training arguments whose faults the host finds late, after the output folder is made, or not at all.
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
}


def finetune(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    max_length: int | None = None,
    eval_fraction: float = 0.05,
    resume: bool = False,
    report_to: str | Sequence[str] = (),
    **training_arguments: Any,
) -> dict[str, float]:
    """Fine-tune a mixture on a jsonl file, a folder of text or a Hub data set; the result is saved in `output`.

    Args:
        model: folder or Hub name of a mixture with its tokenizer.
        data: as for `st_moe.finetune.data.load_text_dataset`.
        output: folder of checkpoints, logs and the final model.
        max_length: tokens per training block; None takes 512, or fewer if the model's positions end before.
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
    checkpoint = _last_checkpoint(out, resume)
    check_checkpoint(model)
    config = mixture_config(model)
    length = _block_length(config, max_length)
    tokenizer = load_tokenizer(model)
    arguments = _arguments(out, report_to, bool(eval_fraction), training_arguments)
    blocks = load_text_dataset(data, tokenizer, max_length=length)
    train, held_out = split_dataset(blocks, eval_fraction, arguments.seed) if eval_fraction else (blocks, None)
    # Half-precision training keeps float32 weights and casts in autocast, as the host's Trainer expects.
    mixed = arguments.bf16 or arguments.fp16
    mixture = STMoEForCausalLM.from_pretrained(model, dtype=torch.float32 if mixed else "auto")
    check_trainable(mixture)
    with _gone_if_unused(out):
        trainer = STMoETrainer(
            model=mixture, args=arguments, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
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
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {model} must hold its tokenizer (tokenizer.json or the like), but none could be loaded; save one "
            f"there with tokenizer.save_pretrained() ({type(error).__name__})"
        ) from None


def _last_checkpoint(out: Path, resume: bool) -> str | None:
    """The checkpoint to go on from; None for a new run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output: must be a folder, but {out} is a file")
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"output: must be a new or empty folder, but {out} is not; pass resume to go on from it")
        return None
    checkpoint = get_last_checkpoint(out) if out.is_dir() else None
    if checkpoint is None:
        raise ValueError(f"resume: {out} must hold a checkpoint-N folder to go on from, but holds none")
    return checkpoint


def _block_length(config: STMoEConfig, max_length: int | None) -> int:
    """Tokens per block that the model can take."""
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise ValueError(f"model: must be a language model, got {', '.join(config.architectures or ())}")
    limit = getattr(config, "max_position_embeddings", None)
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    # Rotary positions have no end; a table of positions has.
    if limit is not None and max_length > limit and getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"max_length: must be at most max_position_embeddings={limit}, got {max_length}")
    return max_length


def _arguments(out: Path, report_to: str | Sequence[str], evaluates: bool, given: Mapping[str, Any]) -> Any:
    """The host's training arguments, each name and number checked."""
    fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.init}
    own = {"output_dir", "report_to"}
    for name, value in given.items():
        if name in own or name not in fields:
            near = difflib.get_close_matches(name, sorted(fields.keys() - own), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: is not a training argument that can be set here{hint}")
        default = fields[name]
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name}: must be True or False, got {value!r}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, int | float) and not isinstance(default, bool) and not is_number:
            raise ValueError(f"{name}: must be a number, got {value!r}")
        if name in _AT_LEAST and not value >= _AT_LEAST[name]:
            raise ValueError(f"{name}: must be at least {_AT_LEAST[name]}, got {value!r}")
    if given.get("max_steps", -1) <= 0 and not given.get("num_train_epochs", 1) > 0:
        raise ValueError(f"num_train_epochs: must be positive without max_steps, got {given['num_train_epochs']!r}")
    accelerated = torch.accelerator.is_available() or is_torch_xla_available()
    defaults = {
        "eval_strategy": "epoch" if evaluates else "no",
        # Without an accelerator the host refuses bf16 and warns of pinned memory, unless it is told.
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
    }
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return TrainingArguments(output_dir=str(out), report_to=names, **{"seed": 42, **defaults, **given})


@contextmanager
def _gone_if_unused(out: Path) -> Iterator[None]:
    """Remove a folder that is new and still empty when the block fails."""
    is_new = not out.exists()
    try:
        yield
    except BaseException:
        if is_new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
