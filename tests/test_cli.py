"""The command line as a newcomer meets it: every command in a terminal, and every mistake as one line."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, MambaConfig, MambaForCausalLM, TrainingArguments
from typer.testing import CliRunner

from st_moe import STMoEConfig, STMoEForCausalLM, cli
from st_moe.finetune import ROUTER_LOG
from st_moe.modeling.bundle import bundle_files
from tests.families import dense_model, mixture, tiny_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on"
QUICK = ("--max-length", "16", "--batch-size", "4", "--max-steps", "3", "--learning-rate", "0.01")
COMMANDS = ("upcycle", "finetune", "inspect", "report", "export", "import", "demo")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a terminal of 80 columns and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("NO_COLOR", "FORCE_COLOR", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints to copy from: a dense model with all that belongs to it, a mixture, a model without FFNs."""
    folder = tmp_path_factory.mktemp("stock")
    dense = dense_model("llama")
    dense.generation_config = GenerationConfig(do_sample=True, top_k=7, pad_token_id=0)
    dense.save_pretrained(folder / "dense")
    mixture().save_pretrained(folder / "moe")
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder / "mamba")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    for name in ("dense", "moe", "mamba"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def files(stock: Path, workplace: Path) -> Path:
    """The stock and some training data in the folder to stand in."""
    shutil.copytree(stock, workplace, dirs_exist_ok=True)
    write_data(workplace / "data.jsonl")
    return workplace


def write_data(path: Path, lines: int = 12) -> None:
    path.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(lines)), encoding="utf-8")


def terminal(*arguments: str, **environment: str) -> Result:
    """Run the installed command in a process of its own."""
    command = [str(Path(sys.executable).parent / "st-moe"), *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, **environment}
    )
    return Result(run.returncode, run.stdout, run.stderr)


@pytest.fixture
def st_moe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command's entry point in this process."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["st-moe", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def error_line(result: Result) -> str:
    """The one line of a mistake; what libraries draw to show their progress does not count."""
    assert result.code == 2, result
    lines = re.split(r"[\n\r]", result.err)
    lines = [line for line in lines if line.strip() and not re.search(r"examples/s\]|it/s\]|\?it", line)]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.err
    return lines[0].removeprefix("Error: ")


# ------------------------------------------------------------------------------------------------ in a terminal


@pytest.mark.slow
def test_the_whole_way_in_a_terminal(files: Path) -> None:
    upcycled = terminal("upcycle", "dense", "new", "--num-experts", "4", "--top-k", "2")
    assert upcycled.code == 0, upcycled.err
    assert "step 0: equal up to rounding; max relative logit difference" in upcycled.out
    assert upcycled.out.endswith("written: new\n")

    trained = terminal("finetune", "new", "--data", "data.jsonl", "--output", "out", *QUICK)
    assert trained.code == 0, trained.err
    assert re.search(r"train_loss \d+\.\d{4}, eval_loss \d+\.\d{4}; saved in out\n$", trained.out)
    assert "Warning" not in trained.err

    inspected = terminal("inspect", "out", "--layers")
    assert inspected.code == 0, inspected.err
    assert "llama mixture: 4 experts, 2 per token" in inspected.out
    assert max(map(len, inspected.out.splitlines())) <= 80
    assert inspected.err == ""

    reported = terminal("report", "out")
    assert reported.code == 0, reported.err
    assert "Router log up to step 3, sparse layers: 2, experts: 4" in reported.out
    assert (files / "out" / "losses.png").is_file()
    assert (files / "out" / "expert_load.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("upcycle", "dense", "new", "--set", "router_type=top_q"), "router_type: must be one of top_k"),
        (("upcycle", "nowhere", "new"), "source: nowhere is neither a folder"),
        (("finetune", "dense", "--data", "data.jsonl", "--output", "new"), "`st-moe upcycle`"),
        (("inspect", "dense"), "`st-moe upcycle`"),
    ],
)
def test_a_mistake_in_a_terminal(files: Path, arguments: tuple[str, ...], message: str) -> None:
    before = snapshot(files)
    result = terminal(*arguments)
    assert message in error_line(result)
    assert result.out == ""
    assert snapshot(files) == before


# ------------------------------------------------------------------------------------------------ what commands do


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    assert all(re.search(rf"^│ {name} ", shown.output, re.MULTILINE) for name in COMMANDS)
    assert {command.callback.__name__.rstrip("_") for command in cli.app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "-h"])
    assert shown.exit_code == 0
    assert f"Example: st-moe {command}" in shown.output
    callback = next(c.callback for c in cli.app.registered_commands if c.callback.__name__.rstrip("_") == command)
    for name in callback.__annotations__.keys() - {"return", "settings"}:
        assert name.replace("_", "-") in shown.output or name.upper() in shown.output, name


def test_upcycle(files: Path, st_moe: Callable[..., Result]) -> None:
    result = st_moe(
        *("upcycle", "dense", "new", "--num-experts", "6", "--top-k", "3", "--sparse-layers", "1", "--seed", "7"),
        *("--set", "router_jitter_noise=0.01", "--set", "second_expert_policy_train=random", "--router-std", "0.5"),
    )
    assert result.code == 0, result
    assert result.out.splitlines()[-1] == "written: new"
    config = STMoEConfig.from_pretrained("new")
    assert (config.num_experts, config.num_experts_per_tok, config.sparse_layers) == (6, 3, [1])
    assert (config.router_jitter_noise, config.second_expert_policy_train) == (0.01, "random")
    tokenizer = AutoTokenizer.from_pretrained("new")
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained("new").top_k == 7
    assert "step 0: equal up to rounding" in (files / "new" / "README.md").read_text(encoding="utf-8")
    assert load_file("new/model.safetensors")["model.layers.1.mlp.gate.weight"].std() > 0.4


def test_upcycle_with_code(files: Path, st_moe: Callable[..., Result]) -> None:
    for name, options in {"plain": (), "coded": ("--bundle-code",)}.items():
        assert st_moe("upcycle", "dense", name, "--num-experts", "4", "--no-verify", *options).code == 0
    names = {name: {path.name for path in (files / name).iterdir()} for name in ("plain", "coded")}
    assert names["coded"] - names["plain"] == bundle_files().keys()
    assert names["plain"] <= names["coded"]
    configs = {name: json.loads((files / name / "config.json").read_text(encoding="utf-8")) for name in names}
    entries = configs["coded"].pop("auto_map")
    assert configs["coded"] == configs["plain"]
    assert entries["AutoModelForCausalLM"] == "st_moe_modeling.STMoEForCausalLM"


@pytest.mark.parametrize(("text", "expected"), [("every:2", [1]), ("last:1", [1]), ("0, 1", [0, 1]), ("0", [0])])
def test_sparse_layers_in_every_form(
    files: Path, st_moe: Callable[..., Result], text: str, expected: list[int]
) -> None:
    assert st_moe("upcycle", "dense", "new", "--sparse-layers", text).code == 0
    assert STMoEConfig.from_pretrained("new").sparse_layer_indices == expected


def test_recipes_and_their_options(files: Path, st_moe: Callable[..., Result]) -> None:
    result = st_moe("upcycle", "dense", "new", "--recipe", "drop", "--recipe-option", "ratio=0.25")
    assert result.code == 0
    assert "NOT equal" in result.out
    assert "`drop`, seed 0" in (files / "new" / "README.md").read_text(encoding="utf-8")


def test_overwrite(files: Path, st_moe: Callable[..., Result]) -> None:
    assert st_moe("upcycle", "dense", "new", "--num-experts", "4").code == 0
    assert st_moe("upcycle", "dense", "new", "--num-experts", "6", "--overwrite").code == 0
    assert STMoEConfig.from_pretrained("new").num_experts == 6


def test_long_paths_are_not_broken(files: Path, st_moe: Callable[..., Result]) -> None:
    target = "a-rather-long-name/" * 8 + "new"
    assert st_moe("upcycle", "dense", target).out.endswith(f"written: {target}\n")


def test_brackets_are_not_markup(files: Path, st_moe: Callable[..., Result]) -> None:
    assert st_moe("upcycle", "dense", "new[red]").out.endswith("written: new[red]\n")
    assert "no[/red]where does not exist" in error_line(st_moe("upcycle", "./no[/red]where", "other"))


def test_finetune_and_resume(files: Path, st_moe: Callable[..., Result]) -> None:
    common = ("finetune", "moe", "--data", "data.jsonl", "--output", "out", "--max-length", "16", "--batch-size", "2")
    common = (*common, "--accumulate", "2", "--checkpointing", "--learning-rate", "0.01", "--set", "save_steps=2")
    first = st_moe(*common, "--max-steps", "2")
    assert first.code == 0, first
    taken = error_line(st_moe(*common, "--max-steps", "4"))
    assert taken == "output: must be a new or empty folder, but out is not; pass resume to go on from it"
    second = st_moe(*common, "--max-steps", "4", "--resume")
    assert second.code == 0, second
    assert "saved in out" in second.out
    lines = [json.loads(line) for line in (files / "out" / ROUTER_LOG).read_text(encoding="utf-8").splitlines()]
    # A line at the first step, so that even a short run can be reported.
    assert [line["step"] for line in lines if "loss" in line] == [1]
    arguments = torch.load("out/training_args.bin", weights_only=False)
    assert (arguments.gradient_accumulation_steps, arguments.seed, arguments.save_steps) == (2, 42, 2)
    assert getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing)
    before, after = (STMoEForCausalLM.from_pretrained(name).state_dict() for name in ("moe", "out"))
    assert not after["model.layers.0.mlp.gate.weight"].equal(before["model.layers.0.mlp.gate.weight"])


def test_finetune_on_a_folder_of_text(files: Path, st_moe: Callable[..., Result]) -> None:
    (files / "texts").mkdir()
    for number in range(6):
        (files / "texts" / f"{number}.md").write_text(TEXT * 2, encoding="utf-8")
    result = st_moe("finetune", "moe", "--data", "texts", "--output", "out", *QUICK, "--eval-fraction", "0", "--bf16")
    assert result.code == 0, result
    assert re.search(r"train_loss \d+\.\d{4}; saved in out\n$", result.out)


def test_inspect_reads_no_weights(files: Path, st_moe: Callable[..., Result]) -> None:
    whole = st_moe("inspect", "moe")
    (files / "moe" / "model.safetensors").unlink()
    alone = st_moe("inspect", "moe")
    assert whole.code == alone.code == 0
    assert whole.out == alone.out
    total = STMoEConfig.from_pretrained("moe").num_parameters()
    assert re.search(rf"│ parameters +│ +{total / 1e3:.1f} │ thousand ", whole.out)
    assert "per layer" not in whole.out
    layered = st_moe("inspect", "moe", "--layers").out
    assert re.search(r"│ layer 1 +│ sparse ", layered)


def test_report_of_a_running_training(files: Path, st_moe: Callable[..., Result]) -> None:
    log = {
        "step": 5,
        "loss": 2.5,
        "lm_loss": 2.25,
        "balance_loss": 1.5,
        "router_z_loss": 3.0,
        "router/entropy": 0.5,
        "router/max_load": 1.75,
        "router/dead_experts": 0.0,
        "layers": [0],
        "expert_load": [[0.25, 0.75]],
    }
    (files / "out").mkdir()
    (files / "out" / ROUTER_LOG).write_text(json.dumps(log) + '\n{"step": 6, "lo', encoding="utf-8")
    result = st_moe("report", "out", "--destination", "pictures")
    assert result.code == 0, result
    assert re.search(r"lm_loss +│ +5 │ +2.25 │", result.out)
    assert "drawn: pictures/losses.png" in result.out
    assert sorted(path.name for path in (files / "pictures").iterdir()) == ["expert_load.png", "losses.png"]


def test_demo_is_handed_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import st_moe.demo

    calls: list[Any] = []
    monkeypatch.setattr(st_moe.demo, "run_demo", lambda *args, **kwargs: calls.append((args, kwargs)))
    runner = CliRunner()
    assert runner.invoke(cli.app, ["demo", "--fast", "--seed", "3", "--output", "there"]).exit_code == 0
    assert runner.invoke(cli.app, ["demo"]).exit_code == 0
    assert calls == [
        ((Path("there"),), {"fast": True, "seed": 3}),
        ((Path("st-moe-demo"),), {"fast": False, "seed": 0}),
    ]


# ------------------------------------------------------------------------------------------------ mistakes


def nothing(files: Path) -> None:
    """The mistake lies in the arguments alone."""


def without(name: str) -> Callable[[Path], None]:
    def spoil(files: Path) -> None:
        for path in files.glob(name):
            path.unlink()

    return spoil


def truncate(name: str) -> Callable[[Path], None]:
    def spoil(files: Path) -> None:
        weights = files / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    return spoil


def pickled(files: Path) -> None:
    torch.save(load_file(files / "dense" / "model.safetensors"), files / "dense" / "pytorch_model.bin")
    (files / "dense" / "model.safetensors").unlink()


def broken_line(files: Path) -> None:
    (files / "data.jsonl").write_text('{"text": "one"}\n\n{"text": "two}\n', encoding="utf-8")


def half_precision(files: Path) -> None:
    model = mixture().half()
    model.config.dtype = torch.float16
    model.save_pretrained(files / "moe")


def no_entries(files: Path) -> None:
    (files / "out").mkdir()
    (files / "out" / ROUTER_LOG).touch()


UPCYCLE = ("upcycle", "dense", "new")
FINETUNE = ("finetune", "moe", "--data", "data.jsonl", "--output", "new", *QUICK)

MISTAKES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "unknown router": (
        nothing,
        (*UPCYCLE, "--set", "router_type=top_q"),
        r"router_type: must be one of top_k.* \(did you mean 'top_k'\?\), got 'top_q'",
    ),
    "more choices than experts": (
        nothing,
        (*UPCYCLE, "--num-experts", "2", "--top-k", "3"),
        "num_experts_per_tok: must be between 1 and num_experts=2, got 3",
    ),
    "layer out of range": (nothing, (*UPCYCLE, "--sparse-layers", "1,7"), r"sparse_layers: .* 2 layers, got \[1, 7\]"),
    "layers misspelt": (nothing, (*UPCYCLE, "--sparse-layers", "evry:2"), "sparse_layers: .* got 'evry:2'"),
    "several faults": (
        nothing,
        (*UPCYCLE, "--num-experts", "0", "--set", "min_capacity=0"),
        "num_experts: must be at least 1, got 0 .*min_capacity: must be at least 1, got 0",
    ),
    "no FFNs": (
        nothing,
        ("upcycle", "mamba", "new"),
        "dense_model_type: no mixture can be made from 'mamba': .* hold no FFN",
    ),
    "no config": (without("dense/config.json"), UPCYCLE, "source: must hold config.json, but dense does not"),
    "truncated weights": (truncate("dense"), UPCYCLE, r"source: dense/model\.safetensors must be a whole safetensors"),
    "pickles": (
        pickled,
        UPCYCLE,
        r"source: weights must be safetensors, but dense holds pickles \(pytorch_model.bin\)",
    ),
    "destination exists": (nothing, ("upcycle", "dense", "moe"), "destination: must not exist, but .*moe does"),
    "destination in source": (
        nothing,
        ("upcycle", "dense", "dense/new"),
        "destination: must lie outside of the source",
    ),
    "destination is source": (
        nothing,
        ("upcycle", "dense", "dense", "--overwrite"),
        "destination: must lie outside of the source",
    ),
    "destination holds source": (
        nothing,
        ("upcycle", "dense", ".", "--overwrite"),
        "destination: must not hold the source",
    ),
    "unknown recipe": (
        nothing,
        (*UPCYCLE, "--recipe", "clone"),
        "recipe: must be one of copy, noise, drop, split, granular, shared, merge, got 'clone'",
    ),
    "unknown recipe option": (
        nothing,
        (*UPCYCLE, "--recipe", "drop", "--recipe-option", "rate=0.5"),
        "recipe_options: 'drop' takes ratio, shared_set, got rate",
    ),
    "recipe option without value": (
        nothing,
        (*UPCYCLE, "--recipe", "drop", "--recipe-option", "ratio"),
        "--recipe-option: must be NAME=VALUE, got 'ratio'",
    ),
    "recipe option of the wrong type": (
        nothing,
        (*UPCYCLE, "--recipe", "drop", "--recipe-option", "ratio=half"),
        "recipe_options: .*'half'",
    ),
    "misspelt field": (nothing, (*UPCYCLE, "--set", "num_expert=4"), "num_expert: .* did you mean 'num_experts'"),
    "field with an option": (
        nothing,
        (*UPCYCLE, "--set", "num_experts=4", "--set", "source=x"),
        "--set: num_experts, source has an option of its own",
    ),
    "already a mixture": (nothing, ("upcycle", "moe", "new"), "source: must be a dense model, but .*moe already is"),
    "path that does not exist": (nothing, ("upcycle", "./nowhere", "new"), r"source: .*\./nowhere does not exist"),
    "Hub name while offline": (nothing, ("upcycle", "org/name", "new"), "source: org/name is neither a folder"),
    "file as a model": (nothing, ("upcycle", "data.jsonl", "new"), "source: .* but data.jsonl is a file"),
    "finetune a dense model": (
        nothing,
        ("finetune", "dense", *FINETUNE[2:]),
        "model: dense must be a mixture .*got model_type 'llama'; make one of it with `st-moe upcycle`",
    ),
    "finetune nothing": (nothing, ("finetune", "nowhere", *FINETUNE[2:]), "source: nowhere is neither a folder"),
    "finetune truncated weights": (truncate("moe"), FINETUNE, "must be a whole safetensors file"),
    "no tokenizer": (without("moe/tokenizer*"), FINETUNE, "model: moe must hold its tokenizer"),
    "broken line": (broken_line, FINETUNE, "data.jsonl, line 3: must be one JSON object per line"),
    "empty data": (
        lambda files: (files / "data.jsonl").write_text(""),
        FINETUNE,
        "data.jsonl: must hold at least one text",
    ),
    "no data": (without("data.jsonl"), FINETUNE, "source 'data.jsonl' does not exist"),
    "Hub data while offline": (
        nothing,
        ("finetune", "moe", "--data", "org/name", "--output", "new"),
        "source 'org/name' is neither a file or folder here nor a data set that the Hub gives",
    ),
    "float16 without scaler": (
        half_precision,
        FINETUNE,
        "model: trainable weights must be float32 or bfloat16, got float16 .* set fp16=True, or use bfloat16",
    ),
    "output exists": (nothing, (*FINETUNE, "--output", "moe"), "output: must be a new or empty folder, but moe is not"),
    "output is a file": (nothing, (*FINETUNE, "--output", "data.jsonl"), "output: must be a folder, but data.jsonl is"),
    "nothing to resume": (nothing, (*FINETUNE, "--resume"), "resume: new must hold a checkpoint-N folder"),
    "unknown training argument": (
        nothing,
        (*FINETUNE, "--set", "warmup=3"),
        "warmup: is not a training argument .* did you mean 'warmup_",
    ),
    "training argument of the wrong type": (
        nothing,
        (*FINETUNE, "--set", "weight_decay=much"),
        "weight_decay: must be a number, got 'much'",
    ),
    "training argument with an option": (
        nothing,
        (*FINETUNE, "--set", "max_length=3"),
        "--set: max_length has an option of its own",
    ),
    "empty batches": (
        nothing,
        (*FINETUNE, "--batch-size", "0"),
        "per_device_train_batch_size: must be at least 1, got 0",
    ),
    "blocks too short": (nothing, (*FINETUNE, "--max-length", "1"), "max_length must be a whole number >= 2"),
    "everything held out": (
        nothing,
        (*FINETUNE, "--eval-fraction", "1"),
        "eval_fraction must be a number between 0 and 1",
    ),
    "inspect a dense model": (nothing, ("inspect", "dense"), "model: dense must be a mixture .*`st-moe upcycle`"),
    "inspect nothing": (nothing, ("inspect", "nowhere"), "source: nowhere is neither a folder"),
    "inspect without config": (
        without("moe/config.json"),
        ("inspect", "moe"),
        "source: must hold config.json, but moe",
    ),
    "inspect truncated weights": (truncate("moe"), ("inspect", "moe"), "must be a whole safetensors file"),
    "inspect a file": (nothing, ("inspect", "data.jsonl"), "source: .* but data.jsonl is a file"),
    "report without log": (nothing, ("report", "moe"), r"moe/router_log\.jsonl: no such file"),
    "report nothing": (nothing, ("report", "nowhere"), r"nowhere/router_log\.jsonl: no such file"),
    "report before the first entry": (no_entries, ("report", "out"), "holds no training or evaluation entry yet"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(files: Path, st_moe: Callable[..., Result], mistake: str) -> None:
    spoil, arguments, message = MISTAKES[mistake]
    spoil(files)
    before = snapshot(files)
    result = st_moe(*arguments)
    assert re.search(message, error_line(result)), result.err
    assert result.out == ""
    assert snapshot(files) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("upcycle", "dense", "new", "--bogus"), "No such option.*--bogus"),
        (("upcycle", "dense"), "Missing argument"),
        (("upcycle", "dense", "new", "--num-experts", "many"), "Invalid value for '--num-experts'"),
        (("finetune", "moe"), "Missing option"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_mistakes_of_usage(
    files: Path, arguments: tuple[str, ...], message: str, st_moe: Callable[..., Result]
) -> None:
    before = snapshot(files)
    result = st_moe(*arguments)
    assert result.code == 2
    assert re.search(message, result.err)
    assert result.out == ""
    assert CliRunner().invoke(cli.app, list(arguments)).exit_code == 2
    assert snapshot(files) == before


def test_a_full_disk_is_one_line(files: Path, st_moe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("st_moe.conversion.writing.write_all", disk_full)
        assert "is full; make room and run the same command again" in error_line(st_moe(*UPCYCLE))
    # What is whole stays for the next run, and nothing is called done.
    left = {path.name for path in files.iterdir()}
    assert "new" not in left
    assert "new.partial" in left
    assert st_moe(*UPCYCLE).code == 0
    assert "new.partial" not in {path.name for path in files.iterdir()}


def test_defects_of_the_program_keep_their_traceback(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("st_moe.finetune.report.summary_table", broken)
    monkeypatch.setattr("st_moe.finetune.report.draw_report", broken)
    monkeypatch.setattr(sys, "argv", ["st-moe", "report", "out"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


def test_messages_of_several_lines_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli._fail("one\n- two [bold]three[/]\n\n  four " + "x" * 200)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "Error: one - two [bold]three[/] four " + "x" * 200 + "\n"


@pytest.mark.parametrize(
    ("word", "value"),
    [("a=1", 1), ("a=0.5", 0.5), ("a=None", None), ("a=True", True), ("a=[1, 2]", [1, 2]), ("a=top_k", "top_k")],
)
def test_values_are_literals_or_text(word: str, value: Any) -> None:
    assert cli._pairs("--set", [word]) == {"a": value}
    assert cli._pairs("--set", None) == {}


@pytest.mark.parametrize("word", ["a", "=1", ""])
def test_words_that_are_no_pair_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=f"--set: must be NAME=VALUE, got '{word}'"):
        cli._pairs("--set", [word])


def test_checkpointing_is_asked_for_by_its_present_name() -> None:
    name = cli._checkpointing_field()
    assert name in TrainingArguments.__dataclass_fields__
    others = {"activation_checkpointing", "gradient_checkpointing"} - {name}
    assert name == "activation_checkpointing" or not others & TrainingArguments.__dataclass_fields__.keys()
