"""Recipes: from one dense FFN's tensors to one layer's expert tensors. Pure functions, seeded by their generator.

To add a recipe: one function, one line in `RECIPES`, one test.
Shape letters: H hidden size, I FFN width, E experts, P = 2 if gated (gate first, then up) else 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from st_moe.configuration import STMoEConfig
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


class LayerTensors(NamedTuple):
    """What a recipe makes of one layer.

    Attributes:
        experts: weights of all E experts, each with a leading E.
        shared: weights of the FFN that every token passes, without a leading E; None where the config has none, or
            where it should start as one that adds nothing.
        router: int64 [E], for each expert the number of the router row that it gets, so that experts with the same
            number share one; None gives each expert its own.
    """

    experts: FFNTensors
    shared: FFNTensors | None = None
    router: Tensor | None = None


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


def copy(sources: Sequence[FFNTensors], num_experts: int, generator: torch.Generator) -> LayerTensors:
    """Every expert is the dense FFN: step 0 computes the dense function (Komatsuzaki et al. 2022)."""
    return LayerTensors(_copies(sources[0], num_experts))


def noise(
    sources: Sequence[FFNTensors],
    num_experts: int,
    generator: torch.Generator,
    *,
    scale: float = 0.02,
    fraction: float = 0.5,
) -> LayerTensors:
    """Copies, with N(0, scale^2) added to a random fraction of the weights of each expert (random noise upcycling).

    Raises:
        ValueError: when scale is negative or not finite, or fraction outside [0, 1].
    """
    scale = _number("scale", scale, "must be finite and not negative", most=torch.finfo(torch.float32).max)
    fraction = _number("fraction", fraction, "must be in [0, 1]", most=1)
    experts = _copies(sources[0], num_experts)
    for weight in experts[:2]:
        for expert in weight:
            draw = torch.randn(expert.shape, generator=generator) * scale
            chosen = torch.rand(expert.shape, generator=generator) < fraction
            expert += (draw * chosen).to(expert)
    return LayerTensors(experts)


def drop(
    sources: Sequence[FFNTensors], num_experts: int, generator: torch.Generator, *, ratio: float = 0.5
) -> LayerTensors:
    """Drop-Upcycling: per expert, a random set of floor(ratio * I) neurons is drawn anew (Nakamura et al. 2025).

    One set of neurons is shared by gate, up and down; their weights are drawn from a normal distribution with the mean
    and standard deviation of the weights they replace, matrix by matrix. Biases are kept.

    Raises:
        ValueError: when ratio is outside [0, 1].
    """
    ratio = _number("ratio", ratio, "must be in [0, 1]", most=1)
    experts = _copies(sources[0], num_experts)
    width = sources[0].w_out.shape[1]
    count = int(ratio * width)
    if count == 0:
        return LayerTensors(experts)
    for w_in, w_out in zip(experts.w_in, experts.w_out, strict=True):
        neurons = torch.randperm(width, generator=generator)[:count].to(w_in.device)
        for matrix in (*w_in.split(width), w_out.t()):
            replaced = matrix[neurons].float()
            draw = torch.randn(replaced.shape, generator=generator).to(replaced)
            matrix[neurons] = (replaced.mean() + replaced.std() * draw).to(matrix)
    return LayerTensors(experts)


class Recipe(NamedTuple):
    """A row of `RECIPES`.

    Attributes:
        function: takes the source models' FFNs of one layer, the number of experts, a generator and the options.
        keeps_function: whether step 0 is sure to compute the dense function, given the options and the mixture's
            config; what else happens to keep it, only the proof can say.
        fields: the fields of the mixture's config that follow from the options, the fields given, and the width of
            the dense FFN in neurons; ValueError when these do not go together.
    """

    function: Callable[..., LayerTensors]
    keeps_function: Callable[[Mapping[str, Any], STMoEConfig], bool]
    fields: Callable[[Mapping[str, Any], Mapping[str, Any], int], dict[str, Any]]

    def make(
        self,
        sources: Sequence[FFNTensors],
        num_experts: int,
        num_experts_per_tok: int,
        generator: torch.Generator,
        options: Mapping[str, Any],
    ) -> LayerTensors:
        """Call the function for one layer; those that scale by the number of choices are told it."""
        told = {_CHOICES: num_experts_per_tok} if _CHOICES in inspect.signature(self.function).parameters else {}
        return self.function(sources, num_experts, generator, **told, **options)


def _keeps_width(options: Mapping[str, Any], fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    return {}


def _of_copies(options: Mapping[str, Any], config: STMoEConfig) -> bool:
    return config.combine_weights_sum_to_one


def _never(options: Mapping[str, Any], config: STMoEConfig) -> bool:
    return False


RECIPES: dict[str, Recipe] = {
    "copy": Recipe(copy, _of_copies, _keeps_width),
    "noise": Recipe(noise, _never, _keeps_width),
    "drop": Recipe(drop, _never, _keeps_width),
}

# The keyword by which a recipe's function asks for the number of choices per token; no option of the user's.
_CHOICES = "num_experts_per_tok"


def check_recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name, if it takes these options.

    Raises:
        ValueError: when the name or an option is unknown.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    parameters = inspect.signature(recipe.function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != _CHOICES]
    unknown = sorted(str(option) for option in options if option not in known)
    if unknown:
        raise ValueError(f"recipe_options: {name!r} takes {', '.join(known) or 'no options'}, got {', '.join(unknown)}")
    return recipe


def try_recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name, once it has made an expert of a tiny FFN with these options.

    So a faulty option shows before anything large is read or built.

    Raises:
        ValueError: when the name, an option or its value is at fault.
    """
    recipe = check_recipe(name, options)
    recipe.make([FFNTensors(torch.zeros(4, 2), torch.zeros(2, 4))], 1, 1, torch.Generator(), options)
    return recipe


def _copies(ffn: FFNTensors, count: int) -> FFNTensors:
    """That many copies of an FFN, stacked."""
    return _each(ffn, lambda tensor: tensor.unsqueeze(0).repeat(count, *(1,) * tensor.ndim))


def _each(ffn: FFNTensors, function: Callable[[Tensor], Tensor]) -> FFNTensors:
    """An FFN with a function applied to the tensors that it has."""
    return FFNTensors(*(None if tensor is None else function(tensor) for tensor in ffn))  # type: ignore[arg-type]


def _number(name: str, value: Any, rule: str, most: float) -> float:
    """An option's value as a float.

    Raises:
        ValueError: when it is not a real number (a bool is none) in [0, most]; the message says `rule`.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real:
        raise ValueError(f"recipe_options: {name} must be a real number, got {value!r}")
    if not 0 <= value <= most:  # NaN is in no range
        raise ValueError(f"recipe_options: {name} {rule}, got {value!r}")
    return float(value)
