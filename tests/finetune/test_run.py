"""Fine-tuning a saved mixture on text, from the files to the final model."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

from st_moe import STMoEForCausalLM, STMoEForSequenceClassification
from st_moe.finetune import ROUTER_LOG
from st_moe.finetune import run as run_module
from st_moe.finetune.report import read_log
from st_moe.finetune.run import finetune, load_tokenizer
from tests.families import dense_model, mixture, tiny_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on"
FAST: dict[str, Any] = {
    "max_length": 16,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    mixture(router_jitter_noise=0.1).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(12)), encoding="utf-8")
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(STMoEForCausalLM.from_pretrained(folder).state_dict())


def log_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ROUTER_LOG).read_text(encoding="utf-8").splitlines()]


def test_training_lowers_the_loss_and_saves_a_whole_model(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = finetune(model, data, out, **{**FAST, "max_steps": 12})
    losses = [line["loss"] for line in log_lines(out) if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert AutoTokenizer.from_pretrained(out)(TEXT) == tiny_tokenizer()(TEXT)
    before, after = weights_of(model), weights_of(out)
    assert all(not after[name].equal(tensor) for name, tensor in before.items())
    assert json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 12
    # The loss that is reported last is the saved model's.
    held_out = run_module.split_dataset(
        run_module.load_text_dataset(data, load_tokenizer(model), max_length=16), 0.05, 42
    )[1]
    ids = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        loss = STMoEForCausalLM.from_pretrained(out)(input_ids=ids, labels=torch.tensor(held_out["labels"])).loss
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert read_log(out).evaluation[-1]["eval_loss"] == metrics["eval_loss"]


def test_a_folder_of_text(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(6):
        (text / f"{number}.txt").write_text(TEXT * 3, encoding="utf-8")
    assert finetune(model, text, tmp_path / "out", **FAST)["train_loss"] > 0


def test_nothing_is_evaluated_without_held_out_blocks(model: Path, data: Path, tmp_path: Path) -> None:
    metrics = finetune(model, data, tmp_path / "out", eval_fraction=0, **FAST)
    assert "eval_loss" not in metrics
    assert not any("eval_loss" in line for line in log_lines(tmp_path / "out"))


def test_resume_goes_on_bit_for_bit(model: Path, data: Path, tmp_path: Path) -> None:
    settings = {**FAST, "max_steps": 6, "save_steps": 3}
    finetune(model, data, tmp_path / "whole", **settings)
    finetune(model, data, tmp_path / "parts", **settings)
    parts = tmp_path / "parts"
    for path in (parts / "checkpoint-6").iterdir():  # as if it had been stopped after step 3
        path.unlink()
    (parts / "checkpoint-6").rmdir()
    # Step 3 ends an epoch, where the uninterrupted run evaluates after it saves.
    assert json.loads((parts / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))["epoch"] == 1
    finetune(model, data, parts, resume=True, **settings)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(parts)
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())
    logs = [[line for line in log_lines(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]


def test_the_seed_decides_everything(model: Path, data: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(model, data, tmp_path / name, seed=seed, **FAST)
        weights.append(weights_of(tmp_path / name)["model.layers.0.mlp.gate.weight"])
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights(model: Path, data: Path, tmp_path: Path, flag: str) -> None:
    half = mixture().to(torch.float16)
    half.config.dtype = torch.float16
    half.save_pretrained(model)
    finetune(model, data, tmp_path / "out", **{flag: True, **FAST})
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.parametrize(("positions", "expected"), [(1024, 512), (64, 64)])
def test_blocks_are_as_long_as_the_model_can_take(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int, expected: int
) -> None:
    mixture(max_position_embeddings=positions).save_pretrained(model)
    seen = []

    def load(source: Any, tokenizer: Any, *, max_length: int) -> Any:
        seen.append(max_length)
        raise ValueError("far enough")

    monkeypatch.setattr(run_module, "load_text_dataset", load)
    with pytest.raises(ValueError, match="far enough"):
        finetune(model, data, tmp_path / "out")
    # Rotary positions have no end.
    with pytest.raises(ValueError, match="far enough"):
        finetune(model, data, tmp_path / "out", max_length=2048)
    assert seen == [expected, 2048]


# ------------------------------------------------------------------------------------------------ bad input


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def dense_instead(model: Path) -> None:
    dense_model("llama").save_pretrained(model)


def classifier_instead(model: Path) -> None:
    mixture(auto=STMoEForSequenceClassification, num_labels=3).save_pretrained(model)


def positions_of_gpt2(model: Path) -> None:
    mixture("gpt2").save_pretrained(model)


def half_precision(model: Path) -> None:
    half = mixture().half()
    half.config.dtype = torch.float16
    half.save_pretrained(model)


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("fault", "arguments", "message"),
    [
        (without_tokenizer, {}, r"model: .* must hold its tokenizer .* save one there with tokenizer\.save_pretrained"),
        (dense_instead, {}, "model: .* must be a mixture .* `st-moe upcycle`"),
        (classifier_instead, {}, "model: must be a language model, got STMoEForSequenceClassification"),
        (positions_of_gpt2, {"max_length": 65}, "max_length: must be at most max_position_embeddings=64, got 65"),
        (half_precision, {}, "model: trainable weights must be float32 or bfloat16, got float16"),
        (truncated, {}, "must be a whole safetensors file"),
        (None, {"max_length": 1}, "max_length must be a whole number >= 2"),
        (None, {"eval_fraction": 1.5}, "eval_fraction must be a number between 0 and 1"),
        (None, {"learning_rat": 1}, "learning_rat: is not a training argument .* did you mean 'learning_rate'"),
        (None, {"output_dir": "elsewhere"}, "output_dir: is not a training argument that can be set here"),
        (None, {"learning_rate": "fast"}, "learning_rate: must be a number, got 'fast'"),
        (None, {"learning_rate": float("nan")}, "learning_rate: must be at least 0, got nan"),
        (None, {"bf16": "yes"}, "bf16: must be True or False, got 'yes'"),
        (None, {"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be at least 1, got 0"),
        (None, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be at least 1, got 0"),
        (None, {"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs: must be positive without max_steps"),
        (None, {"lr_scheduler_type": "sideways"}, "sideways"),
        (None, {"report_to": "nowhere"}, "nowhere is not supported"),
        (None, {"resume": True}, "resume: .*out must hold a checkpoint-N folder to go on from"),
    ],
)
def test_faults_are_one_error_and_write_nothing(
    model: Path, data: Path, tmp_path: Path, fault: Any, arguments: dict[str, Any], message: str
) -> None:
    if fault is not None:
        fault(model)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        finetune(model, data, tmp_path / "out", **{**FAST, **arguments})
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "one"}\n{"text": \n', r"data\.jsonl, line 2: must be one JSON object per line"),
        ("", "must hold at least one text that is not empty, found none"),
        ('{"text": "a b"}\n', "dataset must have at least 2 rows to be split"),
    ],
)
def test_faulty_data_is_one_error_and_writes_nothing(
    model: Path, data: Path, tmp_path: Path, text: str, message: str
) -> None:
    data.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        finetune(model, data, tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_taken_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: must be a new or empty folder, but .*moe is not; pass resume"):
        finetune(model, data, model, **FAST)
    with pytest.raises(ValueError, match=r"output: must be a folder, but .*data\.jsonl is a file"):
        finetune(model, data, data, **FAST)
    (tmp_path / "empty").mkdir()
    finetune(model, data, tmp_path / "empty", **FAST)


def test_a_failure_of_the_host_leaves_no_empty_folder(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(self: Any, **kwargs: Any) -> None:
        assert (tmp_path / "out").is_dir()
        raise RuntimeError("no such optimizer")

    monkeypatch.setattr(run_module.STMoETrainer, "train", train)
    with pytest.raises(RuntimeError, match="no such optimizer"):
        finetune(model, data, tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_integrations_are_one_name_or_several(tmp_path: Path) -> None:
    for given, expected in (("tensorboard", ["tensorboard"]), (["tensorboard"], ["tensorboard"]), ((), [])):
        arguments = run_module._arguments(tmp_path / "out", given, True, {})
        assert isinstance(arguments, TrainingArguments)
        assert arguments.report_to == expected
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_taken_as_it_is(model: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(model)
    assert load_tokenizer(model).chat_template == "{{ messages }}"
    assert load_tokenizer(str(model))(TEXT) == tiny_tokenizer()(TEXT)
