"""Recipes: what each does to which weights, against plain loops over experts and neurons."""

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from st_moe import STMoEConfig, locate_ffns, upcycle
from st_moe.conversion import RECIPES, FFNTensors
from st_moe.conversion.recipes import check_recipe, copy, drop, noise, read_ffn, try_recipe
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import FAMILIES, LAYERS, dense_model, pair

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


def matrices_by_neuron(w_in: Tensor, w_out: Tensor) -> list[Tensor]:
    """Gate (if any), up and down, each [width, H]: row i belongs to neuron i."""
    return [*w_in.split(WIDTH), w_out.T]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_types_and_biases(name: str, gated: bool, bias: bool, dtype: torch.dtype) -> None:
    dense = dense_ffn(gated, bias, dtype)
    before = [None if tensor is None else tensor.clone() for tensor in dense]
    experts = RECIPES[name].function([dense], E, generator()).experts
    for ours, theirs, kept in zip(experts, dense, before, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert ours.shape == (E, *theirs.shape)
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        assert torch.equal(theirs, kept), "the dense weights moved"
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
    experts = noise([dense], E, generator(), scale=0.3, fraction=fraction).experts
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


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"fraction": 0.0}])
def test_noise_of_nothing_is_a_copy(options: dict[str, Any]) -> None:
    dense = dense_ffn()
    experts = noise([dense], E, generator(), **options).experts
    assert all(torch.equal(expert, dense.w_in) for expert in experts.w_in)
    assert all(torch.equal(expert, dense.w_out) for expert in experts.w_out)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("ratio", "count"), [(0.5, 30), (0.1, 6), (0.33, 19), (1.0, 60)])
def test_drop_redraws_whole_neurons(gated: bool, ratio: float, count: int) -> None:
    dense = dense_ffn(gated, bias=True)
    experts = drop([dense], E, generator(), ratio=ratio).experts
    sets = []
    for expert in range(E):
        ours = matrices_by_neuron(experts.w_in[expert], experts.w_out[expert])
        theirs = matrices_by_neuron(dense.w_in, dense.w_out)
        per_matrix = []
        for new, old in zip(ours, theirs, strict=True):
            changed = [i for i in range(WIDTH) if not torch.equal(new[i], old[i])]
            # A neuron is redrawn entirely or not at all.
            assert all((new[i] != old[i]).float().mean() > 0.95 for i in changed)
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


@pytest.mark.parametrize("ratio", [0.0, 0.01])
def test_dropping_less_than_a_neuron_is_a_copy(ratio: float) -> None:
    dense = dense_ffn()
    experts = drop([dense], E, generator(), ratio=ratio).experts
    assert all(torch.equal(expert, dense.w_in) for expert in experts.w_in)
    assert all(torch.equal(expert, dense.w_out) for expert in experts.w_out)


def test_neurons_are_dropped_evenly() -> None:
    dense = dense_ffn(gated=False)
    experts = drop([dense], 400, generator(), ratio=0.5).experts
    redrawn = (experts.w_in != dense.w_in).any(-1).float().mean(0)
    assert redrawn.mean().item() == pytest.approx(0.5)
    assert (redrawn - 0.5).abs().max() <= 4.5 * 0.5 / 400**0.5


@pytest.mark.parametrize("name", ["noise", "drop"])
def test_the_generator_decides_and_nothing_else(name: str) -> None:
    dense = dense_ffn(bias=True)
    state = torch.get_rng_state()
    first, second = (RECIPES[name].function([dense], E, generator(3)).experts for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    third, other = (RECIPES[name].function([dense], E, generator(seed)).experts for seed in (3, 4))
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
    expected = RECIPES[name].function([dense_ffn()], E, generator(), **{option: 0.5}).experts
    found = RECIPES[name].function([dense_ffn()], E, generator(), **{option: value}).experts
    assert found.w_in.equal(expected.w_in)
    assert found.w_out.equal(expected.w_out)


def test_unknown_recipes_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="recipe: must be one of copy, noise, drop, got 'clone'"):
        check_recipe("clone", {})
    with pytest.raises(ValueError, match="recipe_options: 'drop' takes ratio, got fraction, scale"):
        check_recipe("drop", {"scale": 1, "fraction": 0.5})
    for check in (check_recipe, try_recipe):
        with pytest.raises(ValueError, match="recipe_options: 'copy' takes no options, got ratio"):
            check("copy", {"ratio": 0.5})
    with pytest.raises(ValueError, match="recipe_options: 'drop' takes ratio, got 1, rate"):
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
