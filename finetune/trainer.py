"""Fine-tuning with the host's Trainer, with every router loss in its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: File in the output folder with one JSON object per log call, expert load included; `st-moe report` draws it.
ROUTER_LOG = "router_log.jsonl"


class RouterMetrics:
    """Sums over the micro-batches since the last log; every mean is weighted by label tokens.

    Shape letters: L sparse layers, E experts.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, outputs: Any, num_labels: Tensor, lm_sum: Tensor | None) -> None:
        """Count one micro-batch.

        Args:
            outputs: of a mixture's head in training.
            num_labels: int scalar, label tokens of the micro-batch.
            lm_sum: language-model loss summed over its label tokens, or None if it is not known.
        """
        weight = num_labels.detach().double()
        means = {
            "balance_loss": outputs["balance_loss"],
            "router_z_loss": outputs["router_z_loss"],
            "router/entropy": outputs["router_entropy"].mean(),
            "expert_load": outputs["expert_load"],
        }
        terms = {name: value.detach().double() * weight.to(value.device) for name, value in means.items()}
        terms["labels"] = weight
        if lm_sum is not None:
            terms["lm_loss"] = lm_sum.detach().double()
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def reduce(self, accelerator: Any) -> tuple[dict[str, float], list[list[float]]]:
        """Means over all ranks since the last call, which start anew.

        Returns:
            The scalars by name, and the expert load [L][E], each row summing to 1.
        """
        sums = {name: accelerator.reduce(self.sums[name].float(), reduction="sum") for name in sorted(self.sums)}
        self.sums = {}
        labels = sums.pop("labels").clamp(min=1)
        means = {name: total / labels for name, total in sums.items()}
        load = means.pop("expert_load")
        scalars = {name: mean.item() for name, mean in means.items()}
        scalars["router/max_load"] = (load.max() * load.shape[-1]).item()
        scalars["router/dead_experts"] = float((load == 0).sum().item())
        return scalars, load.tolist()


class RouterLogFile(TrainerCallback):
    """Prepares `ROUTER_LOG`: emptied by a new run, cut back to the checkpoint's step by a resumed one."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / ROUTER_LOG
        kept = []
        if path.is_file() and state.global_step > 0:
            for line in path.read_text(encoding="utf-8").splitlines():
                # A run that was killed may have left half a line.
                if line.endswith("}") and json.loads(line)["step"] <= state.global_step:
                    kept.append(line + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept), encoding="utf-8")


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class STMoETrainerMixin(_Base):
    """What makes a Trainer report a mixture's routers: put it before any Trainer class.

    Training logs gain `lm_loss`, `balance_loss`, `router_z_loss` (means per label token since the last log, over all
    ranks), `router/entropy` (1 uniform), `router/max_load` (largest share of a layer's assignments times E; 1 balanced)
    and `router/dead_experts` (experts without a token since the last log, over all layers). `eval_loss` is the
    language-model loss alone. The same numbers and the expert load go to `router_log.jsonl` in the output folder.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_metrics = RouterMetrics()
        self.add_callback(RouterLogFile())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the host does.

        Raises:
            ValueError: when trainable weights are float16, whose gradients no loss scaler can unscale.
        """
        half = [name for name, p in _model(self).named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if half and not self.is_deepspeed_enabled:
            raise ValueError(
                f"model: trainable weights must be float32 or bfloat16, got float16 ({half[0]} and {len(half) - 1} "
                "more); float16 gradients underflow without a loss scaler, and a scaler needs float32 weights: load "
                "with dtype=torch.float32 and set fp16=True, or use bfloat16"
            )
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The host's loss; in training the routers' losses and loads are noted for the next log."""
        labels = _target_labels(inputs, self._loss_shifts_labels)
        replaced = self.label_smoother is not None or self.compute_loss_func is not None
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and isinstance(outputs, dict) and outputs.get("balance_loss") is not None:
            num_labels = loss.new_tensor(1.0) if labels is None else (labels != -100).sum()
            total = num_items_in_batch if self.model_accepts_loss_kwargs else None
            if replaced and labels is not None:
                # The host computed its own loss from the logits, without the model's, which carries the routers' part.
                share = 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch
                loss = loss + (outputs["aux_loss"] * share).to(loss.dtype) * self._loss_multiplier(num_items_in_batch)
            lm_loss = outputs.get("lm_loss")
            lm_sum = None if lm_loss is None else lm_loss * (num_labels if total is None else total)
            self.router_metrics.add(outputs, num_labels, lm_sum)
        return (loss, outputs) if return_outputs else loss

    def _loss_multiplier(self, num_items_in_batch: Tensor | int | None) -> int:
        """Factor by which the host multiplies a loss that is normalised over all ranks."""
        over_ranks = self.args.average_tokens_across_devices and num_items_in_batch is not None
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return self.accelerator.num_processes if over_ranks and accepts else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the host does, with the routers' numbers beside the training loss."""
        line: dict[str, Any] = {}
        if "loss" in logs and self.router_metrics.sums:
            scalars, load = self.router_metrics.reduce(self.accelerator)
            logs.update(scalars)
            line = {"layers": _model(self).config.sparse_layer_indices, "expert_load": load}
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs, **line}
            with (Path(str(self.args.output_dir)) / ROUTER_LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class STMoETrainer(STMoETrainerMixin, Trainer):
    """The host's Trainer for mixtures; see `STMoETrainerMixin` for what it adds to the logs."""


def _model(trainer: Trainer) -> Any:
    """The Trainer's model, or its base model under an adapter."""
    return trainer.model


def _target_labels(inputs: dict[str, Any], shifts: bool) -> Tensor | None:
    """Labels that the loss counts, before the host takes them out of the inputs."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    return labels[..., 1:] if shifts and labels is not None else labels
