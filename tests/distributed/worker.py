"""One rank of a distributed test: `worker.py JOB FOLDER`, started by torchrun, or alone for the reference."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from st_moe import STMoEForCausalLM, STMoETrainer

PLANS: dict[str, dict[str, int]] = {
    "single": {},
    "tensor_parallel": {"tp_size": 2},
    "expert_parallel": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "expert_parallel_fsdp": {"fsdp_size": 2, "ep_size": 2},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all ranks, if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step_and_generate(job: str, folder: Path) -> dict[str, Any]:
    """Loss, every gradient, logits and a generated continuation under one of `PLANS`."""
    plan = PLANS[job]
    kwargs: dict[str, Any] = {}
    if plan:
        from transformers import DistributedConfig

        kwargs["distributed_config"] = DistributedConfig(**plan)
    model = STMoEForCausalLM.from_pretrained(folder / "model", **kwargs).train()
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    data_parallel = "fsdp_size" in plan
    rows = slice(dist.get_rank(), dist.get_rank() + 1) if data_parallel else slice(None)
    output = model(ids[rows], labels=ids[rows], num_items_in_batch=torch.tensor(ids[:, 1:].numel()))
    output.loss.backward()
    # Data parallelism averages gradients over ranks; the loss is normalised over all of them already.
    scale = 2 if data_parallel else 1
    gradients = {name: whole(p.grad) * scale for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        logits = whole(model(ids[rows]).logits)
    generated = model.generate(ids[rows], max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {
        "rows": rows,
        "gradients": gradients,
        "names": [name for name, _ in model.named_parameters()],
        "logits": logits,
        "generated": generated,
        "balance_loss": output.balance_loss.detach(),
    }


def train(folder: Path, ranks: int) -> dict[str, Any]:
    """Weights and logs after three Trainer steps of eight sequences, whatever the number of ranks."""
    model = STMoEForCausalLM.from_pretrained(folder / "model")
    # Every rank's tokens go to few experts: unused experts must neither hang nor break data parallelism.
    rows = torch.randint(3, 64, (24, 8), generator=torch.Generator().manual_seed(2))
    arguments = TrainingArguments(
        output_dir=str(folder / f"train{ranks}"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // ranks,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = STMoETrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "logs": [entry for entry in trainer.state.log_history if "lm_loss" in entry],
    }


def main() -> None:
    """Run one job and save what it returns, one file per rank."""
    job, folder = sys.argv[1], Path(sys.argv[2])
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    result = train(folder, ranks) if job == "train" else step_and_generate(job, folder)
    torch.save(result, folder / f"{job}{ranks}.{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
