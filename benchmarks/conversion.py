"""Memory and throughput of upcycling on disk: `python -m benchmarks.conversion`.

A dense Llama checkpoint of random bfloat16 weights is made on the spot and upcycled in a fresh process, as the command
`st-moe upcycle` does it, once to half as many layers.

Memory is the kernel's mark of that process's largest resident set ("main") and of the largest among the processes that
plan, write and prove ("steps"). The bar for either is 300 MB plus one layer's experts. Pages that two processes share
count once in "all", the sum of their proportional set sizes, read ten times a second.

Throughput is output bytes over wall time of the whole call, imports of the plan included, which ends with everything on
the disk (fsync), beside `cp` of the same bytes to the same disk. Conversion and `cp` take turns, and the medians are
compared. `cp` is done when the system has the bytes in memory; how long it takes until the disk has them too is in
another column. Linux keeps up to a fifth of the memory for bytes that the disk does not have yet (vm.dirty_ratio), so
`cp` of less never waits for a disk; `--gigabytes` asks for more.

With `--mergekit-moe PATH` a third table has the whole processes `st-moe upcycle` and `mergekit-moe` on the same input.
A small conversion goes before everything, so that no row reads the libraries from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

MEGABYTE = 10**6
ALLOWED = 300 * MEGABYTE
VOCABULARY = 32_000


# Runs a command from a small process, whose memory is the least that the kernel ascribes to its children.
_RUN = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([seconds, peak]))
"""


def make_dense(folder: Path, hidden: int, width: int, layers: int) -> None:
    """Write a dense checkpoint, tensor by tensor, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from st_moe.conversion.tensor_files import bytes_of, header_of

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    header, order = header_of({name: ("BF16", shape) for name, shape in shapes.items()})
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for name in order:
            mean = 1.0 if "norm" in name else 0.0
            drawn = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(mean, 0.02, generator=generator)
            file.write(bytes_of(drawn))
        os.fsync(file.fileno())


def child(folder: str, target: str, options: dict[str, Any]) -> None:
    """Convert, and print seconds, bytes, and the peaks of this process and of the largest that it started."""
    from st_moe.conversion.folder import upcycle_checkpoint

    source: Any = [folder, folder] if options["recipe"] == "merge" else folder
    start = time.perf_counter()
    upcycle_checkpoint(source, target, **options)
    seconds = time.perf_counter() - start
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in Path(target).iterdir())
    print(json.dumps({"seconds": seconds, "peak": peak, "started": started, "bytes": size}))


def convert(source: Path, target: Path, options: dict[str, Any], threads: int) -> dict[str, float]:
    """Run `child` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.conversion", "--child", str(source), str(target), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    together = 0
    with TemporaryFile("w+") as output:
        with subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output) as run:
            while run.poll() is None:
                together = max(together, proportional_of(run.pid))
                time.sleep(0.1)
        output.seek(0)
        lines = output.read().splitlines()
    if run.returncode:
        raise SystemExit("\n".join(lines))
    return json.loads(lines[-1]) | {"together": together}


def proportional_of(session: int) -> int:
    """Bytes of memory of all processes of a session; of pages that several share, each has its part."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                rollup = (process / "smaps_rollup").read_text(encoding="ascii")
                total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        except (OSError, ValueError):  # gone in the meantime
            continue
    return total


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds that `cp` takes, without and with the time until everything is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - start
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return copied, time.perf_counter() - start


class Row(NamedTuple):
    """What is converted."""

    layers: int
    recipe: str
    verify: bool

    @property
    def name(self) -> str:
        """As in the tables."""
        return self.recipe + (", with proof" if self.verify else "")


def measure(place: Path, row: Row, options: argparse.Namespace, turns: int) -> list[dict[str, float]]:
    """Convert and copy the result, in turns."""
    source, target, copied = place / f"dense{row.layers}", place / "moe", place / "copy"
    if not source.exists():
        make_dense(source, options.hidden, options.width, row.layers)
    wanted = {
        "recipe": row.recipe,
        "num_experts": options.experts,
        "verify": row.verify,
        "max_shard_size": options.max_shard_size,
    }
    found = []
    for _ in range(turns):
        os.sync()
        converted = convert(source, target, wanted, options.threads)
        os.sync()
        plain, synced = copy(target, copied)
        for folder in (target, copied):
            shutil.rmtree(folder)
        found.append(converted | {"cp": plain, "cp + fsync": synced})
    return found


def memory_row(row: Row, found: list[dict[str, float]], bar: int) -> list[str]:
    """A row of the first table."""
    sizes = [max(each[what] for each in found) for what in ("peak", "started", "together")]
    over = max(sizes[:2]) - bar
    return [
        f"{row.layers}",
        row.name,
        f"{found[0]['bytes'] / 1e9:.2f}",
        *(f"{size / MEGABYTE:.0f}" for size in (*sizes, bar)),
        "met" if over <= 0 else f"over by {over / MEGABYTE:.0f}",
    ]


def speed_row(row: Row, found: list[dict[str, float]]) -> list[str]:
    """A row of the second table."""
    size = found[0]["bytes"] / MEGABYTE
    seconds = {what: [each[what] for each in found] for what in ("seconds", "cp", "cp + fsync")}
    middle = {what: median(values) for what, values in seconds.items()}
    return [
        f"{row.layers}",
        row.name,
        f"{size / 1000:.2f}",
        *(f"{size / middle[what]:.0f} ({size / max(v):.0f} to {size / min(v):.0f})" for what, v in seconds.items()),
        *(f"{middle[what] / middle['seconds']:.2f}" for what in ("cp", "cp + fsync")),
    ]


def table_of(title: str, *columns: str) -> Table:
    """An empty table, numbers to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "recipe", "tool") else "right")
    return table


def whole_process(name: str, command: list[str], target: Path) -> list[str]:
    """One row of the second table: a command from start to end, with what it printed if it fails."""
    os.sync()
    run = subprocess.run([sys.executable, "-c", _RUN, *command], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{run.stdout}{run.stderr}")
    seconds, peak = json.loads(run.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    shutil.rmtree(target)
    return [name, f"{size / 1e9:.2f}", f"{seconds:.1f}", f"{peak / MEGABYTE:.0f}", f"{size / seconds / MEGABYTE:.0f}"]


def beside_mergekit(mergekit: Path, source: Path, place: Path, experts: int, max_shard_size: str) -> Table:
    """Both tools make a mixture with random routers of the same dense model."""
    recipe = {
        "base_model": str(source),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": [{"source_model": str(source), "positive_prompts": [""]}] * experts,
    }
    (place / "recipe.yml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    ours = [str(Path(sys.executable).with_name("st-moe")), "upcycle", str(source), str(place / "ours"), "--no-verify"]
    ours += ["--num-experts", str(experts), "--max-shard-size", max_shard_size]
    theirs = [
        str(mergekit),
        str(place / "recipe.yml"),
        str(place / "theirs"),
        "--out-shard-size",
        max_shard_size.replace("GB", "B"),
    ]
    theirs += ["--i-understand-this-is-not-useful-without-training"]
    table = table_of("Whole processes", "tool", "GB", "seconds", "peak MB", "MB/s")
    for _ in range(2):
        for name, command, target in (("st-moe upcycle", ours, "ours"), ("mergekit-moe", theirs, "theirs")):
            print(name, file=sys.stderr, flush=True)
            table.add_row(*whole_process(name, command, place / target))
    return table


def options_of_call() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="least size of the larger output")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--turns", type=int, default=3, help="of conversion and cp, for the larger output")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the conversion")
    parser.add_argument("--recipe", action="append", help="only these recipes")
    parser.add_argument("--folder", type=Path, help="where to work; the disk that is measured")
    parser.add_argument("--mergekit-moe", type=Path, help="the command to compare with, from an environment of its own")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print the tables."""
    options = options_of_call()
    if options.child:
        child(*options.child[:2], json.loads(options.child[2]))
        return
    per_layer = 2 * (4 * options.hidden**2 + 3 * options.hidden * options.width * options.experts)
    most = -(-int(options.gigabytes * 1e9 - 4 * VOCABULARY * options.hidden) // per_layer)
    most = max(2, most + most % 2)
    recipes = options.recipe or ("copy", "drop", "merge")
    rows = [Row(layers, recipe, False) for recipe in recipes for layers in (most // 2, most)]
    rows.append(Row(most, "copy", True))
    bar = ALLOWED + 2 * 3 * options.hidden * options.width * options.experts
    memory = table_of("Memory, MB (1 MB = 10^6 bytes)", "layers", "recipe", "GB", "main", "steps", "all", "bar", "")
    speed = table_of(
        f"Throughput, MB/s: median of {options.turns} (slowest to fastest)",
        *("layers", "recipe", "GB", "conversion", "cp", "cp + fsync", "/ cp", "/ (cp + fsync)"),
    )
    if options.folder is not None:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    others = []
    with TemporaryDirectory(dir=options.folder) as place:
        small = Path(place) / "small"
        make_dense(small, 64, 64, 1)
        convert(small, small.with_name("first"), {"recipe": "copy", "verify": True, "max_shard_size": "1GB"}, 1)
        for row in rows:
            print(f"{row.layers} layers, {row.name}", file=sys.stderr, flush=True)
            found = measure(Path(place), row, options, options.turns if row.layers == most else 1)
            memory.add_row(*memory_row(row, found, bar))
            if row.layers == most:
                speed.add_row(*speed_row(row, found))
        if options.mergekit_moe:
            source = Path(place) / f"dense{most}"
            others.append(
                beside_mergekit(options.mergekit_moe, source, Path(place), options.experts, options.max_shard_size)
            )
    Console(width=150).print(memory, speed, *others)
    sizes = f"hidden {options.hidden}, width {options.width}, {options.experts} experts, bfloat16"
    how = f"shards of {options.max_shard_size}; {options.threads} threads"
    print(f"{sizes}; {how}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
