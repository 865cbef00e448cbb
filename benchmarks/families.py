"""Which families of Transformers become mixtures that compute the dense function: `python -m benchmarks.families`.

Every entry of Transformers' causal-LM mapping, and image classifiers, are built tiny and random, upcycled to 4 copies
with softmax top-2 routing, and compared with the dense model: logits in float32, greedy generation, and a save and load
after which every tensor must be the same bit by bit. `--markdown FILE` writes the table into FILE, for the docs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from benchmarks.measure import markdown_table, setting, write_table
from benchmarks.tiny_models import dense_model, perturb
from st_moe import locate_ffns, prove_identity, upcycle
from st_moe.configuration import REFUSED_FAMILIES, family_config

TOLERANCE = 1e-5
#: Image models beside the causal language models, each with its Auto class.
IMAGE_MODELS: dict[str, Any] = {
    "vit": AutoModelForImageClassification,
    "dinov2": AutoModelForImageClassification,
    "dinov2_with_registers": AutoModelForImageClassification,
    "beit": AutoModelForImageClassification,
    "ijepa": AutoModelForImageClassification,
    "imagegpt": AutoModelForImageClassification,
    "vit_msn": AutoModelForImageClassification,
    # Classifiers of composites, on their vision towers; and such a tower alone.
    "siglip": AutoModelForImageClassification,
    "clip": AutoModelForImageClassification,
    "metaclip_2": AutoModelForImageClassification,
    "siglip_vision_model": AutoModel,
}
#: Encoders that are in Transformers' causal-LM mapping and not in its masked-LM mapping.
ENCODERS = ("bert-generation",)
#: Dense decoders whose config can also give them experts of their own; every other one with such fields is a mixture.
DENSE_UNLESS_ASKED = ("doge", "gemma4_text", "nemotron_h")
FAMILIES: tuple[str, ...] = (*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *IMAGE_MODELS)

_NAME = "benchmarks.families"


class Row(NamedTuple):
    """One family.

    Attributes:
        family: entry of Transformers' mapping.
        category: what kind of model it is.
        layers: sparse layers and all layers, "2/2".
        rule: how the FFN is found, and what it is: the rules of `FFNLocation`.
        storage: `"tensors"` (3-D), `"modules"`, or both.
        difference: largest relative logit difference to the dense model; None if refused.
        round_trip: whether each tensor of a saved and loaded mixture is the same bit by bit.
        generation: whether greedy generation gives the same tokens; None for models that do not generate.
        reason: why it was refused, or what went wrong.
    """

    family: str
    category: str
    layers: str = ""
    rule: str = ""
    storage: str = ""
    difference: float | None = None
    round_trip: bool | None = None
    generation: bool | None = None
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether everything that was measured is equal."""
        close = self.difference is not None and self.difference <= TOLERANCE
        return close and self.round_trip is True and self.generation is not False

    def cells(self) -> list[str]:
        """The columns after family and category, as text."""
        said = {True: "equal", False: "DIFFERENT", None: ""}
        difference = "" if self.difference is None else f"{self.difference:.1e}"
        equal = [said[self.round_trip], said[self.generation]]
        return [self.layers, self.rule, self.storage, difference, *equal, self.reason]


COLUMNS = ("family", "category", "sparse layers", "FFN", "experts", "logits", "round trip", "generation", "reason")


def refusal_of(family: str) -> str:
    """Why no mixture can be made from a family whatever its config says, or ""."""
    try:
        family_config(family)
    except ValueError as error:
        return str(error).removeprefix("dense_model_type: ")
    return ""


def category_of(family: str) -> str:
    """What kind of model an entry of the mapping is."""
    config_class = CONFIG_MAPPING[family]
    if config_class.model_type != family:
        return "alias"
    if family in IMAGE_MODELS:
        return "image model"
    refusal = refusal_of(family)
    if "composite" in refusal:
        return "composite"
    if "experts of its own" in refusal:
        return "mixture"
    if family not in DENSE_UNLESS_ASKED and not refusal and family_config(family).shared_names():
        return "mixture"
    fields = config_class.__dataclass_fields__
    if {"decoder_layers", "num_decoder_layers"} & fields.keys():
        return "seq2seq decoder"
    if family in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *ENCODERS):
        return "encoder with LM head"
    return "refused decoder" if family in REFUSED_FAMILIES else "dense decoder"


def measure(family: str) -> Row:
    """Build, upcycle and compare one family; whatever goes wrong is the row's reason."""
    config_class = CONFIG_MAPPING[family]
    if config_class.model_type != family:
        return Row(family, "alias", reason=f"another name of {config_class.model_type}")
    # Of some composites the image classifier can be sparse, though they cannot as a whole.
    refusal = "" if family in IMAGE_MODELS else refusal_of(family)
    if refusal:
        return Row(family, category_of(family), reason=refusal)
    try:
        return _measured(family)
    except Exception as error:  # noqa: BLE001 -- one family's fault is a row of the table, not its end
        return Row(family, category_of(family), reason=f"{type(error).__name__}: {error}".splitlines()[0])


def dense_of(family: str) -> PreTrainedModel:
    """The family's tiny dense model; of encoders, one that is switched to be a decoder."""
    auto = IMAGE_MODELS.get(family, AutoModelForCausalLM)
    encoder = category_of(family) == "encoder with LM head"
    switch = encoder and "is_decoder" in CONFIG_MAPPING[family].__dataclass_fields__
    return dense_model(family, auto, **({"is_decoder": True} if switch else {}))


def sparse_of(dense: PreTrainedModel, **fields: Any) -> Any:
    """The mixture of 4 copies in every layer that can be sparse."""
    locations = locate_ffns(dense)
    able = [ffn.layer for ffn in locations if ffn.storage != "none"]
    layers = able if 0 < len(able) < len(locations) else None
    return upcycle(dense, num_experts=4, num_experts_per_tok=2, sparse_layers=layers, verify=False, **fields)


def _measured(family: str) -> Row:
    dense = dense_of(family)
    locations = locate_ffns(dense)
    sparse = sparse_of(dense)
    able = [ffn for ffn in locations if ffn.storage != "none"]
    whole = [ffn.reason for ffn in able if ffn.reason]
    difference = prove_identity(dense, sparse).max_relative_difference
    generation = None
    if dense.can_generate():
        generation = torch.equal(*(generated(model) for model in (dense, sparse)))
    return Row(
        family,
        category_of(family),
        layers=f"{len(able)}/{len(locations)}",
        rule=", ".join(dict.fromkeys(_described(ffn) for ffn in able)),
        storage=", ".join(sorted({ffn.storage for ffn in able})),
        difference=difference,
        round_trip=not round_trip_faults(sparse),
        generation=generation,
        reason=whole[0] if whole else "",
    )


def _described(ffn: Any) -> str:
    """An FFN's place in its layer, and its layout."""
    place = {"module": "", "loose": "in the layer: ", "split": "in two modules: "}[ffn.rule]
    if ffn.layout is None:
        return f"{place}{type(ffn.module).__name__}"
    kind = "gated" if ffn.gated else "ungated"
    fused = ", fused" if ffn.gated and len(ffn.layout.projections_in) == 1 else ""
    return f"{place}{kind}{fused}{', Conv1D' if ffn.conv1d else ''}{', bias' if ffn.bias else ''}"


def generated(model: PreTrainedModel) -> torch.Tensor:
    """Four tokens by greedy search after 2 x 6 random ones, int64 [2, 10]."""
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)


def round_trip_faults(sparse: Any) -> list[str]:
    """Names of the tensors that saving and loading change, of a mixture whose experts are made to differ first."""
    perturb(sparse, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        sparse.save_pretrained(folder)
        loaded, report = type(sparse).from_pretrained(folder, output_loading_info=True)
        faults = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
        for kind in ("named_parameters", "named_buffers"):
            before, after = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (sparse, loaded))
            faults += [name for name in before if not _same(before[name], after.get(name))]
            faults += sorted(after.keys() - before.keys())
    return faults


def _same(before: torch.Tensor, after: torch.Tensor | None) -> bool:
    """Whether two tensors are equal bit by bit; one that was not loaded is on the meta device."""
    return after is not None and after.device == before.device and torch.equal(before, after)


def summary(rows: Sequence[Row]) -> str:
    """How many are exact, by category."""
    total, exact = Counter(row.category for row in rows), Counter(row.category for row in rows if row.exact)
    return "; ".join(f"{category}: {exact[category]} of {count} exact" for category, count in sorted(total.items()))


def markdown(rows: Sequence[Row]) -> str:
    """The table with its command and setting."""
    said = (f"`python -m {_NAME}`, {setting()}.", f"{summary(rows)}.")
    return markdown_table(_NAME, said, COLUMNS, [(row.family, row.category, *row.cells()) for row in rows])


def main() -> None:
    """Measure the families that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES, help="entries of the mapping; default: all")
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown families: {', '.join(unknown)}")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    with Progress(console=Console(file=sys.stderr)) as progress:
        rows = [measure(family) for family in progress.track(arguments.families, description="families")]
    table = Table(*COLUMNS)
    for row in rows:
        style = "green" if row.exact else "red" if row.difference is not None or not row.reason else "dim"
        table.add_row(row.family, row.category, *row.cells(), style=style)
    console.print(table)
    console.print(summary(rows))
    if arguments.markdown:
        write_table(arguments.markdown, _NAME, markdown(rows))


if __name__ == "__main__":
    main()
