"""DynMoE's adaptive process: while a mixture trains, unused experts leave and new ones come for unserved tokens.

Shape letters: L sparse layers, H hidden size, E experts (slots, in use or not).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from st_moe.modeling.routing.top_any import TopAnyRouter
from st_moe.modeling.sparse_block import SparseBlock

logger = logging.get_logger(__name__)


class AdaptiveExperts(TrainerCallback, ExportableState):
    """Takes unused experts of a `"top_any"` mixture out of use and adds experts for tokens that none wants.

    Optimizer steps are counted in cycles of `update_every`. During the last `record_every` of a cycle the routers
    record every micro-batch: which experts tokens want, and the inputs of those that want none. After the cycle's last
    step each sparse layer changes by `TopAnyRouter.adapt`, and the next cycle begins. Records are summed over the ranks
    after every recorded step, so all ranks take the same decision and any rank's state is the whole. Where a slot
    comes into use, the optimizer's state of its row, threshold and expert starts from zeros. No parameter changes its
    shape; `prune_experts` makes a smaller model afterwards. Source: Guo et al. 2024 (DynMoE).

    With any Trainer it is a callback (`callbacks=[AdaptiveExperts(100, 300)]`). Its state is saved with the Trainer's
    and read when training resumes, whatever `restore_callback_states_from_checkpoint` says; training logs get
    `router/active_experts`, the mean over the sparse layers. In a loop of your own:

        adaptive.start(model)  # before the first forward pass, and after load_state_dict
        ...
        optimizer.step()
        adaptive.step(model, optimizer)

    Args:
        record_every: optimizer steps at the end of each cycle that are recorded, at least 1.
        update_every: optimizer steps of a cycle, at least `record_every`.
        max_experts: most active experts per layer that an update may lead to; None is all slots.

    Raises:
        ValueError: when an argument breaks its rule.
    """

    def __init__(self, record_every: int, update_every: int, max_experts: int | None = None) -> None:
        if not 1 <= record_every <= update_every:
            raise ValueError(f"record_every: must be between 1 and update_every={update_every}, got {record_every}")
        if max_experts is not None and max_experts < 1:
            raise ValueError(f"max_experts: must be at least 1 or None, got {max_experts}")
        self.record_every = record_every
        self.update_every = update_every
        self.max_experts = max_experts
        #: Optimizer steps so far.
        self.steps = 0
        #: What the cycle has recorded, over all ranks: per layer counts [E], then inputs [H], in one row of float32.
        self.sums: Tensor | None = None

    def start(self, model: nn.Module) -> None:
        """Prepare the routers for the next step.

        Raises:
            ValueError: when the model has no top-any router, or its parameters are sharded.
        """
        recording = self.steps % self.update_every >= self.update_every - self.record_every
        for block in _top_any_blocks(model):
            if recording:
                block.gate.start_recording()
            else:
                block.gate.stop_recording()

    def step(self, model: nn.Module, optimizer: Any = None) -> None:
        """Count an optimizer step, and update the experts if it ends a cycle.

        Args:
            model: the mixture, or what wraps it.
            optimizer: whose state of re-used slots starts anew; None if there is none.

        Raises:
            ValueError: when the model has no top-any router, or its parameters are sharded.
        """
        blocks = _top_any_blocks(model)
        records = [record for block in blocks if (record := block.gate.stop_recording()) is not None]
        if len(records) == len(blocks):
            self._add(records)
        self.steps += 1
        if self.steps % self.update_every == 0:
            self._update(blocks, optimizer)
        self.start(model)

    def _add(self, records: list[tuple[Tensor, Tensor]]) -> None:
        """Add one step's records, of all ranks, to the cycle's."""
        device = records[0][0].device
        step = torch.cat([part.to(device) for record in records for part in record])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(step)
        self.sums = step if self.sums is None else self.sums.to(device) + step

    def _update(self, blocks: list[Any], optimizer: Any) -> None:
        """Change every layer by what the cycle has recorded."""
        if self.sums is None:
            return
        parts = self.sums.cpu().split([size for block in blocks for size in block.gate.weight.shape])
        self.sums = None
        for layer, (block, counts, inputs) in enumerate(zip(blocks, parts[::2], parts[1::2], strict=True)):
            removed, added = block.gate.adapt(counts, inputs, self.max_experts)
            if added is not None and optimizer is not None:
                _forget_slot(optimizer, block, added)
            if removed or added is not None:
                logger.info(f"Step {self.steps}, sparse layer {layer}: experts removed {removed}, added {added}.")

    def state_dict(self) -> dict[str, Any]:
        """Counters and sums as plain numbers, the same on every rank."""
        return {"steps": self.steps, "sums": None if self.sums is None else self.sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; in a loop of your own, `start` follows."""
        self.steps = state["steps"]
        self.sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float32)

    #: The state as the Trainer sets it, where it makes a callback anew.
    progress = property(state_dict, load_state_dict)

    def state(self) -> dict[str, Any]:
        """What the Trainer saves with a checkpoint."""
        names = ("record_every", "update_every", "max_experts")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"progress": self.progress}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(args, "deepspeed", None):
            # It keeps weights of its own, which would overwrite the new rows at the next step.
            raise ValueError(f"deepspeed: must be None with AdaptiveExperts, got {args.deepspeed!r}")
        callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # a dictionary by now
        # The host looks its callbacks up in what it saved; a checkpoint of a run without this one has no entry.
        saved = callbacks.setdefault(type(self).__name__, self.state())
        resumed = state.global_step > 0
        self.progress = saved["attributes"]["progress"] if resumed else {"steps": 0, "sums": None}
        self.start(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step(kwargs["model"], kwargs.get("optimizer"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for block in _top_any_blocks(kwargs["model"]):
            block.gate.stop_recording()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs and "loss" in logs:
            active = [block.gate.active_experts.sum().item() for block in _top_any_blocks(kwargs["model"])]
            # The host has copied the logs into its history already.
            for entry in (logs, state.log_history[-1]):
                entry["router/active_experts"] = sum(active) / len(active)


def _top_any_blocks(model: nn.Module) -> list[Any]:
    """The sparse blocks with a top-any router, in the order of the layers.

    Raises:
        ValueError: when there is none, or when parameters are sharded.
    """
    found = [m for m in model.modules() if isinstance(m, SparseBlock) and isinstance(m.gate, TopAnyRouter)]
    if not found:
        raise ValueError(f"router_type: must be 'top_any' for AdaptiveExperts, got a {type(model).__name__} without it")
    for block in found:
        for module in (block.gate, block.experts):
            for name, parameter in module.named_parameters(recurse=False):
                # A DTensor has placements; other ways of sharding leave a rank fewer rows.
                if hasattr(parameter, "placements") or parameter.shape[:1] != (block.gate.num_experts,):
                    raise ValueError(
                        f"{name}: must be whole on every rank for AdaptiveExperts, got a shard of shape "
                        f"{tuple(parameter.shape)}; use data parallelism without sharding"
                    )
    return found


def _forget_slot(optimizer: Any, block: SparseBlock, slot: int) -> None:
    """Zero what an optimizer keeps of one slot's row, threshold and expert."""
    modules: list[nn.Module] = [block.gate]
    if isinstance(block.experts, nn.ModuleList):
        for parameter in block.experts[slot].parameters():
            _zero_state(optimizer, parameter, ...)
    else:
        modules.append(block.experts)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            _zero_state(optimizer, parameter, slot)


def _zero_state(optimizer: Any, parameter: Tensor, rows: Any) -> None:
    """Zero some rows of an optimizer's state tensors that have a parameter's shape."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0
