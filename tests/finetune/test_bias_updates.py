"""The selection bias moves once per optimizer step, in every training loop, and by what the formula says."""

import copy
import faulthandler
import gc
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from st_moe import STMoEForCausalLM
from st_moe.finetune import STMoETrainerMixin
from st_moe.finetune.trainer import RouterBiasUpdate
from st_moe.modeling import modeling_st_moe, step_hooks
from st_moe.modeling.routing.sigmoid_top_k import SigmoidTopKRouter
from tests.families import checkpoint_activations, mixture, tiny_tokenizer, token_ids

GAMMA, RATE, LENGTH = 0.05, 0.1, 12
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def model_of(**fields: Any) -> Any:
    return mixture(router_type="sigmoid_top_k", **{"bias_update_rate": GAMMA, **fields}).train()


def biases(model: nn.Module) -> Tensor:
    """The selection bias of each sparse layer, [L, E]."""
    return torch.stack([m.e_score_correction_bias for m in model.modules() if isinstance(m, SigmoidTopKRouter)]).clone()


def pending(model: nn.Module) -> bool:
    return any(m.counts is not None for m in model.modules() if isinstance(m, SigmoidTopKRouter))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def backward(model: nn.Module, ids: Tensor, **kwargs: Any) -> None:
    model(input_ids=ids, labels=ids, **kwargs).loss.backward()


def loop(model: nn.Module, rows: Tensor, steps: int, accumulate: int = 1) -> None:
    """A training loop as users write it: `steps` steps over equal shares of the rows."""
    optimizer = sgd(model)
    for batch in rows.chunk(steps):
        for part in batch.chunk(accumulate):
            backward(model, part, num_items_in_batch=torch.tensor(batch[:, 1:].numel()))
        optimizer.step()
        optimizer.zero_grad()


def choices(model: nn.Module) -> list[list[Tensor]]:
    """A list per router that fills with the real tokens' choices of every call, whoever counts them."""
    seen: list[list[Tensor]] = []
    for module in model.modules():
        if isinstance(module, SigmoidTopKRouter):
            calls: list[Tensor] = []
            module.register_forward_hook(
                lambda _m, given, out, calls=calls: calls.append(out.index[given[1].flatten()])
            )
            seen.append(calls)
    return seen


def moved(calls: list[Tensor], experts: int = 4) -> Tensor:
    """gamma * sign(mean(c) - c_e) of some calls' choices together, expert by expert."""
    chosen = torch.cat(calls).flatten().tolist()
    mean = len(chosen) / experts
    return torch.tensor([GAMMA * ((mean > chosen.count(e)) - (mean < chosen.count(e))) for e in range(experts)])


# --------------------------------------------------------------------------------------------------------- the loops


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_plain_loop_moves_the_bias_once_per_step(accumulate: int) -> None:
    model = model_of()
    seen, optimizer = choices(model), sgd(model)
    expected = torch.zeros(2, 4)
    for step in range(4):
        for part in range(accumulate):
            ids = token_ids(2, LENGTH, seed=10 * step + part)
            mask = torch.ones_like(ids)
            mask[0, :4] = 0
            backward(model, ids, attention_mask=mask)
            assert torch.equal(biases(model), expected)
        optimizer.step()
        expected += torch.stack([moved(calls[-accumulate:]) for calls in seen])
        assert torch.allclose(biases(model), expected)
        assert not pending(model)
    assert expected.abs().max() > GAMMA
    assert biases(model).dtype == torch.float32


def test_checkpointing_counts_once() -> None:
    rows = token_ids(12, LENGTH)
    plain, checkpointed = model_of(), model_of()
    checkpoint_activations(checkpointed)
    seen = choices(checkpointed)
    for model in (plain, checkpointed):
        optimizer = sgd(model)
        for part in (rows[:8], rows[8:]):
            backward(model, part, use_cache=False)
        counts = [m.counts for m in model.modules() if isinstance(m, SigmoidTopKRouter)]
        assert all(count is not None and count.sum() == 12 * LENGTH * 2 for count in counts)
        optimizer.step()
    assert len(seen[0]) == 4, "the layers did run again"
    assert torch.equal(biases(plain), biases(checkpointed))


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class OursInOrder(STMoETrainerMixin, InOrder):
    """Ours, in the same order."""


def settings_of(output: Path, **arguments: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(output),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        CHECKPOINTING: False,
    }
    return {**settings, **arguments}


def trainer_of(cls: type[Trainer], model: Any, output: Path, rows: Tensor, **arguments: Any) -> Any:
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows.tolist()])
    settings = TrainingArguments(**settings_of(output, **arguments))
    return cls(model=model, args=settings, train_dataset=data, eval_dataset=data, data_collator=default_data_collator)


@pytest.mark.parametrize("cls", [InOrder, OursInOrder])
@pytest.mark.parametrize("extra", [{}, {CHECKPOINTING: True}, {"eval_strategy": "steps", "eval_steps": 1}])
def test_trainers_move_it_like_the_plain_loop(cls: type[Trainer], extra: dict[str, Any], tmp_path: Path) -> None:
    rows = token_ids(12, LENGTH)
    model, reference = model_of(), model_of()
    loop(reference, rows, steps=3, accumulate=2)
    trainer_of(cls, model, tmp_path, rows, **extra).train()
    assert torch.equal(biases(model), biases(reference))
    assert biases(model).abs().max() > GAMMA
    assert not pending(model)


@pytest.mark.slow
def test_trl_moves_it_like_the_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer

    class Mixed(STMoETrainerMixin, SFTTrainer):
        _get_train_sampler = InOrder._get_train_sampler

    class Bare(SFTTrainer):
        _get_train_sampler = InOrder._get_train_sampler

    rows = token_ids(12, LENGTH)
    reference = model_of(balance_loss_coef=0.0)
    loop(reference, rows, steps=3, accumulate=2)
    for cls in (Mixed, Bare):
        model = model_of(balance_loss_coef=0.0)
        arguments = settings_of(tmp_path / cls.__name__, bf16=False, router_aux_loss_coef=0.0)
        data = Dataset.from_list([{"input_ids": ids} for ids in rows.tolist()])
        trainer = cls(model=model, args=SFTConfig(**arguments), train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        assert torch.equal(biases(model), biases(reference))
    assert biases(reference).abs().max() > GAMMA


def test_adapters_on_frozen_routers_move_it() -> None:
    model = model_of()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert not any(".gate." in name for name in trained)
    seen = choices(adapted)
    loop(adapted, token_ids(2, LENGTH), steps=1)
    assert torch.equal(biases(model), torch.stack([moved(calls) for calls in seen]))


def test_a_step_of_several_optimizers_moves_it_once() -> None:
    model = model_of()
    seen = choices(model)
    backward(model, token_ids())
    parameters = list(model.parameters())
    for part in (parameters[:3], parameters[3:], parameters):
        torch.optim.SGD(part, lr=RATE).step()
    assert torch.equal(biases(model), torch.stack([moved(calls) for calls in seen]))


@pytest.mark.slow
def test_a_compiled_model_and_optimizer_move_it() -> None:
    torch._dynamo.reset()
    model, reference = model_of(num_hidden_layers=1), model_of(num_hidden_layers=1)
    rows = token_ids(8, LENGTH)
    loop(reference, rows, steps=2, accumulate=2)
    loop(torch.compile(model, backend="aot_eager", fullgraph=True), rows, steps=2, accumulate=2)
    assert torch.equal(biases(model), biases(reference))
    optimizer = sgd(model)
    backward(model, rows)
    before = biases(model)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()
    torch._dynamo.reset()
    assert not torch.equal(biases(model), before)


# --------------------------------------------------------------------------------------------- what must not move it


def test_nothing_but_training_counts() -> None:
    model = model_of()
    optimizer = sgd(model)
    ids = token_ids()
    with torch.no_grad():
        model(ids, labels=ids)
    model.generate(ids, max_new_tokens=2, eos_token_id=None)
    model.eval()
    backward(model, ids)
    assert not pending(model)
    optimizer.step()
    model.update_router_bias()
    assert biases(model).abs().max() == 0


def test_no_step_no_move() -> None:
    model, other = model_of(), model_of(seed=1)
    backward(model, token_ids())
    backward(other, token_ids())
    sgd(other).step()
    sgd(nn.Linear(2, 2)).step()
    assert biases(model).abs().max() == 0
    assert pending(model)
    assert biases(other).abs().max() > 0


def test_the_rate_is_the_configs_of_the_moment() -> None:
    model = model_of(bias_update_rate=0.0)
    loop(model, token_ids(4), steps=2)
    assert biases(model).abs().max() == 0
    assert not pending(model)
    model.config.bias_update_rate = GAMMA
    loop(model, token_ids(2), steps=1)
    assert biases(model).abs().max() == GAMMA


def test_models_without_such_routers_are_not_followed() -> None:
    before = dict(step_hooks._models)
    model = mixture()
    assert dict(step_hooks._models) == before
    model.update_router_bias()


# ------------------------------------------------------------------------------------- copies, lifetimes, and resuming


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "saved"])
def test_copies_follow_their_own_optimizer(way: str, tmp_path: Path) -> None:
    model = model_of()
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        model.save_pretrained(tmp_path)
        twin = STMoEForCausalLM.from_pretrained(tmp_path).train()
    loop(twin, token_ids(2), steps=1)
    assert biases(twin).abs().max() == GAMMA
    assert biases(model).abs().max() == 0
    loop(model, token_ids(2), steps=1)
    assert torch.equal(biases(model), biases(twin))


def test_models_are_not_kept_alive() -> None:
    model = model_of()
    loop(model, token_ids(2), steps=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("cls", [InOrder, OursInOrder])
def test_a_resumed_run_ends_bit_equal(cls: type[Trainer], tmp_path: Path) -> None:
    class Checked(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            assert not pending(kwargs["model"])

    rows = token_ids(24, LENGTH)
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = trainer_of(cls, model_of(), tmp_path, rows, **arguments)
    whole.add_callback(Checked())
    whole.train()
    resumed = trainer_of(cls, model_of(seed=5), tmp_path, rows, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    halfway = STMoEForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert biases(halfway).abs().max() > 0
    assert not torch.equal(biases(halfway), biases(whole.model))


# ----------------------------------------------------------------------------------- optimizers that torch does not see


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No optimizer's step reaches the models that a test makes."""
    monkeypatch.setattr(modeling_st_moe, "update_after_steps", lambda model: None)


@pytest.mark.usefixtures("unseen")
def test_a_call_replaces_the_hook() -> None:
    model = model_of()
    seen = choices(model)
    loop(model, token_ids(2), steps=1)
    assert biases(model).abs().max() == 0
    model.update_router_bias()
    expected = torch.stack([moved(calls) for calls in seen])
    assert torch.equal(biases(model), expected)
    model.update_router_bias()
    assert torch.equal(biases(model), expected)


@pytest.mark.usefixtures("unseen")
def test_our_trainer_needs_no_hook(tmp_path: Path) -> None:
    rows = token_ids(12, LENGTH)
    model, reference = model_of(), model_of()
    trainer_of(InOrder, reference, tmp_path / "theirs", rows).train()
    assert biases(reference).abs().max() == 0
    trainer_of(OursInOrder, model, tmp_path / "ours", rows).train()
    assert biases(model).abs().max() > GAMMA


@pytest.mark.parametrize("skipped", [True, False])
def test_a_skipped_step_moves_nothing(skipped: bool) -> None:
    class Scaled:
        step_was_skipped = skipped

    model = model_of()
    backward(model, token_ids())
    RouterBiasUpdate().on_optimizer_step(None, None, None, model=model, optimizer=Scaled())  # type: ignore[arg-type]
    assert (biases(model).abs().max() == 0) == skipped
    assert pending(model) == skipped


# ----------------------------------------------------------------------------------------------------- several ranks


def train_one_rank(folder: Path) -> None:
    """Every second row of each batch, under data parallelism; the routers' bias goes to a file."""
    faulthandler.dump_traceback_later(60, exit=True)  # what hangs says where, and ends
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = STMoEForCausalLM.from_pretrained(folder / "model").train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = sgd(model)
    found = []
    for batch in token_ids(12, LENGTH).chunk(3):
        backward(wrapped, batch[rank::2])
        optimizer.step()
        optimizer.zero_grad()
        found.append(biases(model))
    torch.save(torch.stack(found), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


RANK = """
import sys
from pathlib import Path
from tests.finetune.test_bias_updates import train_one_rank
train_one_rank(Path(sys.argv[1]))
"""


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_two_ranks_move_it_like_one_process_on_both_ranks_data(tmp_path: Path) -> None:
    # The language-model loss is linear in the batch; the balance loss is not.
    model = model_of(balance_loss_coef=0.0)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    run = subprocess.run(
        [*launcher, str(tmp_path / "rank.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=100,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    own = copy.deepcopy(model)
    loop(model, token_ids(12, LENGTH), steps=3)
    assert torch.equal(first[-1], biases(model))
    # One rank's data alone give another bias.
    loop(own, torch.cat([batch[::2] for batch in token_ids(12, LENGTH).chunk(3)]), steps=3)
    assert not torch.equal(first[-1], biases(own))
