"""Recipes: what each does to which weights, against plain loops over experts and neurons."""

import inspect
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.quality import recipes as quality
from st_moe import STMoEConfig, STMoEForCausalLM, locate_ffns, prove_identity, upcycle
from st_moe.conversion import RECIPES, FFNTensors, recipes
from st_moe.conversion.partition import PARTITIONS, balanced_kmeans
from st_moe.conversion.recipes import (
    LayerTensors,
    Pieces,
    check_recipe,
    copy,
    drop,
    noise,
    read_ffn,
    try_recipe,
)
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import FAMILIES, LAYERS, dense_model, pair, token_ids

E, H, WIDTH = 4, 40, 60


def dense_ffn(gated: bool = True, bias: bool = False, dtype: torch.dtype = torch.float32) -> FFNTensors:
    """A dense FFN whose matrices differ in mean and spread, so that statistics tell them apart."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, mean: float, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    up = draw(WIDTH, H, mean=-2.0, std=0.1)
    w_in = torch.cat([draw(WIDTH, H, mean=1.0, std=0.5), up]) if gated else up
    w_out = draw(H, WIDTH, mean=5.0, std=2.0)
    if not bias:
        return FFNTensors(w_in, w_out)
    return FFNTensors(w_in, w_out, draw(len(w_in), mean=0.0, std=1.0), draw(H, mean=0.0, std=1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked(layer: LayerTensors) -> FFNTensors:
    """A layer's experts, all of them made."""
    return FFNTensors(*(part.stacked() if isinstance(part, Pieces) else part for part in layer.experts))


def matrices_by_neuron(w_in: Tensor, w_out: Tensor) -> list[Tensor]:
    """Gate (if any), up and down, each [width, H]: row i belongs to neuron i."""
    return [*w_in.split(WIDTH), w_out.T]


@pytest.mark.parametrize("name", ["copy", "noise", "drop", "merge"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_types_and_biases(name: str, gated: bool, bias: bool, dtype: torch.dtype) -> None:
    dense = dense_ffn(gated, bias, dtype)
    before = [None if tensor is None else tensor.clone() for tensor in dense]
    experts = stacked(RECIPES[name].function([dense], E, generator()))
    for ours, theirs, kept in zip(experts, dense, before, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert ours.shape == (E, *theirs.shape)
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        assert torch.equal(theirs, kept), "the dense weights moved"
        if name == "copy" or (theirs.ndim == 1 and name != "merge"):
            assert ours.stride(0) == 0, "equal experts need no memory of their own"
        else:
            assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
            assert ours.is_contiguous()
    if bias:
        assert experts.b_in is not None
        assert experts.b_out is not None
        for expert in range(E):
            assert torch.equal(experts.b_in[expert], dense.b_in)
            assert torch.equal(experts.b_out[expert], dense.b_out)


def test_copy_repeats_the_dense_ffn() -> None:
    dense = dense_ffn(bias=True)
    experts = copy([dense], E, generator()).experts
    for ours, theirs in zip(experts, dense, strict=True):
        for expert in range(E):
            assert torch.equal(ours[expert], theirs)
    experts.w_in[0] += 1
    assert torch.equal(experts.w_in[1], dense.w_in)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_noise_moves_a_fraction_of_the_weights(fraction: float) -> None:
    dense = dense_ffn(dtype=torch.float64)
    experts = stacked(noise([dense], E, generator(), scale=0.3, fraction=fraction))
    for ours, theirs in ((experts.w_in, dense.w_in), (experts.w_out, dense.w_out)):
        for expert in range(E):
            moved = ours[expert] - theirs
            chosen = moved != 0
            spread = (fraction * (1 - fraction) / chosen.numel()) ** 0.5
            assert abs(chosen.double().mean() - fraction) <= 4 * spread
            assert moved[chosen].mean().item() == pytest.approx(0, abs=4 * 0.3 / chosen.sum().item() ** 0.5)
            assert moved[chosen].std().item() == pytest.approx(0.3, rel=0.1)
        assert not torch.equal(ours[0], ours[1])
        overlap = ((ours[0] != theirs) & (ours[1] != theirs)).double().mean()
        assert overlap.item() == pytest.approx(fraction**2, abs=0.05)


def test_noise_beyond_the_dtype_leaves_the_other_weights_alone() -> None:
    dense = dense_ffn(dtype=torch.float16)
    experts = stacked(noise([dense], E, generator(), scale=1e6, fraction=0.5))
    kept = (experts.w_in == dense.w_in).double().mean()
    assert kept.item() == pytest.approx(0.5, abs=0.05)
    assert not experts.w_in.isnan().any()


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"fraction": 0.0}])
def test_noise_of_nothing_is_a_copy(options: dict[str, Any]) -> None:
    dense = dense_ffn()
    experts = stacked(noise([dense], E, generator(), **options))
    assert all(torch.equal(expert, dense.w_in) for expert in experts.w_in)
    assert all(torch.equal(expert, dense.w_out) for expert in experts.w_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("ratio", "count"), [(0.5, 30), (0.1, 6), (0.33, 19), (1.0, 60)])
def test_drop_redraws_whole_neurons(gated: bool, ratio: float, count: int, dtype: torch.dtype) -> None:
    dense = dense_ffn(gated, bias=True, dtype=dtype)
    experts = stacked(drop([dense], E, generator(), ratio=ratio))
    sets = []
    for expert in range(E):
        ours = matrices_by_neuron(experts.w_in[expert], experts.w_out[expert])
        theirs = matrices_by_neuron(dense.w_in, dense.w_out)
        per_matrix = []
        for new, old in zip(ours, theirs, strict=True):
            changed = [i for i in range(WIDTH) if not torch.equal(new[i], old[i])]
            # A neuron is redrawn entirely or not at all.
            assert all((new[i] != old[i]).float().mean() > 0.8 for i in changed)
            per_matrix.append(changed)
            replaced, drawn = old[changed].double(), new[changed].double()
            error = replaced.std() / len(changed) ** 0.5 / H**0.5
            assert (drawn.mean() - replaced.mean()).abs() <= 4 * error
            assert drawn.std().item() == pytest.approx(replaced.std().item(), rel=0.2)
            # Drawn anew, not shuffled or scaled: it has nothing to do with what was there.
            correlation = torch.corrcoef(torch.stack([replaced.flatten(), drawn.flatten()]))[0, 1]
            assert correlation.abs() <= 4 / replaced.numel() ** 0.5
        assert all(changed == per_matrix[0] for changed in per_matrix)
        assert len(per_matrix[0]) == count
        sets.append(tuple(per_matrix[0]))
    if ratio < 1:
        assert len(set(sets)) == E, "experts drop the same neurons"
        assert len({neuron for chosen in sets for neuron in chosen}) > count


@pytest.mark.parametrize("name", ["noise", "drop"])
def test_experts_are_made_one_at_a_time_in_any_order(name: str) -> None:
    made = RECIPES[name].function([dense_ffn()], E, generator()).experts
    for pieces, whole in zip(made[:2], stacked(RECIPES[name].function([dense_ffn()], E, generator()))[:2], strict=True):
        assert isinstance(pieces, Pieces)
        assert (len(pieces), pieces.shape, pieces.dtype) == (E, whole.shape, whole.dtype)
        for expert in (2, 0, 3, 2, 1):
            assert torch.equal(pieces[expert], whole[expert])
        assert pieces[0].untyped_storage().nbytes() == whole[0].nbytes
        for outside in (E, -1):
            with pytest.raises(IndexError):
                pieces[outside]


@pytest.mark.parametrize(("name", "options"), [("noise", {"fraction": 1.0}), ("drop", {"ratio": 1.0})])
def test_no_two_weights_are_drawn_alike(name: str, options: dict[str, Any]) -> None:
    """Neither those of one expert nor those of two: every weight of every expert has a stream of its own."""
    dense = dense_ffn()
    made = stacked(RECIPES[name].function([dense], E, generator(), **options))
    parts = [part if name == "drop" else part - own for part, own in zip(made[:2], dense[:2], strict=True)]
    drawn = torch.stack([expert.flatten()[: H * WIDTH] for part in parts for expert in part])
    correlation = torch.corrcoef(drawn) - torch.eye(2 * E)
    assert correlation.abs().max() <= 4.5 / (H * WIDTH) ** 0.5


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_neurons_are_those_of_their_weights(
    axis: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From means and variances of single neurons, taken block by block, for any set of them."""
    monkeypatch.setattr(recipes, "_PIECE", 130)  # blocks of 3 and of 4 neurons, and a rest
    matrix = (torch.randn(31, 40, generator=generator(), dtype=torch.float64) * torch.arange(1, 41) + 7).to(dtype)
    matrix = matrix if axis == 0 else matrix.T[:, :31].contiguous()
    means, variances = recipes._moments(matrix, axis)
    for count in (1, 2, 17, 31):
        neurons = torch.randperm(31, generator=generator(count))[:count]
        own = matrix.index_select(axis, neurons).double()
        mean, std = recipes._mean_and_std(means[neurons], variances[neurons], 40)
        assert mean == pytest.approx(own.mean().item(), rel=1e-12)
        assert std == pytest.approx(own.std().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_have_no_spread(dtype: torch.dtype) -> None:
    """A constant is drawn as itself: nothing is lost to rounding in what is subtracted from what."""
    dense = FFNTensors(torch.full((2 * WIDTH, H), 0.7, dtype=dtype), torch.full((H, WIDTH), -300.0, dtype=dtype))
    for ours, theirs in zip(stacked(drop([dense], E, generator()))[:2], dense[:2], strict=True):
        assert torch.equal(ours, theirs.expand(E, -1, -1))


@pytest.mark.parametrize("ratio", [0.0, 0.01])
def test_dropping_less_than_a_neuron_is_a_copy(ratio: float) -> None:
    dense = dense_ffn()
    experts = stacked(drop([dense], E, generator(), ratio=ratio))
    assert all(torch.equal(expert, dense.w_in) for expert in experts.w_in)
    assert all(torch.equal(expert, dense.w_out) for expert in experts.w_out)


def test_neurons_are_dropped_evenly() -> None:
    dense = dense_ffn(gated=False)
    experts = stacked(drop([dense], 400, generator(), ratio=0.5))
    redrawn = (experts.w_in != dense.w_in).any(-1).float().mean(0)
    assert redrawn.mean().item() == pytest.approx(0.5)
    assert (redrawn - 0.5).abs().max() <= 4.5 * 0.5 / 400**0.5


@pytest.mark.parametrize("name", ["noise", "drop"])
def test_the_generator_decides_and_nothing_else(name: str) -> None:
    dense = dense_ffn(bias=True)
    state = torch.get_rng_state()
    first, second = (stacked(RECIPES[name].function([dense], E, generator(3))) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    third, other = (stacked(RECIPES[name].function([dense], E, generator(seed))) for seed in (3, 4))
    for tensors in zip(first, second, third, strict=True):
        assert torch.equal(tensors[0], tensors[1])
        assert torch.equal(tensors[0], tensors[2])
    assert not torch.equal(first.w_in, other.w_in)
    assert not torch.equal(first.w_out, other.w_out)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("noise", {"scale": -0.1}, "recipe_options: scale must be finite and not negative, got -0.1"),
        ("noise", {"scale": float("inf")}, "recipe_options: scale must be finite and not negative, got inf"),
        ("noise", {"scale": float("nan")}, "recipe_options: scale must be finite and not negative, got nan"),
        ("noise", {"scale": 10**400}, "recipe_options: scale must be finite and not negative, got 1000"),
        ("noise", {"fraction": 1.5}, r"recipe_options: fraction must be in \[0, 1\], got 1.5"),
        ("noise", {"fraction": float("nan")}, "recipe_options: fraction must be"),
        ("drop", {"ratio": -0.5}, r"recipe_options: ratio must be in \[0, 1\], got -0.5"),
        ("drop", {"ratio": 1.01}, "recipe_options: ratio must be"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RECIPES[name].function([dense_ffn()], E, generator(), **options)


@pytest.mark.parametrize("value", ["x", "0.5", None, True, [0.5], 0.5j, torch.tensor(0.5)], ids=repr)
@pytest.mark.parametrize(("name", "option"), [("noise", "scale"), ("noise", "fraction"), ("drop", "ratio")])
def test_options_that_are_no_real_numbers_are_refused(name: str, option: str, value: Any) -> None:
    message = f"^recipe_options: {option} must be a real number, got {re.escape(repr(value))}$"
    with pytest.raises(ValueError, match=message):
        RECIPES[name].function([dense_ffn()], E, generator(), **{option: value})
    with pytest.raises(ValueError, match=message):
        try_recipe(name, {option: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
@pytest.mark.parametrize(("name", "option"), [("noise", "scale"), ("noise", "fraction"), ("drop", "ratio")])
def test_every_kind_of_real_number_is_the_same_option(name: str, option: str, value: Any) -> None:
    expected = stacked(RECIPES[name].function([dense_ffn()], E, generator(), **{option: 0.5}))
    found = stacked(RECIPES[name].function([dense_ffn()], E, generator(), **{option: value}))
    assert found.w_in.equal(expected.w_in)
    assert found.w_out.equal(expected.w_out)


def test_unknown_recipes_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe: must be one of copy, noise, drop, .*, got 'clone'"):
        check_recipe("clone", {})
    with pytest.raises(ValueError, match="recipe_options: 'drop' takes ratio, shared_set, got fraction, scale"):
        check_recipe("drop", {"scale": 1, "fraction": 0.5})
    for check in (check_recipe, try_recipe):
        with pytest.raises(ValueError, match="recipe_options: 'copy' takes no options, got ratio"):
            check("copy", {"ratio": 0.5})
    with pytest.raises(ValueError, match="recipe_options: 'drop' takes ratio, shared_set, got 1, rate"):
        check_recipe("drop", {"rate": 1, 1: 2})  # type: ignore[dict-item]
    config = STMoEConfig()
    assert check_recipe("noise", {"scale": 0.1}).keeps_function({"scale": 0.1}, config) is False
    assert check_recipe("copy", {}).keeps_function({}, config) is True
    assert check_recipe("copy", {}).keeps_function({}, STMoEConfig(norm_topk_prob=False)) is False


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_model_hold_its_dense_weights(family: str) -> None:
    """Through every layout: Conv1D, fused, loose in the layer, with and without gate and bias."""
    dense, sparse = pair(family)
    blocks = [module for module in sparse.modules() if isinstance(module, SparseBlock)]
    for location, block in zip(locate_ffns(dense), blocks, strict=True):
        read = read_ffn(location)
        held = block.experts.parameters_of_all()
        for ours, theirs in zip((held.w_in, held.w_out, held.b_in, held.b_out), read, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.shape == (4, *theirs.shape)
                assert all(torch.equal(ours[expert], theirs) for expert in range(4))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_drop_reaches_every_layout(family: str) -> None:
    """A redrawn neuron of a model is the same neuron of gate, up and down, however the dense model stores them."""
    dense, _ = pair(family)
    sparse = upcycle(dense, num_experts=3, recipe="drop", recipe_options={"ratio": 0.25}, verify=False)
    blocks = [module for module in sparse.modules() if isinstance(module, SparseBlock)]
    assert len(blocks) == LAYERS
    for location, block in zip(locate_ffns(dense), blocks, strict=True):
        old, width = read_ffn(location), location.intermediate_size
        held = block.experts.parameters_of_all()
        for expert in range(3):
            changed_in = (held.w_in[expert] != old.w_in).any(-1).view(-1, width)
            changed_out = (held.w_out[expert] != old.w_out).any(0)
            assert all(torch.equal(rows, changed_out) for rows in changed_in)
            assert changed_out.sum() == width // 4
            if held.b_in is not None:
                assert torch.equal(held.b_in[expert], old.b_in)


@pytest.mark.parametrize("recipe", ["noise", "drop"])
def test_a_layer_does_not_depend_on_the_layers_before(recipe: str) -> None:
    dense = dense_model("llama", num_hidden_layers=3)
    everywhere = upcycle(dense, num_experts=3, recipe=recipe, seed=5, verify=False)
    alone = upcycle(dense, num_experts=3, recipe=recipe, seed=5, sparse_layers=[2], verify=False)
    expected = everywhere.model.layers[2].mlp.state_dict()
    actual = alone.model.layers[2].mlp.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    first = everywhere.model.layers[0].mlp
    assert not torch.equal(first.gate.weight, everywhere.model.layers[2].mlp.gate.weight)
    dropped = [
        (layer.mlp.experts.down_proj[0] != location.module.down_proj.weight).any(0)
        for layer, location in zip(everywhere.model.layers, locate_ffns(dense), strict=True)
    ]
    assert recipe == "noise" or not torch.equal(dropped[0], dropped[2])


def made(name: str, dense: FFNTensors, choices: int = 2, seed: int = 0, **options: Any) -> LayerTensors:
    return RECIPES[name].make([dense], E, choices, generator(seed), options)


def run(ffn: FFNTensors, x: Tensor, gated: bool) -> Tensor:
    """An FFN with a SiLU, in float64."""
    w_in, w_out = ffn.w_in.double(), ffn.w_out.double()
    hidden = x @ w_in.T + (0 if ffn.b_in is None else ffn.b_in.double())
    if gated:
        gate, up = hidden.chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
    else:
        hidden = torch.nn.functional.silu(hidden)
    return hidden @ w_out.T + (0 if ffn.b_out is None else ffn.b_out.double())


def expert_of(experts: FFNTensors, number: int) -> FFNTensors:
    return FFNTensors(*(None if tensor is None else tensor[number] for tensor in experts))


def weighted(layer: LayerTensors, chosen: list[int], weights: list[float], x: Tensor, gated: bool) -> Tensor:
    """What a sparse layer gives one token: the weighted sum of its experts, and the shared one."""
    total = sum(w * run(expert_of(layer.experts, e), x, gated) for e, w in zip(chosen, weights, strict=True))
    return total if layer.shared is None else total + run(layer.shared, x, gated)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def neurons_of(expert: FFNTensors, dense: FFNTensors) -> list[int]:
    """The dense neuron that each neuron of an expert is, by its first row."""
    rows = dense.w_in[:WIDTH]
    found = [(rows == row).all(-1).nonzero().flatten().tolist() for row in expert.w_in[: expert.w_out.shape[1]]]
    assert all(len(matches) == 1 for matches in found)
    return [matches[0] for matches in found]


INPUTS = torch.randn(7, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KINDS = pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])


@pytest.mark.parametrize("gated", [True, False])
def test_drop_with_a_set_per_matrix(gated: bool) -> None:
    """As the published code does: the sets differ, so more neurons are touched than with one."""
    dense = dense_ffn(gated)
    experts = stacked(drop([dense], 100, generator(), ratio=0.5, shared_set=False))
    touched = []
    for expert in range(100):
        pairs = zip(
            matrices_by_neuron(experts.w_in[expert], experts.w_out[expert]),
            matrices_by_neuron(dense.w_in, dense.w_out),
            strict=True,
        )
        changed = torch.stack([(new != old).any(-1) for new, old in pairs])
        assert (changed.sum(1) == WIDTH // 2).all()
        touched.append(changed.any(0).float().mean())
    matrices = 3 if gated else 2
    assert torch.stack(touched).mean().item() == pytest.approx(1 - 0.5**matrices, abs=0.02)


@KINDS
@pytest.mark.parametrize("partition", PARTITIONS)
def test_split_gives_each_neuron_to_one_expert(gated: bool, bias: bool, partition: str) -> None:
    dense = dense_ffn(gated, bias)
    layer = made("split", dense, partition=partition, rescale=3.0)
    assert layer.shared is None
    assert RECIPES["split"].router_rows({}, E).tolist() == list(range(E))
    neurons = [neurons_of(expert_of(layer.experts, e), dense) for e in range(E)]
    assert sorted(neuron for own in neurons for neuron in own) == list(range(WIDTH))
    for expert, own in enumerate(neurons):
        alone = expert_of(layer.experts, expert)
        rows = torch.cat([torch.tensor(own) + part * WIDTH for part in range(2 if gated else 1)])
        assert torch.equal(alone.w_in, dense.w_in[rows])
        assert torch.equal(alone.w_out, dense.w_out[:, own] * 3)
        if bias:
            assert torch.equal(alone.b_in, dense.b_in[rows])
            assert torch.equal(alone.b_out, dense.b_out)
    in_order = neurons == [list(range(e * 15, e * 15 + 15)) for e in range(E)]
    assert in_order is (partition == "first")


@KINDS
def test_split_is_exact_only_for_equal_weights_of_all(gated: bool, bias: bool) -> None:
    dense = dense_ffn(gated, bias)
    expected, everything = run(dense, INPUTS, gated), list(range(E))
    layer = made("split", dense, choices=E, rescale=E)
    assert close(weighted(layer, everything, [1 / E] * E, INPUTS, gated), expected)
    assert not close(weighted(layer, everything, [0.4, 0.2, 0.2, 0.2], INPUTS, gated), expected, 1e-3)
    assert not close(weighted(layer, [0, 1], [0.5, 0.5], INPUTS, gated), expected, 1e-3)
    published = made("split", dense, choices=E)
    assert not close(weighted(published, everything, [1 / E] * E, INPUTS, gated), expected, 1e-3)


@pytest.mark.parametrize("choices", [1, 2, 4])
def test_split_rescales_by_experts_over_choices(choices: int) -> None:
    dense = dense_ffn()
    layer, plain = made("split", dense, choices), made("split", dense, choices, rescale=1)
    assert torch.equal(layer.experts.w_out, plain.experts.w_out * (E / choices))
    assert torch.equal(layer.experts.w_in, plain.experts.w_in)


@KINDS
@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_granular_groups_add_up(gated: bool, bias: bool, granularity: int) -> None:
    dense = dense_ffn(gated, bias)
    layer = made("granular", dense, choices=4, granularity=granularity)
    rows = RECIPES["granular"].router_rows({"granularity": granularity}, E)
    assert rows.tolist() == [i // granularity * granularity for i in range(E)]
    assert layer.experts.w_out.shape == (E, H, WIDTH // granularity)
    for expert in range(E):
        shard = range(expert % granularity * (WIDTH // granularity), (expert % granularity + 1) * WIDTH // granularity)
        assert neurons_of(expert_of(layer.experts, expert), dense) == list(shard)
    expected, copies = run(dense, INPUTS, gated), E // granularity
    for share in ([1.0] + [0.0] * (copies - 1), [1 / copies] * copies):
        weights = [share[e // granularity] / granularity for e in range(E)]
        assert close(weighted(layer, list(range(E)), weights, INPUTS, gated), expected)
    if granularity == 2:
        # A group that is torn apart is no copy.
        assert not close(weighted(layer, [0, 2], [0.5, 0.5], INPUTS, gated), expected, 1e-3)


@KINDS
@pytest.mark.parametrize("choices", [2, 4])
def test_granular_before_the_softmax_is_exact_for_equal_probabilities(gated: bool, bias: bool, choices: int) -> None:
    dense = dense_ffn(gated, bias)
    layer = made("granular", dense, choices, weighting="pre_softmax")
    expected, chosen = run(dense, INPUTS, gated), list(range(choices))
    assert torch.equal(layer.experts.w_out[0], dense.w_out[:, : WIDTH // 2] * (E * 2 / choices))
    assert close(weighted(layer, chosen, [1 / E] * choices, INPUTS, gated), expected)
    assert not close(weighted(layer, chosen, [0.3] * choices, INPUTS, gated), expected, 1e-3)
    rooted = made("granular", dense, choices, weighting="pre_softmax", spread=3)
    assert close(rooted.experts.w_in[0], layer.experts.w_in[0] * (E * 2 / choices) ** (1 / 3))
    assert close(rooted.experts.w_out[0], dense.w_out[:, : WIDTH // 2] * (E * 2 / choices) ** (1 / 3))
    assert not close(weighted(rooted, chosen, [1 / E] * choices, INPUTS, gated), expected, 1e-3)


@KINDS
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_and_copies_add_up(gated: bool, bias: bool, partition: str, num_shared: int) -> None:
    dense = dense_ffn(gated, bias)
    layer = made("shared", dense, num_shared=num_shared, partition=partition)
    assert layer.shared is not None
    width = WIDTH // (num_shared + 1)
    assert layer.shared.w_out.shape == (H, num_shared * width)
    always, routed = (neurons_of(ffn, dense) for ffn in (layer.shared, expert_of(layer.experts, 0)))
    assert sorted(always + routed) == list(range(WIDTH))
    expected = run(dense, INPUTS, gated)
    assert close(weighted(layer, [3, 1], [0.8, 0.2], INPUTS, gated), expected)
    assert not close(weighted(layer, [3, 1], [0.8, 0.1], INPUTS, gated), expected, 1e-3)
    alone = layer._replace(shared=layer.shared._replace(w_out=torch.zeros_like(layer.shared.w_out)))
    assert not close(weighted(alone, [3, 1], [0.8, 0.2], INPUTS, gated), expected, 1e-3)


@KINDS
def test_shared_and_shards(gated: bool, bias: bool) -> None:
    dense = dense_ffn(gated, bias)
    layer = made("shared", dense, choices=E, routed="split", rescale=E)
    assert layer.shared is not None
    pieces = [layer.shared, *(expert_of(layer.experts, e) for e in range(E))]
    neurons = [neurons_of(piece, dense) for piece in pieces]
    assert neurons == [list(range(i * 12, i * 12 + 12)) for i in range(5)]
    expected = run(dense, INPUTS, gated)
    assert close(weighted(layer, list(range(E)), [1 / E] * E, INPUTS, gated), expected)
    assert not close(weighted(layer, [0, 1], [0.5, 0.5], INPUTS, gated), expected, 1e-3)


def test_shared_takes_the_largest_cluster() -> None:
    dense = dense_ffn()
    large = torch.arange(0, WIDTH, 2)
    direction = torch.nn.functional.one_hot(torch.tensor(3), H).float()
    w_in = dense.w_in.clone()
    w_in[torch.cat([large, large + WIDTH])] = 50 * direction + torch.randn(WIDTH, H, generator=generator())
    layer = made("shared", dense._replace(w_in=w_in), partition="kmeans")
    assert layer.shared is not None
    assert sorted(neurons_of(layer.shared, dense._replace(w_in=w_in))) == large.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_balanced_kmeans_finds_planted_clusters(seed: int) -> None:
    centres = torch.randn(5, 8, generator=generator(seed)) * 10
    planted = torch.arange(5).repeat_interleave(9)[torch.randperm(45, generator=generator(seed))]
    points = centres[planted] + torch.randn(45, 8, generator=generator(seed + 10))
    labels, means = balanced_kmeans(points, 5, generator(seed))
    assert labels.bincount().tolist() == [9] * 5
    # The same sets, whatever they are called.
    assert torch.equal(labels[:, None] == labels, planted[:, None] == planted)
    for cluster in range(5):
        assert torch.allclose(means[cluster], points[labels == cluster].mean(0), atol=1e-5)


def test_balanced_kmeans_is_balanced_and_better_than_chance() -> None:
    points = torch.randn(103, 6, generator=generator())
    points[:60] += 4  # far more than a cluster holds
    labels, means = balanced_kmeans(points, 4, generator())
    assert labels.bincount(minlength=4).max() <= 26
    cost = (points - means[labels]).square().sum()
    drawn = torch.randperm(103, generator=generator()) % 4
    by_chance = sum((points[drawn == c] - points[drawn == c].mean(0)).square().sum() for c in range(4))
    assert cost < 0.75 * by_chance
    again, _ = balanced_kmeans(points, 4, generator())
    assert torch.equal(labels, again)
    for value in (1.0, float("nan"), float("inf"), 1e30):
        labels, _ = balanced_kmeans(torch.full((9, 3), value), 3, generator())
        assert labels.bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("split", {"partition": "graph"}, "partition must be one of first, random, kmeans, got 'graph'"),
        ("split", {"rescale": 0}, "rescale must be finite and positive, or None, got 0"),
        ("split", {"rescale": "x"}, "rescale must be a real number, got 'x'"),
        ("granular", {"granularity": 0}, "granularity must be a whole number of at least 1, got 0"),
        ("granular", {"granularity": 2.0}, "granularity must be a whole number"),
        ("granular", {"weighting": "none"}, "weighting must be one of post_softmax, pre_softmax, got 'none'"),
        ("granular", {"spread": 4}, "spread must be a whole number of at least 1 and at most 3, got 4"),
        ("shared", {"num_shared": True}, "num_shared must be a whole number of at least 1, got True"),
        ("shared", {"routed": 1}, "routed must be one of copy, split, got 1"),
        ("drop", {"shared_set": 1}, "shared_set must be one of True, False, got 1"),
        ("merge", {"rest": "last"}, "rest must be one of average, first, got 'last'"),
    ],
)
def test_faulty_options_are_refused_before_and_by_the_recipe(name: str, options: dict[str, Any], message: str) -> None:
    for attempt in (lambda: try_recipe(name, options), lambda: made(name, dense_ffn(), **options)):
        with pytest.raises(ValueError, match=f"recipe_options: {message}"):
            attempt()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rescale must be None with routed 'copy', whose sum is exact, got 2"):
        made("shared", dense_ffn(), rescale=2)
    with pytest.raises(ValueError, match=r"width must be a multiple of the 7 parts .*, got 60"):
        RECIPES["split"].make([dense_ffn()], 7, 2, generator(), {})
    with pytest.raises(ValueError, match=r"num_experts_per_tok: must be a multiple of the granularity 2.*, got 3"):
        made("granular", dense_ffn(), choices=3)
    with pytest.raises(ValueError, match=r"num_experts: must be a multiple of the granularity 3.*, got 4"):
        made("granular", dense_ffn(), choices=3, granularity=3)
    with pytest.raises(ValueError, match="num_experts: must be a multiple of the 3 models that are merged, got 4"):
        RECIPES["merge"].make([dense_ffn()] * 3, E, 2, generator(), {})


def test_every_option_has_its_rule() -> None:
    for name, recipe in RECIPES.items():
        for parameter in inspect.signature(recipe.function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
                try_recipe(name, {parameter.name: parameter.default})


EXACT = [
    ("granular", {"granularity": 2}, {"num_experts_per_tok": 2}),
    ("granular", {"granularity": 2}, {"num_experts_per_tok": 4}),
    ("granular", {"granularity": 4}, {"num_experts_per_tok": 4}),
    ("granular", {"granularity": 3}, {"num_experts": 9, "num_experts_per_tok": 6}),
    ("granular", {"granularity": 2}, {"router_type": "noisy_top_k"}),
    ("granular", {"granularity": 2}, {"router_type": "sigmoid_top_k"}),
    ("shared", {}, {}),
    ("shared", {"num_shared": 2, "partition": "random"}, {"num_experts_per_tok": 3}),
    ("shared", {"partition": "kmeans"}, {"ffn_after": True}),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize(("name", "options", "fields"), EXACT, ids=str)
def test_models_keep_the_function(family: str, name: str, options: dict[str, Any], fields: dict[str, Any]) -> None:
    dense = dense_model(family)
    sparse = upcycle(
        dense, **{"num_experts": 8, "recipe": name, "recipe_options": options, "router_std": 0.5, **fields}
    )
    assert RECIPES[name].keeps_function(options, sparse.config)
    assert sparse.identity_proof.max_relative_difference <= 1e-6
    # The negative control: two experts change places, which tears groups apart or leaves copies as they are.
    experts = sparse.base_model.sparse_blocks[0].experts
    with torch.no_grad():
        if name == "granular":
            experts.down_proj[[0, 1]] = experts.down_proj[[1, 0]]
        else:
            sparse.base_model.sparse_blocks[0].shared_experts.down_proj.weight.zero_()
    assert prove_identity(dense, sparse).max_relative_difference > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("split", {}, {}),
        ("split", {"partition": "kmeans"}, {}),
        ("granular", {"granularity": 2}, {"norm_topk_prob": False}),
        ("granular", {"granularity": 2, "spread": 3}, {}),
        ("granular", {"granularity": 2, "weighting": "pre_softmax"}, {"norm_topk_prob": False}),
        ("shared", {}, {"shared_expert_gate": True}),
        ("shared", {"routed": "split", "num_shared": 4}, {}),
        ("drop", {"shared_set": False}, {}),
    ],
    ids=str,
)
def test_models_that_are_moved_say_so(name: str, options: dict[str, Any], fields: dict[str, Any]) -> None:
    sparse = upcycle(
        dense_model("llama"),
        **{"num_experts": 8, "recipe": name, "recipe_options": options, "router_std": 1.0, **fields},
    )
    assert not RECIPES[name].keeps_function(options, sparse.config)
    assert not sparse.identity_proof.holds


@pytest.mark.parametrize(
    ("family", "spread", "wrong"),
    [("opt", 2, 3), ("nemotron", 3, 2), ("llama", 1, 3)],
    ids=["relu", "squared relu", "silu"],
)
def test_granular_with_unnormalised_weights_and_flat_routers(family: str, spread: int, wrong: int) -> None:
    """The root that a homogeneous activation asks for is exact; another is not, nor are routers that are not flat."""
    dense = dense_model(family)

    def moved(spread: int, router_init: str) -> float:
        options = {"granularity": 2, "weighting": "pre_softmax", "spread": spread}
        fields = {"num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": False, "router_init": router_init}
        sparse = upcycle(dense, recipe="granular", recipe_options=options, router_std=1.0, **fields)
        return sparse.identity_proof.max_relative_difference

    assert moved(spread, "zeros") <= 1e-6
    assert moved(wrong, "zeros") > 1e-4
    assert moved(spread, "normal") > 1e-2


def test_split_with_every_expert_and_flat_routers_is_exact() -> None:
    fields = {"num_experts": 4, "num_experts_per_tok": 4, "router_init": "zeros"}
    exact, published = (
        upcycle(dense_model("gpt2"), recipe="split", recipe_options=options, **fields).identity_proof
        for options in ({"rescale": 4}, {})
    )
    assert exact.max_relative_difference <= 1e-6
    assert not published.holds


def test_configs_follow_from_the_recipe() -> None:
    dense = dense_model("llama")
    made = [
        upcycle(dense, num_experts=4, recipe=name, recipe_options=options, verify=False).config
        for name, options in (("split", {}), ("granular", {}), ("shared", {"num_shared": 2}))
    ]
    assert [(c.moe_intermediate_size, c.num_shared_experts) for c in made] == [(12, 0), (24, 0), (16, 2)]
    upcycle(dense, num_experts=4, recipe="split", moe_intermediate_size=12, verify=False)
    with pytest.raises(ValueError, match="moe_intermediate_size: recipe 'split' makes it 12, got 24"):
        upcycle(dense, num_experts=4, recipe="split", moe_intermediate_size=24)
    with pytest.raises(ValueError, match="num_shared_experts: recipe 'shared' makes it 1, got 2"):
        upcycle(dense, num_experts=4, recipe="shared", num_shared_experts=2)
    with pytest.raises(ValueError, match="num_experts: must be the same in every layer"):
        upcycle(dense, num_experts=[4, 8], recipe="split")
    with pytest.raises(ValueError, match="num_experts_per_tok: must be a multiple of the granularity 4"):
        upcycle(dense, num_experts=8, recipe="granular", recipe_options={"granularity": 4})
    with pytest.raises(ValueError, match=r"recipe: 'split' needs FFNs that 3-D tensors can hold"):
        upcycle(dense_model("apertus"), num_experts=4, recipe="split")


@pytest.mark.parametrize("recipe", ["split", "granular", "shared"])
def test_new_recipes_save_and_load(recipe: str, tmp_path: Path) -> None:
    sparse = upcycle(dense_model("llama"), num_experts=4, recipe=recipe, verify=False)
    sparse.save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(token_ids()).logits, sparse(token_ids()).logits)


def test_an_identity_that_is_required_is_checked() -> None:
    dense = dense_model("llama")
    assert upcycle(dense, num_experts=4, require_identity=1e-5).identity_proof.holds
    with pytest.raises(RuntimeError, match=r"require_identity: must be at most 1e-05, but step 0: NOT equal"):
        upcycle(dense, num_experts=4, recipe="drop", require_identity=1e-5)
    with pytest.raises(ValueError, match=r"require_identity: .* needs verify=True"):
        upcycle(dense, num_experts=4, require_identity=1e-5, verify=False)
    with pytest.raises(ValueError, match="require_identity: must not be negative"):
        upcycle(dense, num_experts=4, require_identity=-1.0)
    proof = upcycle(dense, num_experts=4, proof_inputs=token_ids(3, 5)).identity_proof
    assert proof.num_tokens == 15


# ------------------------------------------------------------------------------------------------ the guide's figures


def test_the_guides_figures_start_where_the_recipes_say() -> None:
    blocks = torch.randint(0, quality.VOCAB, (4, quality.LENGTH), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dense = quality.dense_model()
    quality.train(dense, blocks, 3, seed=1)
    before = quality.held_out_loss(dense, blocks)
    for case in quality.CASES:
        start, end, active = quality.measure(dense, case, blocks, blocks, 1, seed=0)
        exact = case.recipe in ("copy", "granular") or (case.recipe == "shared" and "routed" not in case.options)
        assert (abs(start - before) < 1e-5) == exact, case
        assert end < start, case
        assert (active < dense.num_parameters()) == (case.recipe == "split" or "routed" in case.options)
    assert quality.held_out_loss(dense, blocks) == before, "the dense model is left as it is"
