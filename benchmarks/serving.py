"""Does llama.cpp serve what export writes? `python -m benchmarks.serving --llama-cpp-python PYTHON --llama-cpp SOURCE`.

Every target of the export table gets a tiny random mixture of each of its dense families: 4 experts that differ, 2 per
token. It is exported, converted by llama.cpp's own `convert_hf_to_gguf.py`, and run by llama.cpp on the CPU, all in
float32; its logits and its greedy tokens are compared with the mixture's. PYTHON is an interpreter that has torch,
transformers and llama-cpp-python, SOURCE the source tree of the same llama.cpp. `--markdown FILE` writes the table into
FILE.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from benchmarks import llama_cpp_side
from benchmarks.measure import markdown_table, relative_difference, setting, write_table
from benchmarks.tiny_models import dense_model, favour_experts, perturb, sharpen
from st_moe import upcycle
from st_moe.conversion import export_native
from st_moe.conversion.native_targets import TARGETS, NativeTarget

#: Largest relative logit difference that rounding explains.
TOLERANCE = 1e-4
NEW_TOKENS = 8
TEXT = "The dog's 12 bones, and the fox"
COLUMNS = (
    "target",
    "dense family",
    "mixture",
    "tokenizer",
    "converts",
    "logits",
    "experts swapped",
    "greedy",
    "reason",
)

_NAME = "benchmarks.serving"
_ONE_SHARED, _FIRST_DENSE, _NOT_NORMALISED = "one shared expert", "first layer dense", "norm_topk_prob=False"
_TIED, _ALL_HEADS = "tied embeddings", "no grouped heads"
_WINDOW, _LLAMA_3 = "sliding window", "rope_type llama3"
_LOCAL_AND_GLOBAL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
#: Sizes that llama.cpp has kernels for; a family takes those that it has.
_SIZES: Mapping[str, int] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
#: What targets can hold of a family.
_OWN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "cohere2": _LOCAL_AND_GLOBAL,
    "granite_swa": _LOCAL_AND_GLOBAL,
    "ministral": _LOCAL_AND_GLOBAL,
    "mistral": {"sliding_window": None},
    "olmo3": {"layer_types": ["full_attention"] * 2},
    "phi3": {"sliding_window": None},
    "seed_oss": {"attention_out_bias": False},
    "youtu": {"num_key_value_heads": 4},
}
_SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
#: What kinds of mixtures change in their dense model.
_KINDS: Mapping[str, Mapping[str, Any]] = {
    _TIED: {"tie_word_embeddings": True},
    _ALL_HEADS: {"num_key_value_heads": _SIZES["num_attention_heads"]},
    _WINDOW: {"sliding_window": 6},
    _LLAMA_3: {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **_SCALED}},
}
#: Tokenizers that the converter reads from other files than `tokenizer.json`; these targets are given ids alone.
_OTHER_TOKENIZERS = ("ernie4_5_moe", "hunyuan_v1_moe")
#: What the converter must be told, for it expects extra prediction layers, which no mixture of ours has.
_OPTIONS: Mapping[str, list[str]] = {"qwen3_5_moe_text": ["--no-mtp"]}


class Case(NamedTuple):
    """One mixture: the target that it is exported to, its dense family, and what is special about it."""

    target: str
    family: str
    kind: str = ""


#: What single targets take that engines may not look at.
_MORE_CASES = (
    Case("mixtral", "mistral", _WINDOW),
    Case("mixtral", "llama", _LLAMA_3),
    Case("granitemoe", "llama", _LLAMA_3),
    Case("glm4_moe", "llama", _LLAMA_3),
    Case("qwen2_moe", "llama", _NOT_NORMALISED),
    Case("qwen2_moe", "ministral", _NOT_NORMALISED),
    Case("dots1", "qwen3", _ALL_HEADS),
)


class Row(NamedTuple):
    """What became of one mixture.

    Attributes:
        case: the mixture.
        tokenizer: how it was converted.
        converts: whether the converter wrote a file.
        difference: largest relative difference of llama.cpp's logits to the mixture's; None if it did not run.
        control: the same to those of a mixture with two experts swapped, which must be far larger.
        greedy: whether the tokens that follow are the same.
        reason: why there is no file, or why the engine does not run it.
    """

    case: Case
    tokenizer: str = ""
    converts: bool = False
    difference: float | None = None
    control: float | None = None
    greedy: bool | None = None
    reason: str = ""

    @property
    def equal(self) -> bool:
        """Whether llama.cpp computes the mixture's function, and the comparison would have seen if it did not."""
        close = self.difference is not None and self.difference <= TOLERANCE
        told_apart = self.control is not None and self.control > 100 * TOLERANCE
        return close and told_apart and self.greedy is True

    def cells(self) -> list[str]:
        """The columns as text."""
        numbers = ["" if value is None else f"{value:.1e}" for value in (self.difference, self.control)]
        greedy = {True: "equal", False: "DIFFERENT", None: ""}[self.greedy]
        return [*self.case, self.tokenizer, "yes" if self.converts else "no", *numbers, greedy, self.reason]


def cases(targets: Sequence[str]) -> Iterator[Case]:
    """Every pair of the export table, and what else the targets say that they hold, with their first family."""
    for row in TARGETS:
        families = [name for name in row.family_names if name in CONFIG_MAPPING]
        if row.name not in targets or row.name not in CONFIG_MAPPING or not families:
            continue
        yield from (Case(row.name, family) for family in families)
        if row.shared is not None:
            yield Case(row.name, families[0], _ONE_SHARED)
        if row.layers is not None:
            yield Case(row.name, families[0], _FIRST_DENSE)
        if "norm_topk_prob" in row.fields:
            yield Case(row.name, families[0], _NOT_NORMALISED)
        yield Case(row.name, families[0], _TIED)
        yield from (case for case in _MORE_CASES if case.target == row.name and case.family in families)


def mixture_of(case: Case) -> Any:
    """A mixture of experts that differ, told apart by sharp routers."""
    row = _row(case.target)
    known = CONFIG_MAPPING[case.family].__dataclass_fields__
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    own = {"tie_word_embeddings": False, **_OWN_FIELDS.get(case.family, {}), **_KINDS.get(case.kind, {})}
    dense = dense_model(case.family, **{**sizes, **own})
    fields: dict[str, Any] = {"router_type": row.router_type, "norm_topk_prob": case.kind != _NOT_NORMALISED}
    if case.kind == _ONE_SHARED and row.shared is not None:
        fields |= {"num_shared_experts": 1, "shared_expert_gate": row.shared.gated}
    if case.kind == _FIRST_DENSE:
        fields["sparse_layers"] = "last:1"
    mixture = upcycle(dense, num_experts=4, num_experts_per_tok=2, verify=False, **fields)
    perturb(mixture, seed=2)
    # Not sharper: llama.cpp takes sums of chosen scores below 6e-5 for 6e-5.
    sharpen(mixture, 3.0)
    favour_experts(mixture)
    return mixture


def _row(target: str) -> NativeTarget:
    return next(row for row in TARGETS if row.name == target)


@torch.no_grad()
def swapped(mixture: Any) -> Any:
    """The same mixture with two experts of one layer in each other's place."""
    other = copy.deepcopy(mixture)
    experts = other.base_model.sparse_blocks[0].experts
    for parameter in experts.parameters():
        parameter[[0, 1]] = parameter[[1, 0]]
    return other


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens that the converter asks single architectures for."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|startoftext|>"]
    special += ["[gMASK]", "<|user|>", "<|observation|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZES["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog, and the dog sleeps on"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence."""
    return model(torch.tensor([ids])).logits[0].float()


def greedy_tokens(model: Any, ids: Sequence[int]) -> list[int]:
    """The most probable tokens one after the other, whatever they mean."""
    found = list(ids)
    for _ in range(NEW_TOKENS):
        found.append(int(logits_of(model, found)[-1].argmax()))
    return found[len(ids) :]


def measure(case: Case, python: str, source: Path) -> Row:
    """Export one mixture, let llama.cpp run it, and compare."""
    ids = torch.randint(16, 256, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    mixture = mixture_of(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixture.save_pretrained(folder / "moe")
        tokenizer().save_pretrained(folder / "moe")
        export_native(folder / "moe", case.target, folder / "native")
        request = llama_cpp_side.Request(
            source=str(source),
            checkpoint=str(folder / "native"),
            folder=name,
            # What llama.cpp calls the splitting of texts that the tokenizer above does.
            pre_tokenizer="gpt-2",
            tokenizer=case.target not in _OTHER_TOKENIZERS,
            options=_OPTIONS.get(case.target, []),
            ids=ids,
            new_tokens=NEW_TOKENS,
            text=TEXT if case.target not in _OTHER_TOKENIZERS else "",
        )
        answer, reason = answered(request, python)
        converts = (folder / "model.gguf").is_file()
    if answer is None:
        return Row(case, converts=converts, reason=reason)
    return compared(case, mixture, ids, answer)


def answered(request: llama_cpp_side.Request, python: str) -> tuple[dict[str, Any] | None, str]:
    """What the other interpreter says, or the reason why it says nothing."""
    folder = Path(request["folder"])
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [python, str(Path(llama_cpp_side.__file__)), str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    answer = folder / "answer.json"
    if not answer.is_file():
        return None, refusal(done.stderr)
    return json.loads(answer.read_text(encoding="utf-8")), ""


def refusal(said: str) -> str:
    """The line of an error output that gives the reason, fit for a cell of a table."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason given"]
    telling = [line for line in lines if re.search(r"error loading model:|GGML_ASSERT", line)]
    reason = (telling or lines[-1:])[0]
    # Loggers and C sources say where they are, the source with the path of the machine that it was built on.
    reason = re.sub(r"^(ERROR:[\w.-]+:|\w+: error loading model: |\S*/(?=\w+\.\w+:\d+))", "", reason)
    return reason.replace("|", "/")


def compared(case: Case, mixture: Any, ids: Sequence[int], answer: Mapping[str, Any]) -> Row:
    """The row of a mixture that llama.cpp runs."""
    theirs = torch.tensor(answer["logits"])
    tokens = tokenizer().encode(TEXT, add_special_tokens=False)
    named = "pre-tokenizer named" if answer["text"] == tokens else "DIFFERENT"
    return Row(
        case,
        tokenizer="left out" if case.target in _OTHER_TOKENIZERS else named,
        converts=True,
        difference=relative_difference(theirs, logits_of(mixture, ids)),
        control=relative_difference(theirs, logits_of(swapped(mixture), ids)),
        greedy=answer["tokens"] == greedy_tokens(mixture, ids),
    )


def summary(rows: Sequence[Row]) -> str:
    """How many are served as they are, refused, and wrong."""
    equal, refused = sum(row.equal for row in rows), sum(row.difference is None for row in rows)
    served, targets = {row.case.target for row in rows if row.equal}, {row.case.target for row in rows}
    return (
        f"Of {len(rows)} mixtures {equal} are served with equal logits and tokens, {refused} are refused and "
        f"{len(rows) - equal - refused} computed differently; of {len(targets)} targets {len(served)} serve at least "
        "one"
    )


def markdown(rows: Sequence[Row], engine: str) -> str:
    """The table with its command and setting."""
    said = (f"`python -m {_NAME}`, {engine}; {setting()}.", f"{summary(rows)}.")
    return markdown_table(_NAME, said, COLUMNS, [row.cells() for row in rows])


def engine_version(python: str) -> str:
    """The version of llama-cpp-python in the other interpreter."""
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return f"llama-cpp-python {done.stdout.strip()} with the llama.cpp in its source archive"


def _arguments() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in TARGETS]
    parser.add_argument("targets", nargs="*", default=names, help="targets of the export table; default: all")
    parser.add_argument("--llama-cpp-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="the source tree of that llama.cpp")
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.targets) - set(names))
    if unknown:
        parser.error(f"unknown targets: {', '.join(unknown)}")
    if not (arguments.llama_cpp / "convert_hf_to_gguf.py").is_file():
        parser.error(f"--llama-cpp: must be a folder with convert_hf_to_gguf.py, got {arguments.llama_cpp}")
    return arguments


def main() -> None:
    """Measure the targets that were asked for, and print the table."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    engine = engine_version(arguments.llama_cpp_python)
    source = arguments.llama_cpp.resolve()
    console = Console()
    with Progress(console=Console(file=sys.stderr)) as progress:
        todo = progress.track(list(cases(arguments.targets)), description="mixtures")
        rows = [measure(case, arguments.llama_cpp_python, source) for case in todo]
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells(), style="green" if row.equal else "dim" if row.difference is None else "red")
    console.print(table)
    console.print(summary(rows))
    if arguments.markdown:
        write_table(arguments.markdown, _NAME, markdown(rows, engine))


if __name__ == "__main__":
    main()
