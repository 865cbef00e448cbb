"""The adaptive process: when it records, what it changes, and that ranks, resumption and checkpointing agree."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from st_moe import AdaptiveExperts, STMoETrainer, upcycle
from st_moe.finetune import adaptive as adaptive_module
from tests.families import checkpoint_activations, dense_model, mixture, perturb, token_ids

LAYERS, HIDDEN, EXPERTS = 2, 32, 4
FIELDS = {"router_type": "top_any", "initial_experts": 3}


def model_of(**fields: Any) -> Any:
    """A training mixture with slots out of use, an expert that no token wants, and tokens that want no expert."""
    model = mixture(**{**FIELDS, **fields}).train()
    for gate in gates_of(model):
        with torch.no_grad():
            gate.thresholds.fill_(0.15)
            gate.thresholds[1] = 40.0
    return model


def gates_of(model: nn.Module) -> list[Any]:
    return [block.gate for block in model.base_model.sparse_blocks]


def active_of(model: nn.Module) -> list[list[bool]]:
    return [gate.active_experts.tolist() for gate in gates_of(model)]


def forward(model: Any, seed: int = 0) -> Tensor:
    ids = token_ids(seed=seed)
    return model(ids, labels=ids, use_cache=False).loss


def plain_loop(model: Any, adaptive: AdaptiveExperts, steps: int, first: int = 0, rate: float = 1e-3) -> Any:
    """AdamW over two micro-batches a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    adaptive.start(model)
    for step in range(first, first + steps):
        for micro in range(2):
            forward(model, seed=2 * step + micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        adaptive.step(model, optimizer)
    return optimizer


class InOrder:
    """Rows as they come, for any Trainer."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class Ours(InOrder, STMoETrainer):
    pass


class Hosts(InOrder, Trainer):
    pass


def trainer_of(model: Any, output: Path, callback: TrainerCallback, kind: type = Ours, **arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(40, 12).tolist()]
    return kind(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        callbacks=[callback],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "record_every: must be between 1 and update_every=3, got 0"),
        ((4, 3), "record_every: must be between 1 and update_every=3, got 4"),
        ((1, 0), "record_every: must be between 1 and update_every=0, got 1"),
        ((1, 1, 0), "max_experts: must be at least 1 or None, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveExperts(*arguments)


@pytest.mark.parametrize("record_every", [1, 2, 3])
def test_the_last_steps_of_each_cycle_are_recorded(record_every: int) -> None:
    model = model_of()
    adaptive = AdaptiveExperts(record_every, 3)
    adaptive.start(model)
    recording = []
    for _ in range(7):
        recording.append([gate.record is not None for gate in gates_of(model)])
        adaptive.step(model)
    expected = [step % 3 >= 3 - record_every for step in range(7)]
    assert recording == [[each] * LAYERS for each in expected]


def test_sums_are_of_every_recorded_micro_batch() -> None:
    model, adaptive = model_of(), AdaptiveExperts(2, 3)
    expected = torch.zeros(LAYERS, EXPERTS + HIDDEN, dtype=torch.float64)

    def note(layer: int, gate: Any, inputs: Any, routing: Any) -> None:
        wants = routing.extras["open_gates"].detach() > 0
        expected[layer, :EXPERTS] += wants.sum(0)
        expected[layer, EXPERTS:] += inputs[0].detach().double()[~wants.any(1)].sum(0)

    plain_loop(model, adaptive, 1)
    assert adaptive.sums is None
    for layer, gate in enumerate(gates_of(model)):
        gate.register_forward_hook(lambda *args, layer=layer: note(layer, *args))
    forward(model, seed=8)
    forward(model, seed=9)
    with torch.no_grad():
        # Evaluation in between is not counted.
        model.eval()
        before = expected.clone()
        forward(model, seed=10)
        expected.copy_(before)
        model.train()
    adaptive.step(model)
    assert adaptive.sums is not None
    sums = adaptive.sums.view(LAYERS, -1).double()
    assert torch.equal(sums[:, :EXPERTS], expected[:, :EXPERTS])
    assert expected[:, EXPERTS:].abs().max() > 0
    torch.testing.assert_close(sums[:, EXPERTS:], expected[:, EXPERTS:], rtol=1e-5, atol=1e-5)


def test_recomputation_does_not_count_twice() -> None:
    sums = []
    for checkpointed in (False, True):
        model, adaptive = model_of(), AdaptiveExperts(1, 2)
        if checkpointed:
            checkpoint_activations(model)
        plain_loop(model, adaptive, 1)
        forward(model).backward()
        sums.append([gate.stop_recording() for gate in gates_of(model)])
    for plain, recomputed in zip(*sums, strict=True):
        assert plain[0].sum() > 0
        assert torch.equal(plain[0], recomputed[0])
        torch.testing.assert_close(plain[1], recomputed[1])


def test_an_update_removes_and_adds_and_the_next_cycle_starts_empty() -> None:
    model, adaptive = model_of(), AdaptiveExperts(2, 2)
    shapes = [parameter.shape for parameter in model.parameters()]
    plain_loop(model, adaptive, 1)
    assert active_of(model) == [[True, True, True, False]] * LAYERS
    assert adaptive.sums is not None
    plain_loop(model, adaptive, 1, first=1)
    # Slot 1 left unused and was put to use again at once.
    assert active_of(model) == [[True, True, True, False]] * LAYERS
    for gate in gates_of(model):
        assert gate.thresholds[1] == 0
        assert gate.weight[1].norm().item() == pytest.approx(1, abs=1e-5)
    assert adaptive.sums is None
    assert [parameter.shape for parameter in model.parameters()] == shapes


def test_max_experts_caps_every_layer() -> None:
    for most, expected in ((2, [True, False, True, False]), (3, [True, True, True, False])):
        model = model_of()
        plain_loop(model, AdaptiveExperts(1, 1, most), 1)
        assert active_of(model) == [expected] * LAYERS


def test_nothing_seen_changes_nothing() -> None:
    model = model_of()
    adaptive = AdaptiveExperts(1, 1)
    before = copy.deepcopy(model.state_dict())
    adaptive.step(model)
    adaptive.step(model)
    assert adaptive.steps == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["tensors", "modules"])
def test_optimizer_state_of_a_reused_slot_is_zero(kind: str) -> None:
    if kind == "tensors":
        model = model_of()
    else:
        model = upcycle(dense_model("apertus"), num_experts=4, verify=False, **FIELDS).train()
        perturb(model)
        for gate in gates_of(model):
            gate.thresholds.data.fill_(0.1)
            gate.thresholds.data[1] = 40.0
    adaptive = AdaptiveExperts(1, 3)
    # Slot 1 is used in the first steps, so that it has a state to lose.
    wanted = [gate.thresholds.data.clone() for gate in gates_of(model)]
    for gate in gates_of(model):
        gate.thresholds.data[1] = -1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    adaptive.start(model)
    for step in range(3):
        if step == 2:
            for gate, thresholds in zip(gates_of(model), wanted, strict=True):
                gate.thresholds.data.copy_(thresholds)
        forward(model, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
        adaptive.step(model, optimizer)
    for block in model.base_model.sparse_blocks:
        assert block.gate.thresholds[1] == 0
        modular = isinstance(block.experts, nn.ModuleList)
        own = [] if modular else list(block.experts.parameters())
        for parameter in (*block.gate.parameters(), *own):
            for name in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[parameter][name]
                assert before[parameter][name][1].abs().max() > 0
                assert state[1].abs().max() == 0
                rest = [0, 2, 3]
                assert torch.equal(state[rest], before[parameter][name][rest])
            assert optimizer.state[parameter]["step"] == 3
        for number, expert in enumerate(block.experts if modular else []):
            for parameter in expert.parameters():
                moved = optimizer.state[parameter]["exp_avg"].abs().max()
                assert (moved == 0) == (number in (1, 3))
    untouched = model.get_input_embeddings().weight
    assert torch.equal(optimizer.state[untouched]["exp_avg"], before[untouched]["exp_avg"])


def test_state_of_a_plain_loop_is_exact() -> None:
    whole, halves = model_of(), model_of()
    plain = AdaptiveExperts(3, 4)
    first = AdaptiveExperts(3, 4)
    for model, adaptive in ((whole, plain), (halves, first)):
        plain_loop(model, adaptive, 2)
    second = AdaptiveExperts(3, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.sums is not None
    assert second.sums is not None
    assert torch.equal(first.sums, second.sums)
    for model, adaptive in ((whole, plain), (halves, second)):
        plain_loop(model, adaptive, 2, first=2)
    for (name, ours), theirs in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert whole.model.sparse_blocks[0].gate.thresholds[1] == 0


@pytest.mark.parametrize(("kind", "restore", "saved_at"), [(Ours, False, 3), (Ours, True, 5), (Hosts, True, 3)])
def test_a_resumed_run_is_the_uninterrupted_one(kind: type, restore: bool, saved_at: int, tmp_path: Path) -> None:
    """Updates after steps 4 and 8; saved in the middle of recording, and after an update."""
    whole = model_of()
    trainer = trainer_of(whole, tmp_path / "whole", AdaptiveExperts(3, 4), kind, max_steps=9)
    trainer.train()
    first = model_of()
    saving = {"save_strategy": "steps", "save_steps": saved_at, "max_steps": 9}
    trainer_of(first, tmp_path / "cut", AdaptiveExperts(3, 4), kind, **{**saving, "max_steps": saved_at}).train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{saved_at}"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["AdaptiveExperts"]
    progress = saved["attributes"]["progress"]
    assert progress["steps"] == saved_at
    assert (progress["sums"] is None) == (saved_at == 5)
    resumed = model_of()
    saving["restore_callback_states_from_checkpoint"] = restore
    trainer = trainer_of(resumed, tmp_path / "cut", AdaptiveExperts(3, 4), kind, **saving)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(gate.record is None for gate in gates_of(resumed))
    # Something did happen: slot 1 left, came back with another threshold, or both.
    assert all(not gate.active_experts[1] or gate.thresholds[1] < 1 for gate in gates_of(whole))


def test_a_run_may_start_to_adapt_when_it_resumes(tmp_path: Path) -> None:
    model = model_of()
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(model, tmp_path, TrainerCallback(), max_steps=1, **saving).train()
    adaptive = AdaptiveExperts(1, 2)
    trainer = trainer_of(model, tmp_path, adaptive, max_steps=4, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert adaptive.steps == 3


def test_logs_show_the_active_experts(tmp_path: Path) -> None:
    model = model_of()
    trainer = trainer_of(model, tmp_path, AdaptiveExperts(1, 2, max_experts=2), max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["router/active_experts"] for entry in logs] == [3.0, 2.0, 2.0]
    lines = [json.loads(line) for line in (tmp_path / "router_log.jsonl").read_text().splitlines()]
    assert [line["router/active_experts"] for line in lines if "loss" in line] == [3.0, 2.0, 2.0]


def test_other_routers_are_refused(tmp_path: Path) -> None:
    model = mixture()
    with pytest.raises(ValueError, match=r"router_type: must be 'top_any' for AdaptiveExperts, got a .*ForCausalLM"):
        AdaptiveExperts(1, 1).step(model)
    with pytest.raises(ValueError, match="router_type: must be 'top_any'"):
        trainer_of(model, tmp_path, AdaptiveExperts(1, 1)).train()


def test_sharded_parameters_are_refused() -> None:
    model = model_of()
    gate = gates_of(model)[1]
    gate.weight = nn.Parameter(gate.weight.detach()[:2])
    with pytest.raises(ValueError, match=r"weight: must be whole on every rank .* shard of shape \(2, 32\)"):
        AdaptiveExperts(1, 1).start(model)


def test_works_through_a_wrapper() -> None:
    model = model_of()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    assert len(adaptive_module._top_any_blocks(Wrapper())) == LAYERS


RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.finetune.test_adaptive import AdaptiveExperts, active_of, forward, gates_of, model_of
dist.init_process_group("gloo")
rank, synchronised = dist.get_rank(), DistributedDataParallel(model := model_of())
optimizer, adaptive = torch.optim.AdamW(model.parameters(), lr=1e-3), AdaptiveExperts(2, 3)
adaptive.start(synchronised)
states = []
for step in range(3):
    forward(synchronised, seed=2 * step + rank).backward()
    optimizer.step()
    optimizer.zero_grad()
    adaptive.step(synchronised, optimizer)
    states.append(adaptive.state_dict())
torch.save((states, active_of(model), model.state_dict()), sys.argv[1] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_take_the_decision_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, str(script), str(tmp_path / "rank")]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=False) for rank in range(2)]
    assert ranks[0][0] == ranks[1][0]
    assert ranks[0][1] == ranks[1][1]
    for (name, ours), theirs in zip(ranks[0][2].items(), ranks[1][2].values(), strict=True):
        assert torch.equal(ours, theirs), name
    # One process that sees both ranks' batches.
    model, adaptive = model_of(), AdaptiveExperts(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adaptive.start(model)
    for step in range(3):
        for rank in range(2):
            (forward(model, seed=2 * step + rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        adaptive.step(model, optimizer)
        if step == 1:
            assert adaptive.sums is not None
            sums = adaptive.sums.view(LAYERS, -1)
            found = torch.tensor(ranks[0][0][1]["sums"]).view(LAYERS, -1)
            assert torch.equal(found[:, :EXPERTS], sums[:, :EXPERTS])
            torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-4)
    assert active_of(model) == ranks[0][1]
