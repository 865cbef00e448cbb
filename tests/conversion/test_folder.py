"""Upcycling on disk: the folder holds all that a model's folder should, and appears whole or not at all."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from st_moe import STMoEForCausalLM, STMoEForSequenceClassification, cli, upcycle
from st_moe.conversion import folder as folder_module
from st_moe.conversion import upcycle_checkpoint, writing
from st_moe.modeling.bundle import auto_map, bundle_files
from tests.families import FAMILIES, TOLERANCE, dense_model, relative_difference, tiny_tokenizer, token_ids

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense checkpoint with all that may lie beside it."""
    folder = tmp_path / "dense"
    model = dense_model("llama")
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, temperature=0.5, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("Do what you like.", encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(source: Any, target: Path, **fields: Any) -> Any:
    return upcycle_checkpoint(source, target, **{"num_experts": 4, **fields})


# ------------------------------------------------------------------------------------------------ what is written


def test_folder_holds_the_upcycled_model(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = convert(dense, tmp_path / "moe", seed=3, router_std=0.5, sparse_layers=[1])
    assert proof.holds
    assert str(proof) in capsys.readouterr().out
    expected = upcycle(dense, num_experts=4, seed=3, router_std=0.5, sparse_layers=[1], verify=False).state_dict()
    found = STMoEForCausalLM.from_pretrained(tmp_path / "moe").state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_folder_holds_what_travels_with_a_model(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer("the quick brown fox")["input_ids"] == tiny_tokenizer()("the quick brown fox")["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"
    generation = GenerationConfig.from_pretrained(tmp_path / "moe")
    assert (generation.do_sample, generation.top_k, generation.temperature) == (True, 7, 0.5)
    assert (tmp_path / "moe" / "LICENSE.txt").read_text(encoding="utf-8") == "Do what you like."


def test_code_travels_when_asked(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "plain")
    convert(tmp_path / "dense", tmp_path / "coded", bundle_code=True)
    plain, coded = contents(tmp_path / "plain"), contents(tmp_path / "coded")
    files = {name: text.encode() for name, text in bundle_files().items()}
    assert coded.keys() == plain.keys() | files.keys()
    assert {name: coded[name] for name in files} == files
    assert {name for name in plain if plain[name] != coded[name]} == {"config.json", "README.md"}
    assert json.loads(coded["config.json"]) == {**json.loads(plain["config.json"]), "auto_map": auto_map()}
    assert b"trust_remote_code=True" in coded["README.md"]
    assert b"trust_remote_code" not in plain["README.md"]
    assert coded["README.md"].startswith(plain["README.md"])


def test_code_that_cannot_travel_is_refused_before_any_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM.config_class, "__module__", "elsewhere.llama")
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_plan", lambda *args, **kwargs: pytest.fail("work was done"))
        with pytest.raises(ValueError, match=r"dense_model_type: must be .* got 'llama' from elsewhere\.llama"):
            convert(dense, tmp_path / "moe", bundle_code=True)
        # What is wrong besides is said by the plan.
        with pytest.raises(pytest.fail.Exception, match="work was done"):
            convert(dense, tmp_path / "moe", bundle_code=True, router_type="none")
    assert contents(tmp_path) == before
    assert convert(dense, tmp_path / "moe").holds


def test_code_of_a_run_that_was_stopped_is_not_kept_unasked(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_exchange", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(dense, tmp_path / "moe", bundle_code=True)
    assert (tmp_path / "moe.partial" / "model" / "st_moe_modeling.py").exists()
    convert(dense, tmp_path / "moe")
    convert(dense, tmp_path / "plain")
    assert contents(tmp_path / "moe") == contents(tmp_path / "plain")


def test_model_card(dense: Path, tmp_path: Path) -> None:
    proof = convert(dense, tmp_path / "moe", recipe="drop", recipe_options={"ratio": 0.25}, seed=5)
    card = (tmp_path / "moe" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    # A folder of this machine is nothing that the Hub could link to.
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "tags": ["st_moe", "mixture-of-experts", "upcycled"],
    }
    config = STMoEForCausalLM.from_pretrained(tmp_path / "moe").config
    total, active = config.num_parameters(), config.num_parameters(active=True)
    for text in ("upcycled from dense\n", "4, of which 2 per token", "2 of 2", "`drop`, seed 5", str(proof)):
        assert text in body
    assert f"{total:,}, of which {active:,} active" in body
    assert str(tmp_path) not in card


def test_model_card_of_a_hub_model_links_it(dense: Path) -> None:
    plan = folder_module.plan_checkpoint(dense)
    card = folder_module.model_card(["org/name"], plan, 0, None, {"a": 2, "b": 1})
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["org/name"]
    assert "not measured" in card
    assert "| NaN or infinite weights of the source | 3 values in 2 tensors: a, b |" in card


def test_a_fresh_process_loads_it_with_the_auto_class(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe")
    code = """
import sys, torch, st_moe
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert isinstance(model, st_moe.STMoEForCausalLM), type(model)
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
text = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))
assert text("the quick", max_new_tokens=3)[0]["generated_text"].startswith("the quick")
"""
    torch.save(token_ids(), tmp_path / "ids")
    command = [sys.executable, "-c", code, str(tmp_path / "moe"), str(tmp_path / "ids"), str(tmp_path / "logits")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense)(token_ids()).logits
    assert relative_difference(torch.load(tmp_path / "logits"), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_the_disk(family: str, tmp_path: Path) -> None:
    dense_model(family).save_pretrained(tmp_path / "dense")
    proof = convert(tmp_path / "dense", tmp_path / "moe", num_experts=2)
    assert proof.max_relative_difference < TOLERANCE
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(token_ids()).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(token_ids()).logits
    assert relative_difference(found, expected) < TOLERANCE


def test_classifiers_keep_their_head(tmp_path: Path) -> None:
    dense_model("llama", AutoModelForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe")
    assert isinstance(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe"), STMoEForSequenceClassification
    )


def test_shards_and_dtype(tmp_path: Path) -> None:
    dense_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    convert(tmp_path / "dense", tmp_path / "moe", max_shard_size="30KB")
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == torch.bfloat16


def test_without_a_tokenizer_there_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module.logger, "propagate", True)
    dense_model("llama").save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe")
    assert "No tokenizer in" in caplog.text
    assert not list((tmp_path / "moe").glob("tokenizer*"))


# ------------------------------------------------------------------------------------------------ bad input


def mamba(path: Path) -> Path:
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "top_q"}, "router_type: must be one of top_k.* got 'top_q'"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: must be between 1 and num_experts=2"),
        ({"sparse_layers": [0, 7]}, r"sparse_layers: .* 2 layers, got \[0, 7\]"),
        ({"moe_intermediate_size": 13}, "moe_intermediate_size: recipe 'copy' keeps the dense width"),
        ({"num_expert": 3}, "num_expert: is not a field of the mixture; did you mean 'num_experts'"),
        ({"hidden_size": 64}, "hidden_size: is not a field of the mixture"),
        ({"dense_model_type": "gpt2"}, "dense_model_type: is not a field of the mixture"),
        ({"recipe": "clone"}, "recipe: must be one of copy, noise, drop, .*got 'clone'"),
        ({"recipe_options": {"ratio": 0.5}}, "recipe_options: 'copy' takes no options, got ratio"),
        ({"recipe": "drop", "recipe_options": {"ratio": 1.5}}, r"recipe_options: ratio must be in \[0, 1\], got 1.5"),
        ({"recipe": "noise", "recipe_options": {"scale": "x"}}, "recipe_options: scale must be a real number, got 'x'"),
        ({"router_std": -1.0}, "router_std: must not be negative"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_weights_are_read(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    with pytest.raises(ValueError, match=message):
        convert(dense, tmp_path / "deep" / "moe", **fields)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_model_without_ffns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no mixture can be made from .mamba.: .*hold no FFN"):
        convert(mamba(tmp_path / "mamba"), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("missing", [True, False])
def test_without_a_model_type_nothing_is_written(
    dense: Path, tmp_path: Path, missing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = None
    if missing:
        del config["model_type"]
    (dense / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = f"source: model_type in {dense} must be one of Transformers', got None; write the family of the weights "
    message += "into config.json, such as 'llama'"
    for convert_it in (lambda: convert(dense, tmp_path / "moe"), lambda: upcycle(dense, num_experts=4)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            convert_it()
    monkeypatch.setattr(sys, "argv", ["st-moe", "upcycle", str(dense), str(tmp_path / "moe")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"Error: {message}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_weights_that_are_no_numbers_are_counted(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder_module.logger, "propagate", True)
    model = LlamaForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.lm_head.weight[3, :5] = float("nan")
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(dense)
    convert(dense, tmp_path / "moe")
    text = "6 values in 2 tensors: lm_head.weight, model.layers.1.mlp.up_proj.weight"
    assert f"weights are NaN or infinite: {text}" in caplog.text
    assert text in (tmp_path / "moe" / "README.md").read_text(encoding="utf-8")


def test_a_mixture_is_refused(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe")
    with pytest.raises(ValueError, match=r"source: must be a dense model, but .* already is a mixture"):
        convert(tmp_path / "moe", tmp_path / "again")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("dense", "destination: must lie outside of the source"),
        ("dense/moe", "destination: must lie outside of the source"),
        ("dense/../dense", "destination: must lie outside of the source"),
        ("link", "destination: must lie outside of the source"),
        (".", "destination: must not hold the source"),
    ],
)
def test_source_and_destination_lie_apart(
    dense: Path, tmp_path: Path, place: str, message: str, overwrite: bool
) -> None:
    (tmp_path / "link").symlink_to(dense)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(dense, tmp_path / place, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_only_checkpoints_are_overwritten(dense: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    before = contents(tmp_path)
    for target, overwrite, message in (
        (precious, False, "destination: must not exist, but .*precious does; choose another or pass overwrite"),
        (precious, True, "destination: only a checkpoint is overwritten, but .*precious holds no config.json"),
        (precious / "thesis.txt", True, "destination: must be a folder to be overwritten, but .* is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(dense, target, overwrite=overwrite)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    convert(dense, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "config.json").is_file()


# ------------------------------------------------------------------------------------------------ whole or not at all


def disk_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def half_written(model: Any, folder: Path, **kwargs: Any) -> None:
    (Path(folder) / "model-00001-of-00002.safetensors").write_bytes(b"half")
    raise KeyboardInterrupt


def interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[Any, str, Callable[..., Any], type[BaseException], str]] = {
    "weights": (writing, "write_all", disk_full, OSError, "destination: the disk of .* is full; make room"),
    "interrupt": (writing, "write_all", interrupted, KeyboardInterrupt, ""),
    "tokenizer": (folder_module, "_copy_companions", disk_full, OSError, "destination: the disk of .* is full"),
    "card": (folder_module, "model_card", disk_full, OSError, "destination: the disk of .* is full"),
    "too little room": (
        folder_module.shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=1000),
        OSError,
        "bytes are to be written, but the disk of .* has 1,000 free",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_failing_write_the_same_call_goes_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    place, name, replacement, error, message = FAILURES[failure]
    with monkeypatch.context() as patched:
        patched.setattr(place, name, replacement)
        with pytest.raises(error, match=message):
            convert(dense, tmp_path / "new" / "deep" / "moe")
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["moe.partial"]
    convert(dense, tmp_path / "new" / "deep" / "moe")
    convert(dense, tmp_path / "straight")
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["moe"]
    assert contents(tmp_path / "new" / "deep" / "moe") == contents(tmp_path / "straight")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_write_keeps_what_would_be_replaced(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    convert(dense, tmp_path / "moe", num_experts=2)
    before = contents(tmp_path / "moe")
    place, name, replacement, error, message = FAILURES[failure]
    monkeypatch.setattr(place, name, replacement)
    with pytest.raises(error, match=message):
        convert(dense, tmp_path / "moe", overwrite=True)
    assert contents(tmp_path / "moe") == before


def test_a_failing_exchange_puts_the_old_folder_back(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(dense, tmp_path / "moe", num_experts=2)
    before = contents(tmp_path / "moe")
    rename = Path.rename

    def refuse_fresh(path: Path, target: Path) -> Path:
        if path.name == "model":
            raise OSError("device is busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_fresh)
    with pytest.raises(OSError, match="device is busy"):
        convert(dense, tmp_path / "moe", overwrite=True)
    assert contents(tmp_path / "moe") == before


def test_overwrite_replaces_the_whole_folder(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe", num_experts=2, max_shard_size="20KB")
    (tmp_path / "moe" / "leftover.txt").write_text("old", encoding="utf-8")
    convert(dense, tmp_path / "moe", num_experts=4, overwrite=True)
    fresh = tmp_path / "fresh"
    convert(dense, fresh, num_experts=4)
    assert contents(tmp_path / "moe") == contents(fresh)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "fresh", "moe"]
    assert (tmp_path / "moe").stat().st_mode == fresh.stat().st_mode == dense.stat().st_mode


def test_the_old_folder_stands_until_the_new_one_is_complete(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(dense, tmp_path / "moe", num_experts=2)
    before = contents(tmp_path / "moe")
    card = folder_module.model_card

    def last_step(*args: Any) -> str:
        assert contents(tmp_path / "moe") == before
        return card(*args)

    monkeypatch.setattr(folder_module, "model_card", last_step)
    convert(dense, tmp_path / "moe", overwrite=True)
    assert contents(tmp_path / "moe") != before


def test_a_link_to_a_folder_is_written_through(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe", num_experts=2)
    (tmp_path / "link").symlink_to(tmp_path / "moe")
    convert(dense, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert STMoEForCausalLM.from_pretrained(tmp_path / "moe").config.num_experts == 4


def test_the_source_is_left_as_it_was(dense: Path, tmp_path: Path) -> None:
    before = contents(dense)
    convert(dense, tmp_path / "moe")
    shutil.rmtree(tmp_path / "moe")
    assert contents(dense) == before
