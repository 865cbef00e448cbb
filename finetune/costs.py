"""What a mixture costs: parameters, floating-point operations and memory, counted without weights.

Shape letters: E experts, K choices per token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from st_moe.configuration import STMoEConfig, auto_class_of

_LAYER = re.compile(r"\.(\d+)\.")
_OUTSIDE = "embeddings and head"

# Units by size; a value is shown in the largest of which it holds one.
_COUNTS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, ""))
_FLOPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP"))
_BYTES = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"), (1, "bytes"))


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model.

    Attributes:
        name: `"layer 3"` or the name of what lies outside of the layers.
        kind: `"sparse"`, `"dense"`, `"native"` (a layer with experts of the family's own), or "" outside of layers.
        total: all parameters.
        active: those that one token uses.
        matmul: active parameters that take part in matrix products; each costs 2 FLOPs per token forward.
    """

    name: str
    kind: str
    total: int
    active: int
    matmul: int


@dataclass(frozen=True)
class Costs:
    """Costs of a model.

    Attributes:
        parts: the layers, and what is outside of them.
        dtype: of the saved weights.
    """

    parts: tuple[Part, ...]
    dtype: torch.dtype

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return sum(part.active for part in self.parts)

    @property
    def forward_flops(self) -> int:
        """FLOPs of one token's forward pass in matrix products with weights; attention scores come on top."""
        return 2 * sum(part.matmul for part in self.parts)

    @property
    def training_flops(self) -> int:
        """FLOPs of one token's forward and backward pass: three times the forward's."""
        return 3 * self.forward_flops

    @property
    def inference_bytes(self) -> int:
        """Bytes of the weights; the KV cache and activations come on top."""
        return self.total * self.dtype.itemsize

    @property
    def training_bytes(self) -> int:
        """Bytes of float32 weights, gradients and AdamW's two moments; activations come on top."""
        return self.total * 4 * torch.float32.itemsize


class _Sums:
    """Parameters of one part while they are counted: those that every token uses, and those in experts."""

    def __init__(self) -> None:
        self.all = {"every": 0, "experts": 0}
        self.matmul = {"every": 0, "experts": 0}

    def part(self, name: str, kind: str, size: tuple[int, int]) -> Part:
        """The part of that name; `size` is E and K, of a layer with experts."""
        experts, choices = size
        # Exact: experts are alike, so their sum is a multiple of E.
        active, matmul = (sums["every"] + sums["experts"] * choices // experts for sums in (self.all, self.matmul))
        return Part(name, kind, sum(self.all.values()), active, matmul)


def count_costs(config: STMoEConfig) -> Costs:
    """Count a mixture with its head, see `auto_class_of`, from the config alone.

    Args:
        config: the mixture's config.
    """
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
    sums: dict[str, _Sums] = {}
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        part = sums.setdefault(f"layer {layer[1]}" if layer else _OUTSIDE, _Sums())
        kind = "experts" if ".experts." in name else "every"
        part.all[kind] += parameter.numel()
        if _multiplies(model, name, parameter):
            part.matmul[kind] += parameter.numel()
    native = {
        f"layer {found[1]}": s for name, s in config.native_sizes(model).items() if (found := _LAYER.search(name))
    }
    names = [f"layer {index}" for index in config.sparse_layer_indices]
    sizes = {**native, **dict(zip(names, config.layer_sizes, strict=True))}
    kinds = {_OUTSIDE: "", **dict.fromkeys(native, "native"), **dict.fromkeys(names, "sparse")}
    parts = tuple(part.part(name, kinds.get(name, "dense"), sizes.get(name, (1, 1))) for name, part in sums.items())
    return Costs(parts, config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)


def _multiplies(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight of matrix products: no norm, bias or embedding."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        # An embedding is looked up; tied to the head, its one matrix also multiplies.
        head = model.get_output_embeddings()
        return head is not None and getattr(head, "weight", None) is parameter
    # Experts stack their parameters: 3-D weights, 2-D biases.
    return parameter.ndim == (3 if name.split(".")[-2] == "experts" else 2)


def cost_tables(config: STMoEConfig, costs: Costs, per_layer: bool = False) -> list[Table]:
    """Tables of a mixture's costs, for a terminal of 80 columns.

    Args:
        config: the mixture's config.
        costs: what `count_costs` found.
        per_layer: whether to add a table with one row per layer.
    """
    layers = f"{len(config.sparse_layer_indices)} of {config.num_hidden_layers} layers sparse"
    experts, choices = (", ".join(map(str, dict.fromkeys(sizes))) for sizes in zip(*config.layer_sizes, strict=True))
    title = f"{config.dense_model_type} mixture: {experts} experts, {choices} per token, {layers}"
    summary = Table(title=title, title_justify="left")
    for column in ("", "value", "unit", "not counted"):
        summary.add_column(column, justify="right" if column == "value" else "left")
    dtype = str(costs.dtype).removeprefix("torch.")
    rows = (
        ("parameters", *_scaled(costs.total, _COUNTS), "", ""),
        ("active parameters", *_scaled(costs.active, _COUNTS), "per token", ""),
        ("compute, inference", *_scaled(costs.forward_flops, _FLOPS), "per token", "attention scores"),
        ("compute, training", *_scaled(costs.training_flops, _FLOPS), "per token", "attention scores"),
        ("memory, inference", *_scaled(costs.inference_bytes, _BYTES), f"({dtype})", "KV cache, activations"),
        ("memory, training", *_scaled(costs.training_bytes, _BYTES), "(float32, AdamW)", "activations"),
    )
    for name, value, unit, of, without in rows:
        summary.add_row(name, value, f"{unit} {of}".strip(), without)
    return [summary, _layer_table(costs)] if per_layer else [summary]


def _layer_table(costs: Costs) -> Table:
    table = Table(title="per layer, and per token", title_justify="left")
    for column in ("part", "kind", "parameters", "active", "forward"):
        table.add_column(column, justify="left" if column in ("part", "kind") else "right")
    for part in costs.parts:
        counts = (" ".join(_scaled(count, _COUNTS)).strip() for count in (part.total, part.active))
        table.add_row(part.name, part.kind, *counts, " ".join(_scaled(2 * part.matmul, _FLOPS)))
    return table


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> tuple[str, str]:
    """A value in the largest unit that fits, to three significant digits, and that unit."""
    # Not from 1, or 999,999 would become 1000 thousand.
    size, name = next((unit for unit in units if value >= 0.9995 * unit[0]), units[-1])
    if size == 1:
        return f"{value:,.0f}", name
    scaled = value / size
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{digits}f}", name
