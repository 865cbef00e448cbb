"""Recipes: from one dense FFN's tensors to one layer's expert tensors. Pure functions, seeded by their generator.

To add a recipe: one function, one line in `RECIPES`, one test.
Shape letters: H hidden size, I FFN width, E experts, P = 2 if gated (gate first, then up) else 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from st_moe.modeling.ffn import FFNLocation


class FFNTensors(NamedTuple):
    """Weights of one dense FFN, or with a leading E of all experts of a layer.

    Attributes:
        w_in: [P * I, H].
        w_out: [H, I].
        b_in: [P * I] or None.
        b_out: [H] or None.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None


def read_ffn(ffn: FFNLocation) -> FFNTensors:
    """Weights of a located FFN in the experts' layout, whatever the layout of the dense model.

    Args:
        ffn: a location with storage `"tensors"`.
    """
    linears = ffn.linears()
    weights = [linear.weight.detach().t() if ffn.conv1d else linear.weight.detach() for linear in linears]
    w_in = weights[0] if len(weights) == 2 else torch.cat(weights[:-1])
    if not ffn.bias:
        return FFNTensors(w_in, weights[-1])
    biases = [linear.bias.detach() for linear in linears]
    return FFNTensors(w_in, weights[-1], biases[0] if len(biases) == 2 else torch.cat(biases[:-1]), biases[-1])


def copy(dense: FFNTensors, num_experts: int, generator: torch.Generator) -> FFNTensors:
    """Every expert is the dense FFN: step 0 computes the dense function (Komatsuzaki et al. 2022)."""
    return FFNTensors(*(_repeat(tensor, num_experts) for tensor in dense))  # type: ignore[arg-type]


def noise(
    dense: FFNTensors, num_experts: int, generator: torch.Generator, *, scale: float = 0.02, fraction: float = 0.5
) -> FFNTensors:
    """Copies, with N(0, scale^2) added to a random fraction of the weights of each expert (random noise upcycling).

    Raises:
        ValueError: when scale is negative or fraction outside [0, 1].
    """
    _check("scale", scale, scale >= 0, "must not be negative")
    _check("fraction", fraction, 0 <= fraction <= 1, "must be in [0, 1]")
    experts = copy(dense, num_experts, generator)
    for weight in experts[:2]:
        for expert in weight:
            draw = torch.randn(expert.shape, generator=generator) * scale
            chosen = torch.rand(expert.shape, generator=generator) < fraction
            expert += (draw * chosen).to(expert)
    return experts


def drop(dense: FFNTensors, num_experts: int, generator: torch.Generator, *, ratio: float = 0.5) -> FFNTensors:
    """Drop-Upcycling: per expert, a random set of floor(ratio * I) neurons is drawn anew (Nakamura et al. 2025).

    One set of neurons is shared by gate, up and down; their weights are drawn from a normal distribution with the mean
    and standard deviation of the weights they replace, matrix by matrix. Biases are kept.

    Raises:
        ValueError: when ratio is outside [0, 1].
    """
    _check("ratio", ratio, 0 <= ratio <= 1, "must be in [0, 1]")
    experts = copy(dense, num_experts, generator)
    width = dense.w_out.shape[1]
    count = int(ratio * width)
    if count == 0:
        return experts
    for w_in, w_out in zip(experts.w_in, experts.w_out, strict=True):
        neurons = torch.randperm(width, generator=generator)[:count].to(w_in.device)
        for matrix in (*w_in.split(width), w_out.t()):
            replaced = matrix[neurons].float()
            draw = torch.randn(replaced.shape, generator=generator).to(replaced)
            matrix[neurons] = (replaced.mean() + replaced.std() * draw).to(matrix)
    return experts


class Recipe(NamedTuple):
    """A row of `RECIPES`: the function, and whether step 0 computes the dense function when weights sum to 1."""

    function: Callable[..., FFNTensors]
    keeps_function: bool


RECIPES: dict[str, Recipe] = {
    "copy": Recipe(copy, keeps_function=True),
    "noise": Recipe(noise, keeps_function=False),
    "drop": Recipe(drop, keeps_function=False),
}


def check_recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name, if it takes these options.

    Raises:
        ValueError: when the name or an option is unknown.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    parameters = inspect.signature(recipe.function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"recipe_options: {name!r} takes {', '.join(known) or 'no options'}, got {', '.join(unknown)}")
    return recipe


def _repeat(tensor: Tensor | None, num_experts: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0).repeat(num_experts, *(1,) * tensor.ndim)


def _check(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"recipe_options: {name} {rule}, got {value!r}")
