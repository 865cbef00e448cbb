"""The proof of a conversion on disk: whole models by their logits, or one sparse layer at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from st_moe import modeling
from st_moe.conversion.checkpoint import checkpoint_tensors
from st_moe.conversion.plan import Models, stored_by_name
from st_moe.conversion.proof import IdentityProof, prove_identity, tolerance_of
from st_moe.conversion.streaming import Plan
from st_moe.conversion.tensor_files import DTYPES, StoredTensor, read_into
from st_moe.conversion.upcycle import load_dense
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.routing.scope import RoutingScope, activate

_TOKENS = 64


@dataclass(frozen=True)
class LayerProof:
    """How far the sparse blocks of a mixture are from the dense FFNs that they stand in for.

    Attributes:
        max_relative_difference: over all sparse layers, the largest |sparse - dense| difference of an output divided by
            the largest |dense| output, on random hidden states.
        num_layers: sparse layers compared.
        num_tokens: hidden states per layer.
        tolerance: what rounding explains in the weights' dtype.
    """

    max_relative_difference: float
    num_layers: int
    num_tokens: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within rounding."""
        return self.max_relative_difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal up to rounding" if self.holds else "NOT equal"
        return (
            f"step 0, layer by layer: {verdict}; max relative FFN difference {self.max_relative_difference:.1e} over "
            f"{self.num_layers} layers and {self.num_tokens} random hidden states"
        )


def prove_folder(plan: Plan, folder: Path) -> IdentityProof:
    """Compare the logits of the dense checkpoint and of the mixture in a folder, both loaded whole."""
    dense = load_dense(plan.source)
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return prove_identity(dense, getattr(modeling, name).from_pretrained(folder, dtype="auto"))


def prove_layers(plan: Plan, folder: Path, fields: Mapping[str, Any]) -> LayerProof:
    """Compare each sparse block in a folder with the dense FFN of the source, one layer in memory at a time.

    Args:
        plan: of the conversion.
        folder: with the mixture's files.
        fields: the mixture fields of the conversion.
    """
    models = Models(plan.source, plan.recipe, plan.options, fields)
    stored = stored_by_name(models.dense, checkpoint_tensors(Path(plan.source)), plan.source)
    written = checkpoint_tensors(folder)
    differences, tolerances = [], []
    for index, (name, block) in models.blocks.items():
        ffn = models.locations[index]
        dense, sparse = _within(ffn.path, stored), _within(name, written)
        dtype = DTYPES[next(iter(sparse[part] for part in sparse if part.startswith("experts."))).dtype]
        generator = torch.Generator().manual_seed(index)
        size = ffn.hidden_size or models.config.hidden_size
        hidden = torch.randn(1, _TOKENS, size, generator=generator).to(dtype)
        expected = _dense_output(ffn, dense, hidden).float()
        found = _sparse_output(block, sparse, hidden).float()
        differences.append((found - expected).abs().max() / expected.abs().max())
        tolerances.append(tolerance_of(dtype))
    # The maximum of a tensor, unlike that of a list, is NaN if anything is.
    return LayerProof(torch.stack(differences).max().item(), len(differences), _TOKENS, max(tolerances))


def _within(prefix: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of one module, by their names in it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


@torch.no_grad()
def _dense_output(ffn: FFNLocation, tensors: Mapping[str, StoredTensor], hidden: Tensor) -> Tensor:
    """What the dense FFN makes of hidden states [1, T, H], by its own code where it is a module of its own."""
    if ffn.rule == "module":
        module = _filled(copy.deepcopy(ffn.module), tensors)
        return module(hidden, torch.zeros_like(hidden)) if ffn.adds_residual else module(hidden)
    layout = ffn.layout
    assert layout is not None  # locate_ffns refuses others
    first, last = (copy.deepcopy(linear) for linear in layout.linears(ffn.module))
    names = (*layout.projections_in, layout.projection_out)
    linears = [_filled(m, _within(name, tensors)) for name, m in zip(names, (first, last), strict=True)]
    return linears[1](ffn.activation(linears[0](hidden)))


def _sparse_output(block: nn.Module, tensors: Mapping[str, StoredTensor], hidden: Tensor) -> Tensor:
    """What the sparse block makes of them; the block is left without memory."""
    ids = torch.arange(hidden.shape[1])[None]
    scope = RoutingScope(torch.ones_like(ids, dtype=torch.bool), ids, ids)
    with torch.no_grad(), activate(scope):
        output = _filled(block.eval(), tensors)(hidden)
    block.to(device="meta")
    return output


def _filled(module: nn.Module, tensors: Mapping[str, StoredTensor]) -> nn.Module:
    """A module without memory, with its stored tensors in their own dtypes."""
    state = {}
    for name in module.state_dict():
        state[name] = torch.empty(tensors[name].shape, dtype=DTYPES[tensors[name].dtype])
        read_into(state[name], tensors[name])
    module.load_state_dict(state, assign=True)
    return module.eval()
