"""Fine-tuning with the host's Trainer, with every router loss in its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel
from st_moe.modeling.outputs import STMoECausalLMOutput
from st_moe.modeling.routing.scope import RoutingScope, activate, token_mask_of

logger = logging.get_logger(__name__)

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
        # The sums are long: float64 where the device has it.
        weight = num_labels.detach().to(torch.float32 if num_labels.device.type == "mps" else torch.float64)
        means = {
            **outputs["aux_losses"],
            "router/entropy": outputs["router_entropy"].mean(),
            "expert_load": outputs["expert_load"],
        }
        terms = {name: value.detach().to(weight) * weight for name, value in means.items()}
        terms["labels"] = weight
        if lm_sum is not None:
            terms["lm_loss"] = lm_sum.detach().to(weight)
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def reduce(self, accelerator: Any, num_experts: list[int]) -> tuple[dict[str, float], list[list[float]]]:
        """Means over all ranks since the last call, which start anew.

        Args:
            accelerator: the Trainer's.
            num_experts: E of each sparse layer.

        Returns:
            The scalars by name, and the expert load [L][E], each row summing to 1.
        """
        sums = {name: accelerator.reduce(self.sums[name].float(), reduction="sum") for name in sorted(self.sums)}
        self.sums = {}
        labels = sums.pop("labels").clamp(min=1)
        means = {name: total / labels for name, total in sums.items()}
        load = [row[:count] for row, count in zip(means.pop("expert_load").tolist(), num_experts, strict=True)]
        scalars = {name: mean.item() for name, mean in means.items()}
        scalars["router/max_load"] = max(max(row) * len(row) for row in load)
        scalars["router/dead_experts"] = float(sum(row.count(0.0) for row in load))
        return scalars, load


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


class RouterBiasUpdate(TrainerCallback):
    """Moves the selection biases after steps of an optimizer that torch does not see; else they have moved by now."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A step that was skipped for its infinite gradients is none.
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            return
        for module in kwargs["model"].modules():
            if isinstance(module, STMoEPreTrainedModel):
                module.update_router_bias()


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

    The routers' losses are part of the mixture's own loss. Where the host's label smoothing, `compute_loss_func` or the
    head of a TRL trainer replaces that, they are added; a `compute_loss` of your own adds `outputs.aux_loss` itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = getattr(kwargs.get("model", args[0] if args else None), "config", None)
        wanted = getattr(config, "balance_loss_coef", None)
        super().__init__(*args, **kwargs)
        found = getattr(config, "balance_loss_coef", None)
        if found != wanted:
            logger.warning(
                f"{type(self).__name__} set balance_loss_coef from {wanted} to {found}; its argument "
                "router_aux_loss_coef decides, not the model's config."
            )
        self.router_metrics = RouterMetrics()
        self.add_callback(RouterLogFile())
        self.add_callback(RouterBiasUpdate())
        if self.label_smoother is not None and self._loss_shifts_labels:
            self.label_smoother = _ShiftingLabelSmoother(self.label_smoother.epsilon)
        self._head_bypassed = _adopt_patched_head(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the host does.

        Raises:
            ValueError: when trainable weights are float16, whose gradients no loss scaler can unscale.
        """
        if not self.is_deepspeed_enabled:
            check_trainable(_model(self))
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The host's loss; in training the routers' losses and loads are noted for the next log."""
        named: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **named)
        labels = _target_labels(inputs, self._loss_shifts_labels)
        if self._head_bypassed:
            tokens = inputs["input_ids"]
            mask = token_mask_of(inputs.get("attention_mask"), tokens.shape[0], tokens.shape[1], tokens.device)
            with activate(RoutingScope(mask, tokens, with_losses=True)) as scope:
                found: Any = super().compute_loss(model, inputs, return_outputs=return_outputs, **named)
            loss, outputs = found if return_outputs else (found, None)
            routed = STMoECausalLMOutput()
            _mixture(self)._add_losses(routed, scope, 1.0)
        else:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **named)
            routed = outputs
        if isinstance(routed, dict) and routed.get("aux_losses") is not None:
            loss = self._note_routing(routed, loss, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _note_routing(
        self, routed: Any, loss: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Note a micro-batch for the next log.

        Returns:
            The loss, with the routers' part if it was made without the model's own loss, which carries it.
        """
        num_labels = loss.new_tensor(1.0) if labels is None else (labels != -100).sum()
        # What a loss is divided by: the label tokens of the whole step, or those of the micro-batch.
        total = num_labels.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        lm_loss = routed.get("lm_loss")
        if lm_loss is not None:
            lm_sum = lm_loss * (total if self.model_accepts_loss_kwargs else num_labels)
        elif self._head_bypassed or self.label_smoother is not None or self.compute_loss_func is not None:
            multiplier = self._loss_multiplier(num_items_in_batch)
            lm_sum = loss * total / multiplier
            loss = loss + (routed["aux_loss"] * (num_labels / total)).to(loss.device, loss.dtype) * multiplier
        else:
            lm_sum = None
        self.router_metrics.add(routed, num_labels, lm_sum)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the host does, but draw nothing from training's random numbers: a resumed run stays exact."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _loss_multiplier(self, num_items_in_batch: Tensor | int | None) -> int:
        """Factor by which the host multiplies a loss that is normalised over all ranks."""
        over_ranks = self.args.average_tokens_across_devices and num_items_in_batch is not None
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return self.accelerator.num_processes if over_ranks and accepts else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the host does, with the routers' numbers beside the training loss."""
        line: dict[str, Any] = {}
        if "loss" in logs and self.router_metrics.sums:
            config = _mixture(self).config
            sizes = [experts for experts, _ in config.layer_sizes]
            scalars, load = self.router_metrics.reduce(self.accelerator, sizes)
            logs.update(scalars)
            line = {"layers": config.sparse_layer_indices, "expert_load": load}
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs, **line}
            with (Path(str(self.args.output_dir)) / ROUTER_LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")


class STMoETrainer(STMoETrainerMixin, Trainer):
    """The host's Trainer for mixtures; see `STMoETrainerMixin` for what it adds to the logs."""


class _ShiftingLabelSmoother(LabelSmoother):
    """The host's label smoothing of a causal language model; the host knows only its own classes for such by name."""

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        return super().__call__(model_output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)


def check_trainable(model: nn.Module) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: when trainable weights are float16, whose gradients no loss scaler can unscale.
    """
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"model: trainable weights must be float32 or bfloat16, got float16 ({half[0]} and {len(half) - 1} more); "
            "float16 gradients underflow without a loss scaler, and a scaler needs float32 weights: load with "
            "dtype=torch.float32 and set fp16=True, or use bfloat16"
        )


def _model(trainer: Trainer) -> Any:
    """The Trainer's model, an adapter around a mixture included."""
    return trainer.model


def _mixture(trainer: Trainer) -> Any:
    """The mixture in the Trainer's model; None if there is none."""
    return next((module for module in _model(trainer).modules() if isinstance(module, STMoEPreTrainedModel)), None)


def _adopt_patched_head(trainer: Any) -> bool:
    """Whether a trainer put its own language-model head in the place of the mixture's, as those of TRL do.

    Such a head knows nothing of the routers' losses, and TRL adds a balance loss of another scale, which is switched
    off here: the mixin adds the mixture's own.

    Raises:
        ValueError: when the trainer would compute its loss in a way that reaches no router.
    """
    mixture = _mixture(trainer)
    if mixture is None or not hasattr(trainer, "aux_loss_enabled"):
        return False
    trainer.aux_loss_enabled = False
    mixture.config.output_router_logits = False
    bypassed = "forward" in vars(mixture)
    if bypassed and (trainer.label_smoother is not None or trainer.compute_loss_func is not None):
        raise ValueError(
            f"args: label_smoothing_factor and compute_loss_func must not be set with {type(trainer).__name__}, whose "
            "loss would then leave out the routers' losses; use STMoETrainer for them"
        )
    return bypassed


def _target_labels(inputs: dict[str, Any], shifts: bool) -> Tensor | None:
    """Labels that the loss counts, before the host takes them out of the inputs."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    return labels[..., 1:] if shifts and labels is not None else labels
