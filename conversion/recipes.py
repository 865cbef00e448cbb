"""Recipes: from one dense FFN's tensors to one layer's expert tensors. Pure functions, seeded by their generator.

To add a recipe: one function, one line in `RECIPES`, one in `_OPTIONS` for each new option, one test.
Shape letters: H hidden size, I FFN width, E experts, P = 2 if gated (gate first, then up) else 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from st_moe.configuration import STMoEConfig
from st_moe.conversion.draws import normal
from st_moe.conversion.partition import PARTITIONS

if TYPE_CHECKING:
    # Model classes would cost a streaming conversion a hundred megabytes.
    from st_moe.modeling.ffn import FFNLocation


# Elements that are drawn at a time, so that what is drawn takes no more memory than what it is for.
_PIECE = 2**18


class FFNTensors(NamedTuple):
    """Weights of one dense FFN.

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


class Pieces(Sequence[Tensor]):
    """One parameter of all experts, of which each expert's is made when it is asked for, and takes no memory before.

    Args:
        fill: makes an expert's, always the same, in a contiguous tensor that it is given with the expert's number.
        like: the dense parameter, whose shape, dtype and device each has.
        count: E.
    """

    def __init__(self, fill: Callable[[int, Tensor], None], like: Tensor, count: int) -> None:
        self.fill, self._like = fill, like
        self.shape, self.dtype = torch.Size((count, *like.shape)), like.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        made = self._like.new_empty(self._like.shape)
        self.fill(index, made)
        return made

    def stacked(self) -> Tensor:
        """All of them, [E, ...]."""
        whole = self._like.new_empty(self.shape)
        for expert, place in enumerate(whole):
            self.fill(expert, place)
        return whole


class ExpertTensors(NamedTuple):
    """Weights of all experts of a layer, each with a leading E: made, or made when they are asked for.

    Attributes:
        w_in: [E, P * I, H].
        w_out: [E, H, I].
        b_in: [E, P * I] or None.
        b_out: [E, H] or None.
    """

    w_in: Tensor | Pieces
    w_out: Tensor | Pieces
    b_in: Tensor | None = None
    b_out: Tensor | None = None


class LayerTensors(NamedTuple):
    """What a recipe makes of one layer.

    Attributes:
        experts: weights of all E experts; experts that are equal may share memory.
        shared: weights of the FFN that every token passes, without a leading E; None where the config has none, or
            where it should start as one that adds nothing.
    """

    experts: ExpertTensors
    shared: FFNTensors | None = None


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
    return LayerTensors(_views(sources[0], num_experts))


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
    scale, fraction = _checked("scale", scale), _checked("fraction", fraction)

    def add(weight: Tensor, of_expert: torch.Generator, of_weight: torch.Generator) -> None:
        for piece in weight.view(-1).split(_PIECE):
            draw = normal(piece.shape, 0.0, scale, piece.dtype, of_weight)
            draw.masked_fill_(torch.rand(piece.shape, generator=of_weight) >= fraction, 0)
            piece += draw.to(piece.device)

    return LayerTensors(_varied(sources[0], num_experts, generator, add, add))


def drop(
    sources: Sequence[FFNTensors],
    num_experts: int,
    generator: torch.Generator,
    *,
    ratio: float = 0.5,
    shared_set: bool = True,
) -> LayerTensors:
    """Drop-Upcycling: per expert, a random set of floor(ratio * I) neurons is drawn anew (Nakamura et al. 2025).

    One set of neurons is shared by gate, up and down, as in the paper; with `shared_set=False` each matrix has its own,
    as in the published code, so that a share of about 1 - (1 - ratio)^(P + 1) of the neurons is touched. The weights
    are drawn from a normal distribution with the mean and standard deviation of those they replace, matrix by matrix.
    Biases are kept.

    Raises:
        ValueError: when ratio is outside [0, 1].
    """
    ratio, shared_set = _checked("ratio", ratio), _checked("shared_set", shared_set)
    width = _width(sources[0])
    count = int(ratio * width)
    if count == 0 or sources[0].w_in.is_meta:
        return LayerTensors(_views(sources[0], num_experts))

    def redraws(dense: Tensor, axis: int) -> _Change:
        moments = [_moments(matrix, axis) for matrix in dense.split(width, dim=axis)]

        def redraw(weight: Tensor, of_expert: torch.Generator, of_weight: torch.Generator) -> None:
            shared = torch.randperm(width, generator=of_expert)[:count]
            for matrix, (means, variances) in zip(weight.split(width, dim=axis), moments, strict=True):
                neurons = shared if shared_set else torch.randperm(width, generator=of_weight)[:count]
                mean, std = _mean_and_std(means[neurons], variances[neurons], matrix.shape[1 - axis])
                _draw_anew(matrix, axis, neurons, mean, std, of_weight)

        return redraw

    w_in, w_out = sources[0].w_in, sources[0].w_out
    return LayerTensors(_varied(sources[0], num_experts, generator, redraws(w_in, 0), redraws(w_out, 1)))


def split(
    sources: Sequence[FFNTensors],
    num_experts: int,
    generator: torch.Generator,
    *,
    num_experts_per_tok: int,
    partition: str = "random",
    rescale: float | None = None,
) -> LayerTensors:
    """Each neuron goes to one of E experts of width I / E (Zhu et al. 2024, LLaMA-MoE).

    The weights of the out-projection are multiplied by `rescale`; None is E / K, LLaMA-MoE's factor. With combine
    weights that sum to 1, E / K leaves each chosen neuron E / K^2 times what it was, if the K weights are equal; a
    factor of K leaves it as it was; a factor of E keeps the mean of the output over random choices. Step 0 keeps the
    function only if K = E, all weights are 1 / E (routers of zeros) and the factor is E. The bias of the out-projection
    is kept in every expert, for it is averaged.

    Args:
        partition: a key of `PARTITIONS`.

    Raises:
        ValueError: when E does not divide I, or an option is at fault.
    """
    factor = _checked("rescale", rescale)
    sets = _parts(sources[0], num_experts, partition, generator)
    return LayerTensors(_shards(sources[0], sets, num_experts / num_experts_per_tok if factor is None else factor))


def granular(
    sources: Sequence[FFNTensors],
    num_experts: int,
    generator: torch.Generator,
    *,
    num_experts_per_tok: int,
    granularity: int = 2,
    weighting: str = "post_softmax",
    spread: int = 1,
) -> LayerTensors:
    """Virtual groups: E / G copies of the FFN, each cut into G experts of width I / G (He et al. 2024).

    Expert i holds shard i mod G of copy i // G, and the shards of a copy share one router row (`router_rows`). Their
    logits are equal, so the K best experts are K / G whole copies, and the experts' order keeps copies together when
    rows are equal too.
    A factor s makes up for what a shard weighs in the sum:

    - `"post_softmax"`, for weights that sum to 1 (`norm_topk_prob=True`): s = G. Exact whatever the rows.
    - `"pre_softmax"`, for `norm_topk_prob=False`: s = E * G / K. Exact where every probability is 1 / E, as with
      routers of zeros, and close to it for small router weights. (The paper writes E G^2 / K with E the copies.)

    The out-projection is multiplied by s^(1 / spread), and so is the in-projection if `spread` is not 1. NVIDIA's own
    is 3 for gated FFNs and squared ReLU, 2 for others; that is the factor s only for squared ReLU (3) and ReLU (2).
    The bias of the out-projection is multiplied by what all K experts of a token together lack of it: 1, or E / K.

    Args:
        granularity: G.
        weighting, spread: as above; a spread of 1 to 3.

    Raises:
        ValueError: when G does not divide I, E and K, or an option is at fault.
    """
    granularity, weighting = _checked("granularity", granularity), _checked("weighting", weighting)
    root = 1 / _checked("spread", spread)
    _check_groups(granularity, num_experts, num_experts_per_tok)
    lacking = 1.0 if weighting == "post_softmax" else num_experts / num_experts_per_tok
    factor = (granularity * lacking) ** root
    shards = _shards(sources[0], _parts(sources[0], granularity, "first", generator), factor, bias_factor=lacking)
    if spread != 1:
        shards = shards._replace(w_in=shards.w_in * factor, b_in=None if shards.b_in is None else shards.b_in * factor)
    groups = num_experts // granularity
    return LayerTensors(_each(shards, lambda tensor: tensor.repeat(groups, *(1,) * (tensor.ndim - 1))))


def shared(
    sources: Sequence[FFNTensors],
    num_experts: int,
    generator: torch.Generator,
    *,
    num_experts_per_tok: int,
    num_shared: int = 1,
    routed: str = "copy",
    partition: str = "first",
    rescale: float | None = None,
) -> LayerTensors:
    """Part of the neurons becomes a shared expert that every token passes; the rest becomes the routed experts.

    With `routed="copy"`, S + 1 sets of I / (S + 1) neurons: S are shared, and every expert is a copy of the last; step
    0 keeps the function if the combine weights sum to 1 and the shared output is not gated. With `"split"`, S + E sets
    of I / (S + E) neurons: S are shared, each expert has one; the out-projections of the experts are multiplied by
    `rescale` and the function is moved as by `split`. Of sets found by k-means, those with the largest neurons (by the
    sum of |in-rows| * |out-column|) are shared. The out-bias goes to the routed experts. After Qwen2-MoE (Yang et al.
    2024), whose shared experts are random shards, and LLaMA-MoE v2's residual expert.

    Args:
        num_shared: S, in expert widths.
        routed: `"copy"` or `"split"`.
        partition: a key of `PARTITIONS`; `"first"` shares the first neurons.
        rescale: as for `split`; None with copies.

    Raises:
        ValueError: when the number of sets does not divide I, or an option is at fault.
    """
    ffn = sources[0]
    num_shared, routed, factor = (
        _checked(name, value) for name, value in (("num_shared", num_shared), ("routed", routed), ("rescale", rescale))
    )
    whole = routed == "copy"
    if whole and factor is not None:
        raise ValueError(
            f"recipe_options: rescale must be None with routed 'copy', whose sum is exact, got {rescale!r}"
        )
    if factor is None:
        factor = 1.0 if whole else num_experts / num_experts_per_tok
    sets = _parts(ffn, num_shared + (1 if whole else num_experts), partition, generator)
    if partition == "kmeans":
        sets = sets[_sizes(ffn)[sets].sum(1).argsort(descending=True, stable=True)]
    always = _take(ffn, sets[:num_shared].flatten())
    always = always._replace(b_out=None if ffn.b_out is None else torch.zeros_like(ffn.b_out))
    if whole:
        return LayerTensors(_views(_take(ffn, sets[num_shared]), num_experts), always)
    return LayerTensors(_shards(ffn, sets[num_shared:], factor), always)


def merge(
    sources: Sequence[FFNTensors], num_experts: int, generator: torch.Generator, *, rest: str = "average"
) -> LayerTensors:
    """Expert i is the FFN of model i mod M: Branch-Train-MiX (Sukhbaatar et al. 2024).

    Step 0 keeps the function only if the models are equal.

    Args:
        rest: what becomes of everything else, the models' `"average"` or the `"first"` model's; no concern of the
            experts.

    Raises:
        ValueError: when the number of models does not divide E.
    """
    _checked("rest", rest)
    _check_models(num_experts, len(sources))
    experts = _each(sources[0], lambda tensor: tensor.new_empty(num_experts, *tensor.shape))
    # Model by model: a source may be read only now, and nothing here keeps it when the next one is.
    for number in range(len(sources)):
        _put(experts, slice(number, None, len(sources)), sources[number])
    return LayerTensors(experts)


def if_weights_sum_to_one(options: Mapping[str, Any], config: STMoEConfig) -> bool:
    """A `keeps_function` for experts that each compute the dense function."""
    return config.combine_weights_sum_to_one


def never(options: Mapping[str, Any], config: STMoEConfig) -> bool:
    """A `keeps_function` for experts that do not."""
    return False


def none(options: Mapping[str, Any], fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A `fields` for experts of the dense width, from which nothing follows."""
    return {}


def one_row_each(options: Mapping[str, Any], num_experts: int) -> Tensor:
    """A `router_rows` by which every expert has a router row of its own."""
    return torch.arange(num_experts)


class Recipe(NamedTuple):
    """A row of `RECIPES`.

    Attributes:
        function: takes the source models' FFNs of one layer, the number of experts, a generator and the options.
        keeps_function: whether step 0 is sure to compute the dense function, given the options and the mixture's
            config; what else happens to keep it, only the proof can say.
        fields: the fields of the mixture's config that follow from the options, the fields given, and the width of
            the dense FFN in neurons; ValueError when these do not go together.
        router_rows: int64 [E] from the options and E: for each expert the number of the router row that it gets, so
            that experts with the same number share one.
    """

    function: Callable[..., LayerTensors]
    keeps_function: Callable[[Mapping[str, Any], STMoEConfig], bool] = never
    fields: Callable[[Mapping[str, Any], Mapping[str, Any], int], dict[str, Any]] = none
    router_rows: Callable[[Mapping[str, Any], int], Tensor] = one_row_each

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


def _fields_of_split(options: Mapping[str, Any], fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    experts, _ = _sizes_given(fields)
    return {"moe_intermediate_size": _part_of(width, experts)}


def _fields_of_granular(options: Mapping[str, Any], fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    granularity = _checked("granularity", options.get("granularity", 2))
    _check_groups(granularity, *_sizes_given(fields))
    return {"moe_intermediate_size": _part_of(width, granularity)}


def _rows_of_granular(options: Mapping[str, Any], num_experts: int) -> Tensor:
    granularity = options.get("granularity", 2)
    return torch.arange(num_experts) // granularity * granularity


def _fields_of_shared(options: Mapping[str, Any], fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    num_shared, copies = _checked("num_shared", options.get("num_shared", 1)), options.get("routed", "copy") == "copy"
    parts = num_shared + (1 if copies else _sizes_given(fields)[0])
    return {"moe_intermediate_size": _part_of(width, parts), "num_shared_experts": num_shared}


def _of_whole_groups(options: Mapping[str, Any], config: STMoEConfig) -> bool:
    ties_stay = config.router_type in ("top_k", "noisy_top_k", "sigmoid_top_k") and config.n_group == 1
    exact = options.get("weighting", "post_softmax") == "post_softmax" and options.get("spread", 1) == 1
    return ties_stay and exact and config.combine_weights_sum_to_one


def _of_shared_and_copies(options: Mapping[str, Any], config: STMoEConfig) -> bool:
    copies = options.get("routed", "copy") == "copy"
    return copies and config.combine_weights_sum_to_one and not config.shared_expert_gate


RECIPES: dict[str, Recipe] = {
    "copy": Recipe(copy, if_weights_sum_to_one),
    "noise": Recipe(noise),
    "drop": Recipe(drop),
    "split": Recipe(split, fields=_fields_of_split),
    "granular": Recipe(granular, _of_whole_groups, _fields_of_granular, _rows_of_granular),
    "shared": Recipe(shared, _of_shared_and_copies, _fields_of_shared),
    "merge": Recipe(merge),
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
    """The recipe of that name, if it takes these options and each value is one that it may have.

    Raises:
        ValueError: when the name, an option or its value is at fault.
    """
    recipe = check_recipe(name, options)
    for option, value in options.items():
        _checked(option, value)
    return recipe


def _views(ffn: FFNTensors, count: int) -> ExpertTensors:
    """An FFN seen that many times, stacked, in one FFN's memory; not to be written to."""
    return _each(ffn, lambda tensor: tensor.expand(count, *tensor.shape))


def _each(ffn: FFNTensors | ExpertTensors, function: Callable[[Any], Tensor]) -> ExpertTensors:
    """Experts that a function makes of each tensor that there is."""
    return ExpertTensors(*(None if tensor is None else function(tensor) for tensor in ffn))  # type: ignore[arg-type]


#: Changes a weight in place, given its expert's generator, in the same state for each weight, and one of its own.
_Change = Callable[[Tensor, torch.Generator, torch.Generator], None]


def _varied(
    ffn: FFNTensors, num_experts: int, generator: torch.Generator, in_change: _Change, out_change: _Change
) -> ExpertTensors:
    """Copies of an FFN whose weights are changed when they are asked for."""
    # Of a seed PyTorch takes the lower 32 bits: two of the streams of a model may be one, two of an expert hardly.
    seeds = torch.randint(2**62, (num_experts, 3), generator=generator).tolist()

    def pieces(weight: Tensor, change: _Change, own: int) -> Pieces:
        def fill(expert: int, varied: Tensor) -> None:
            change(varied.copy_(weight), *(torch.Generator().manual_seed(seeds[expert][place]) for place in (0, own)))

        return Pieces(fill, weight, num_experts)

    w_in, w_out, b_in, b_out = ffn
    biases = (None if bias is None else bias.expand(num_experts, -1) for bias in (b_in, b_out))
    return ExpertTensors(pieces(w_in, in_change, 1), pieces(w_out, out_change, 2), *biases)


def _moments(matrix: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each neuron's weights, float64 [I], of a matrix with the neurons along an axis."""
    means, variances = [], []
    for block in matrix.split(max(1, _PIECE // matrix.shape[1 - axis]), dim=axis):
        mean = block.double().mean(1 - axis, keepdim=True)
        means.append(mean.flatten().cpu())
        variances.append((block.double() - mean).square_().mean(1 - axis).cpu())
    return torch.cat(means), torch.cat(variances)


def _mean_and_std(means: Tensor, variances: Tensor, each: int) -> tuple[float, float]:
    """Mean and (unbiased) standard deviation of all weights of some neurons, of which each has so many."""
    mean = means.mean()
    spread = (variances + (means - mean).square()).sum() * each  # the law of total variance
    return mean.item(), (spread / max(1, len(means) * each - 1)).sqrt().item()


def _draw_anew(matrix: Tensor, axis: int, neurons: Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    """Draw the weights of some neurons, which lie along an axis, from a normal distribution."""
    if axis == 0:
        blocks = [(matrix, chosen) for chosen in neurons.split(max(1, _PIECE // matrix.shape[1]))]
    else:
        blocks = [(rows, neurons) for rows in matrix.split(max(1, _PIECE // len(neurons)))]
    for block, chosen in blocks:
        shape = (len(chosen), block.shape[1]) if axis == 0 else (len(block), len(chosen))
        draw = normal(shape, mean, std, block.dtype, generator).to(block.device)
        if axis == 0:
            block.index_copy_(0, chosen.to(block.device), draw)
        else:  # `index_copy_` takes twice as long along the last axis
            block.scatter_(1, chosen.to(block.device).expand(len(block), -1), draw)


def _put(experts: ExpertTensors, which: slice, ffn: FFNTensors) -> None:
    """Make some of the experts copies of an FFN."""
    for whole, tensor in zip(experts, ffn, strict=True):
        if whole is not None and tensor is not None:
            whole[which] = tensor  # type: ignore[index]


def _width(ffn: FFNTensors) -> int:
    return ffn.w_out.shape[-1]


def _take(ffn: FFNTensors, neurons: Tensor) -> FFNTensors:
    """An FFN of some neurons of another, with its out-bias."""
    neurons = neurons.to(ffn.w_in.device)
    w_in, b_in = (
        None if tensor is None else tensor.unflatten(0, (-1, _width(ffn)))[:, neurons].flatten(0, 1)
        for tensor in (ffn.w_in, ffn.b_in)
    )
    return FFNTensors(w_in, ffn.w_out[:, neurons], b_in, ffn.b_out)  # type: ignore[arg-type]


def _shards(ffn: FFNTensors, sets: Tensor, factor: float, bias_factor: float = 1.0) -> ExpertTensors:
    """An expert for each set of neurons [n, width], the out-projection and its bias multiplied by the factors."""
    shards = [_take(ffn, neurons) for neurons in sets]
    w_in = torch.stack([shard.w_in for shard in shards])
    w_out = torch.stack([shard.w_out for shard in shards]) * factor
    if ffn.b_in is None or ffn.b_out is None:
        return ExpertTensors(w_in, w_out)
    b_in = torch.stack([shard.b_in for shard in shards])  # type: ignore[misc]
    return ExpertTensors(w_in, w_out, b_in, (ffn.b_out * bias_factor).repeat(len(sets), 1))


def _parts(ffn: FFNTensors, parts: int, partition: str, generator: torch.Generator) -> Tensor:
    """Sets of neurons, int64 [parts, I / parts]."""
    _part_of(_width(ffn), parts)
    return PARTITIONS[_checked("partition", partition)](ffn.w_in.unflatten(0, (-1, _width(ffn))), parts, generator)


def _sizes(ffn: FFNTensors) -> Tensor:
    """How large a neuron's part in the output can be: norm of its in-rows times norm of its out-column, [I]."""
    rows = ffn.w_in.float().unflatten(0, (-1, _width(ffn))).norm(dim=-1).prod(0)
    return (rows * ffn.w_out.float().norm(dim=0)).cpu()


def _part_of(width: int, parts: int) -> int:
    """The width of one of equal parts.

    Raises:
        ValueError: when there are no equal parts.
    """
    if width % parts:
        raise ValueError(
            f"recipe: the dense FFN's width must be a multiple of the {parts} parts that it is cut into, got {width}; "
            "choose num_experts or the recipe's options accordingly"
        )
    return width // parts


def _check_groups(granularity: int, experts: int, choices: int) -> None:
    for name, value in (("num_experts", experts), ("num_experts_per_tok", choices)):
        if value % granularity:
            raise ValueError(
                f"{name}: must be a multiple of the granularity {granularity}, so that whole copies are chosen, got "
                f"{value}"
            )


def _check_models(experts: int, models: int) -> None:
    if experts % models:
        raise ValueError(f"num_experts: must be a multiple of the {models} models that are merged, got {experts}")


def _sizes_given(fields: Mapping[str, Any]) -> tuple[int, int]:
    """E and K of the mixture's fields, which layers must share.

    Raises:
        ValueError: when they differ between layers.
    """
    sizes = []
    for name in ("num_experts", "num_experts_per_tok"):
        value = fields.get(name, getattr(STMoEConfig, name))
        each = set(value) if isinstance(value, list | tuple) else {value}
        if len(each) > 1:
            raise ValueError(f"{name}: must be the same in every layer for a recipe that cuts the FFN, got {value!r}")
        sizes.append(each.pop())
    return sizes[0], sizes[1]


def _number(rule: str, least: float, most: float) -> Callable[[str, Any], float]:
    """A check for real numbers (a bool is none) in a closed range; the message says `rule`."""

    def check(name: str, value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real:
            raise ValueError(f"recipe_options: {name} must be a real number, got {value!r}")
        if not least <= value <= most:  # NaN is in no range
            raise ValueError(f"recipe_options: {name} {rule}, got {value!r}")
        return float(value)

    return check


def _count(least: int, most: float) -> Callable[[str, Any], int]:
    """A check for whole numbers in a closed range."""

    def check(name: str, value: Any) -> int:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            upper = "" if most == float("inf") else f" and at most {most}"
            raise ValueError(f"recipe_options: {name} must be a whole number of at least {least}{upper}, got {value!r}")
        return int(value)

    return check


def _one_of(*values: Any) -> Callable[[str, Any], Any]:
    """A check for one of some values of one type."""

    def check(name: str, value: Any) -> Any:
        if type(value) is not type(values[0]) or value not in values:
            raise ValueError(f"recipe_options: {name} must be one of {', '.join(map(str, values))}, got {value!r}")
        return value

    return check


_LARGEST = torch.finfo(torch.float32).max
_POSITIVE = _number("must be finite and positive, or None", torch.finfo(torch.float32).tiny, _LARGEST)

#: What the options of all recipes may be; an option means the same in every recipe that has it.
_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "scale": _number("must be finite and not negative", 0, _LARGEST),
    "fraction": _number("must be in [0, 1]", 0, 1),
    "ratio": _number("must be in [0, 1]", 0, 1),
    "shared_set": _one_of(True, False),
    "partition": _one_of(*PARTITIONS),
    "rescale": lambda name, value: None if value is None else _POSITIVE(name, value),
    "granularity": _count(1, float("inf")),
    "weighting": _one_of("post_softmax", "pre_softmax"),
    "spread": _count(1, 3),
    "num_shared": _count(1, float("inf")),
    "routed": _one_of("copy", "split"),
    "rest": _one_of("average", "first"),
}


def _checked(name: str, value: Any) -> Any:
    """An option's value, if it is one that it may have.

    Raises:
        ValueError: with the option, the rule and the value.
    """
    return _OPTIONS[name](name, value)
