"""Every router of the registry trains with the Trainer, shows its losses in the log, saves and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from st_moe import STMoETrainer
from st_moe.configuration import ROUTER_TYPES
from tests.families import mixture, token_ids

#: What a router cannot do without, beside the defaults.
NEEDS: dict[str, dict[str, Any]] = {
    "expert_choice": {"allow_non_causal_routing": True},
    "soft": {"allow_non_causal_routing": True},
    "mixture_of_depths": {"num_experts": 1, "num_experts_per_tok": 1},
}


def train(name: str, folder: Path, resume: str | None = None, **more: Any) -> STMoETrainer:
    model = mixture(router_type=name, **NEEDS.get(name, {}))
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(16, 10)]
    common: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = STMoETrainer(model=model, args=TrainingArguments(str(folder), **{**common, **more}), train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", list(ROUTER_TYPES))
def test_every_router_trains_logs_saves_and_resumes(name: str, tmp_path: Path) -> None:
    before = mixture(router_type=name, **NEEDS.get(name, {})).state_dict()
    trainer = train(name, tmp_path / "straight")
    logged = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    assert len(logged) == 2
    config = trainer.model.config
    active = {loss for loss, coefficient in config.loss_coefficients.items() if coefficient > 0}
    assert active <= set(logged[-1])
    parts = sum(config.loss_coefficients[loss] * logged[-1][loss] for loss in active)
    assert logged[-1]["loss"] == pytest.approx(logged[-1]["lm_loss"] + parts, abs=2e-3)
    after = trainer.model.state_dict()
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert any(".experts." in key for key in moved)
    if ROUTER_TYPES[name].losses:
        assert any(".gate." in key for key in moved), "the router learns"
    resumed = train(name, tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-2"))
    again = resumed.model.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "checkpoint-4").state_dict()
    for key, tensor in after.items():
        assert torch.equal(loaded[key], tensor), key
        assert torch.equal(again[key], tensor), key
