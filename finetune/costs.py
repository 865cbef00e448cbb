"""What a mixture costs: parameters, floating-point operations and memory, counted without weights.

Shape letters: E experts, K choices per token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from st_moe.configuration import STMoEConfig

_LAYER = re.compile(r"\.(\d+)\.")
_GIB = 1024**3


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model.

    Attributes:
        name: `"layer 3"` or the name of what lies outside of the layers.
        sparse: whether it is a sparse layer.
        total: all parameters.
        active: those that one token uses.
        matmul: active parameters that take part in matrix products; each costs 2 FLOPs per token forward.
    """

    name: str
    sparse: bool
    total: int
    active: int
    matmul: int


@dataclass(frozen=True)
class Costs:
    """Costs of a model.

    Attributes:
        parts: the layers, and what is outside of them.
        bytes_per_parameter: of the weights' dtype.
    """

    parts: tuple[Part, ...]
    bytes_per_parameter: int

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
    def inference_gib(self) -> float:
        """GiB of the weights; the KV cache and activations come on top."""
        return self.total * self.bytes_per_parameter / _GIB

    @property
    def training_gib(self) -> float:
        """GiB of float32 weights, gradients and AdamW's two moments; activations come on top."""
        return self.total * 16 / _GIB


def count_costs(config: STMoEConfig) -> Costs:
    """Count a mixture with its language-model head, from its config alone.

    Args:
        config: the mixture's config.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    share = config.num_experts_per_tok / config.num_experts
    sparse = set(config.sparse_layer_indices)
    sums: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        part = f"layer {layer[1]}" if layer else "embeddings and head"
        size = parameter.numel()
        active = round(size * share) if ".experts." in name else size
        # An embedding is looked up; tied to the head, its one matrix also multiplies.
        lookup = isinstance(_owner(model, name), nn.Embedding) and not _is_head(model, parameter)
        matmul = 0 if parameter.ndim < 2 or lookup else active
        for column, value in enumerate((size, active, matmul)):
            sums.setdefault(part, [0, 0, 0])[column] += value
    parts = tuple(Part(name, name.removeprefix("layer ") in map(str, sparse), *row) for name, row in sums.items())
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Costs(parts, dtype.itemsize)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_head(model: PreTrainedModel, parameter: nn.Parameter) -> bool:
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is parameter


def cost_tables(config: STMoEConfig, costs: Costs, per_layer: bool = False) -> list[Table]:
    """Tables of a mixture's costs, for a terminal.

    Args:
        config: the mixture's config.
        costs: what `count_costs` found.
        per_layer: whether to add a table with one row per layer.
    """
    experts = f"{config.num_experts} experts, {config.num_experts_per_tok} per token"
    summary = Table(title=f"{config.dense_model_type} mixture: {experts}", title_justify="left")
    for column in ("", "value", "unit", "without"):
        summary.add_column(column, justify="right" if column == "value" else "left")
    weights = f"{costs.bytes_per_parameter * 8}-bit weights"
    rows = (
        ("parameters, total", f"{costs.total / 1e6:,.2f}", "million", ""),
        ("parameters, active per token", f"{costs.active / 1e6:,.2f}", "million", ""),
        ("sparse layers", f"{len(config.sparse_layer_indices)} of {config.num_hidden_layers}", "layers", ""),
        ("compute, forward", f"{costs.forward_flops / 1e9:,.3f}", "GFLOP per token", "attention scores"),
        ("compute, training", f"{costs.training_flops / 1e9:,.3f}", "GFLOP per token", "attention scores"),
        (f"memory, inference ({weights})", f"{costs.inference_gib:,.3f}", "GiB", "KV cache, activations"),
        ("memory, training (float32, AdamW)", f"{costs.training_gib:,.3f}", "GiB", "activations"),
    )
    for row in rows:
        summary.add_row(*row)
    return [summary, _layer_table(costs)] if per_layer else [summary]


def _layer_table(costs: Costs) -> Table:
    table = Table(title="per layer", title_justify="left")
    for column in ("part", "kind", "total, million", "active, million", "GFLOP per token"):
        table.add_column(column, justify="left" if column in ("part", "kind") else "right")
    for part in costs.parts:
        kind = "" if not part.name.startswith("layer") else "sparse" if part.sparse else "dense"
        numbers = (f"{part.total / 1e6:,.3f}", f"{part.active / 1e6:,.3f}", f"{2 * part.matmul / 1e9:,.4f}")
        table.add_row(part.name, kind, *numbers)
    return table
