"""Hostile checkpoints: each fault is one line that names it, exit code 2, and nothing is written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from st_moe import cli
from st_moe.conversion import check_checkpoint
from tests.families import dense_model

Fault = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in one file, and the same in many."""
    folder = tmp_path_factory.mktemp("stock")
    dense_model("llama").save_pretrained(folder / "single")
    dense_model("llama").save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


def header(change: Callable[[dict[str, Any]], Any], raw: bytes | None = None) -> Fault:
    """Rewrite the header of the only weight file, with its length; the data stays."""

    def fault(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        changed = change(found)
        text = raw if raw is not None else json.dumps(found if changed is None else changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return fault


def entry(**values: Any) -> Fault:
    """Change one tensor's entry."""
    return header(lambda found: found["model.norm.weight"].update(values))


def moved(by: int) -> Fault:
    """Shift where a tensor is said to lie."""

    def change(found: dict[str, Any]) -> None:
        tensor = found["model.norm.weight"]
        tensor["data_offsets"] = [offset + by for offset in tensor["data_offsets"]]

    return header(change)


def weights(data: Callable[[bytes], bytes]) -> Fault:
    def fault(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(data(path.read_bytes()))

    return fault


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Fault:
    """Write other tensors, in a file that is whole."""

    def fault(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return fault


def config(**fields: Any) -> Fault:
    def fault(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**found, **fields}), encoding="utf-8")

    return fault


def text(name: str, content: str | bytes) -> Fault:
    def fault(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return fault


def index(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Change the index of the sharded checkpoint."""

    def fault(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found), encoding="utf-8")

    return fault


def named(name: Any) -> Fault:
    """Have the index name another file."""
    return index(lambda listed: listed.update({"lm_head.weight": name}))


def replaced(name: str, make: Callable[[Path], Any]) -> Fault:
    """Put something else in a file's place."""

    def fault(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return fault


def linked_out(name: str) -> Fault:
    """Have a file of the checkpoint be a link to a file elsewhere."""

    def fault(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return fault


def twice(folder: Path) -> None:
    """One tensor in two shards."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    found = load_file(second)
    found.update({name: tensor.clone() for name, tensor in list(load_file(first).items())[:1]})
    save_file(found, second)


def deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000, encoding="utf-8")


WHOLE = r"source: .*model\.safetensors must be a whole safetensors file, but "
SINGLE: dict[str, tuple[Fault, str]] = {
    # The file of weights
    "cut in the data": (weights(lambda data: data[:-10]), WHOLE + "it is cut off"),
    "cut in the header": (weights(lambda data: data[:100]), WHOLE + "its header should be"),
    "cut in the length": (weights(lambda data: data[:5]), WHOLE + "its header should be"),
    "empty": (weights(lambda data: b""), WHOLE + "its header should be 0 bytes long and the file has 0"),
    "more than is said": (weights(lambda data: data + b"x"), WHOLE + "it goes on behind its last tensor"),
    "length of a terabyte": (weights(lambda data: b"\xff" * 6 + b"\0\0" + data[8:]), WHOLE + "its header should be"),
    "length of zero": (weights(lambda data: bytes(8) + data[8:]), WHOLE),
    "length too short": (weights(lambda data: (40).to_bytes(8, "little") + data[8:]), WHOLE),
    "no safetensors at all": (weights(lambda data: b"<html>" * 99), WHOLE + "its header should be"),
    "header is no text": (header(lambda found: None, b"\xff\xfe{}"), WHOLE + ".*codec can't decode"),
    "header is a list": (header(lambda found: []), WHOLE + "its header is no JSON object but a list"),
    "header is nested without end": (header(lambda found: None, b"[" * 100_000), WHOLE),
    "tensor named twice": (
        header(lambda found: None, b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}'),
        WHOLE + "'a' is there twice",
    ),
    "metadata is no text": (header(lambda found: found.update(__metadata__={"a": 1})), WHOLE + "its __metadata__"),
    "entry is a number": (header(lambda found: found.update(a=3)), WHOLE + "tensor 'a' has no dtype"),
    "entry lacks offsets": (header(lambda found: found["model.norm.weight"].pop("data_offsets")), ""),
    "dtype unknown": (entry(dtype="F31"), WHOLE + ".* has the unknown dtype 'F31'"),
    "dtype is a list": (entry(dtype=[]), WHOLE + ".* has the unknown dtype"),
    "dtype of another size": (entry(dtype="F64"), WHOLE + ".* does not fit its data_offsets"),
    "shape of another size": (entry(shape=[33]), WHOLE + ".* does not fit its data_offsets"),
    "shape is negative": (entry(shape=[-32]), WHOLE + r".* has the shape \[-32\], no list of sizes"),
    "shape is a text": (entry(shape="32"), WHOLE + ".* has the shape '32'"),
    "shape is true": (entry(shape=[True, 32]), WHOLE + ".* no list of sizes"),
    "shape is enormous": (entry(shape=[2**62, 2**62]), WHOLE + ".* does not fit its data_offsets"),
    "one offset": (entry(data_offsets=[0]), WHOLE + ".* does not fit its data_offsets"),
    "offsets backwards": (entry(data_offsets=[128, 0]), WHOLE + ".* does not fit its data_offsets"),
    "offsets out of range": (moved(10**9), WHOLE + ".* leaves a gap behind the tensor before it"),
    "offsets overlap": (moved(-4), WHOLE + ".* overlaps the tensor before it"),
    "file is a folder": (replaced("model.safetensors", Path.mkdir), "source: .* must be a file, but is none"),
    "file is a pipe": (replaced("model.safetensors", os.mkfifo), "source: .* must be a file, but is none"),
    "file is a link outside": (linked_out("model.safetensors"), "source: .* must lie in its own folder, but is a link"),
    "file is a link to nowhere": (
        replaced("model.safetensors", lambda path: path.symlink_to("nowhere")),
        "source: .*'model.safetensors'.* is missing",
    ),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "source: must hold model.safetensors"),
    "only a pickle": (
        replaced("model.safetensors", lambda path: path.with_name("pytorch_model.bin").write_bytes(b"x")),
        r"source: weights must be safetensors, .* convert them with: python -c .*save_pretrained\('converted'\)",
    ),
    # The tensors
    "tensor missing": (tensors(lambda t: t.pop("model.norm.weight")), "source: .*; missing keys: model.norm.weight"),
    "tensor too many": (tensors(lambda t: t.update(extra=torch.ones(2))), "source: .*; unexpected keys: extra"),
    "tensor of another shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        r"source: 'model\.norm\.weight' of .* must have the shape that config\.json asks for, \[32\], got \[31\]",
    ),
    "quantised tensor": (
        tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)})),
        "source: must not be quantised, but 'lm_head.weight' in .* is stored as I8",
    ),
    "float8 tensor": (
        tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        "source: must not be quantised, .* is stored as F8_E4M3",
    ),
    # The config
    "config missing": (lambda folder: (folder / "config.json").unlink(), "source: must hold config.json"),
    "config empty": (text("config.json", ""), r"source: .*config\.json must be JSON"),
    "config cut off": (text("config.json", '{"model_type": "lla'), r"source: .*config\.json must be JSON"),
    "config binary": (text("config.json", b"\xff\x00"), r"source: .*config\.json must be JSON"),
    "config a list": (text("config.json", "[]"), r"source: .*config\.json must be a JSON object, got list"),
    "config nested without end": (deep, r"source: .*config\.json must be JSON"),
    "config says it twice": (
        text("config.json", '{"a": 1, "a": 2}'),
        r"source: .*must be JSON, but 'a' is there twice",
    ),
    "config a folder": (replaced("config.json", Path.mkdir), r"source: .*config\.json must be a file"),
    "config a link outside": (linked_out("config.json"), r"source: .*config\.json must lie in its own folder"),
    "family unknown": (config(model_type="lama"), "source: model_type in .* did you mean 'llama'"),
    "family a number": (config(model_type=7), "source: model_type in .* got 7"),
    "quantised by the config": (config(quantization_config={"quant_method": "gptq"}), "source: must not be quantised"),
    "more layers than tensors": (config(num_hidden_layers=10**9), "source: num_hidden_layers in .* only 21 tensors"),
    "fewer layers": (config(num_hidden_layers=1), "source: .*; unexpected keys: model.layers.1"),
    "one layer more": (config(num_hidden_layers=3), "source: .*; missing keys: model.layers.2"),
    "no layers": (config(num_hidden_layers=0), ""),
    "layers negative": (config(num_hidden_layers=-1), ""),
    "wider than the weights": (config(hidden_size=64), "source: .* must have the shape that config.json asks for"),
    "width a text": (config(hidden_size="wide"), "source: .*hidden_size"),
    "width enormous": (config(intermediate_size=2**70), "source: "),
    "width negative": (config(intermediate_size=-48), "source: "),
    "heads that do not divide": (config(num_attention_heads=0), "source: "),
    "activation unknown": (config(hidden_act="nosuch"), "source: .*nosuch"),
    "dtype of the config unknown": (config(dtype="float31"), "source: "),
}
SHARDED: dict[str, tuple[Fault, str]] = {
    "index names a missing file": (
        named("gone.safetensors"),
        r"source: .* names 'gone\.safetensors', which is missing",
    ),
    "index names a parent": (named("../x.safetensors"), "source: .* of its own folder, got '../x.safetensors'"),
    "index names an absolute path": (named("/etc/x.safetensors"), "source: .* of its own folder, got '/etc"),
    "index names a Windows path": (named("..\\x.safetensors"), "source: .* of its own folder"),
    "index names a folder": (named(".."), r"source: .* of its own folder, got '\.\.'"),
    "index names a pickle": (named("pytorch_model.bin"), "source: .* must name safetensors files"),
    "index names a number": (named(3), "source: .* of its own folder, got 3"),
    "index names nothing": (index(lambda listed: listed.clear()), "source: .* got an empty weight_map"),
    "index lists what is not there": (
        index(lambda listed: listed.update(ghost=listed["lm_head.weight"])),
        "source: .* holds 'ghost', which it does not",
    ),
    "index lists it elsewhere": (
        index(lambda listed: listed.update({"lm_head.weight": listed["model.norm.weight"]})),
        "source: .* holds 'lm_head.weight', which it does not",
    ),
    "index says it twice": (text(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), "source: .* 'a' is there twice"),
    "index without map": (text(INDEX, "{}"), "source: .* with a weight_map"),
    "index a list": (text(INDEX, "[1]"), "source: .* with a weight_map"),
    "index binary": (text(INDEX, b"\x80\x04"), "source: .* must be JSON"),
    "index a folder": (replaced(INDEX, Path.mkdir), "source: .* must be a file"),
    "index a link outside": (linked_out(INDEX), "source: .* must lie in its own folder"),
    "tensor in two shards": (twice, "source: a tensor must be stored once, but .* both hold"),
    "shard cut off": (
        lambda folder: os.truncate(sorted(folder.glob("*.safetensors"))[1], 1000),
        "source: .* must be a whole safetensors file",
    ),
    "shard missing": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        "source: .* which is missing from",
    ),
}
CASES = [("single", name) for name in SINGLE] + [("sharded", name) for name in SHARDED]


def one_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends, and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["st-moe", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("Error: ")


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 80


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[name for _, name in CASES])
def test_a_fault_is_one_line_and_nothing_is_written(
    kind: str,
    name: str,
    stock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault, message = (SINGLE if kind == "single" else SHARDED)[name]
    dense = tmp_path / "dense"
    shutil.copytree(stock / kind, dense)
    fault(dense)
    before = sorted(path.name for path in tmp_path.iterdir())
    line = one_error(["upcycle", str(dense), str(tmp_path / "moe"), "--num-experts", "2"], monkeypatch, capsys)
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_the_stock_itself_is_sound(kind: str, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without a fault there is no error."""
    check_checkpoint(stock / kind)
    arguments = ["upcycle", str(stock / kind), str(tmp_path / "moe"), "--num-experts", "2", "--no-verify"]
    monkeypatch.setattr(sys, "argv", ["st-moe", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (tmp_path / "moe" / "config.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_may_not_be_read(
    name: str, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stock / "single", tmp_path / "dense")
    (tmp_path / "dense" / name).chmod(0)
    line = one_error(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe")], monkeypatch, capsys)
    assert "must be" in line
    assert "Permission denied" in line


def test_a_refused_read_is_one_line(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for root, to whom no file is closed."""
    shutil.copytree(stock / "single", tmp_path / "dense")
    real = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    line = one_error(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe")], monkeypatch, capsys)
    assert "model.safetensors must be readable, but Permission denied" in line
