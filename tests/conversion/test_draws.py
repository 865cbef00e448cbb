"""Random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from st_moe.conversion import draws
from st_moe.conversion.draws import normal

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance_from_normal(values: Tensor, mean: float, std: float) -> float:
    """Kolmogorov-Smirnov statistic, times the square root of the number of values: over 1.95 in one case of 1000."""
    ranked = torch.special.ndtr((values.double().flatten() - mean) / std).sort().values
    steps = torch.arange(len(ranked) + 1, dtype=torch.float64) / len(ranked)
    return torch.maximum(steps[1:] - ranked, ranked - steps[:-1]).max().item() * len(ranked) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.02), (0.3, 0.5), (-4.0, 0.001)])
def test_values_are_normal(dtype: torch.dtype, mean: float, std: float) -> None:
    values = normal((101, 203), mean, std, dtype, generator())
    assert (values.dtype, values.shape) == (dtype, (101, 203))
    count, step = values.numel(), torch.finfo(dtype).eps * abs(mean)
    assert values.double().mean().item() == pytest.approx(mean, abs=4 * std / count**0.5 + step / 10)
    if step < std:  # or the dtype has no room for them
        assert values.double().std().item() == pytest.approx(std, rel=4 / (2 * count) ** 0.5 + (step / std) ** 2)
    if step < std / 50:
        assert distance_from_normal(values, mean, std) < 2.5
        # The negative control: other distributions of this mean and spread are told from it.
        uniform = (torch.rand(101, 203, generator=generator()) - 0.5) * 12**0.5 * std + mean
        assert distance_from_normal(uniform, mean, std) > 5
        assert distance_from_normal(values, mean + std / 8, std) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_level_is_as_likely(dtype: torch.dtype) -> None:
    """Sixteen bits of the generator are one value, and all of them count: to the tails, and on both sides."""
    values = normal((2**22,), 0.0, 1.0, dtype, generator()).double()
    assert values.max() == pytest.approx(4.3, abs=0.05)
    assert values.min() == pytest.approx(-4.3, abs=0.05)
    assert values.square().mean().item() == pytest.approx(1, abs=4 * (2 / 2**22) ** 0.5)
    for bound in (0.5, 1, 2, 3, 4):
        beyond = torch.special.ndtr(torch.tensor(-float(bound), dtype=torch.float64)).item()
        for side in (1, -1):
            found = (side * values > bound).double().mean().item()
            rounding = torch.finfo(dtype).eps * bound * torch.exp(torch.tensor(-(bound**2) / 2)).item()
            assert found == pytest.approx(beyond, abs=5 * (beyond / 2**22) ** 0.5 + rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_have_nothing_to_do_with_each_other(dtype: torch.dtype) -> None:
    """Four values come from one word of the generator."""
    values = normal((40_000,), 0.0, 1.0, dtype, generator()).double()
    for lag in range(1, 9):
        correlation = torch.corrcoef(torch.stack([values[lag:], values[:-lag]]))[0, 1]
        assert correlation.abs() < 4 / 40_000**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_on_the_cpu_whatever_the_default(dtype: torch.dtype) -> None:
    """Of the first caller too, for whom the levels are computed."""
    draws._normal_levels.cache_clear()
    with torch.device("meta"):
        first = normal((5,), 0.0, 1.0, dtype, generator())
    assert torch.equal(first, normal((5,), 0.0, 1.0, dtype, generator()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 0), (7, 11)], ids=str)
def test_the_seed_decides_whatever_the_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    first, again, other = (normal(shape, 1.0, 2.0, dtype, generator(seed)) for seed in (5, 5, 6))
    assert first.shape == shape
    assert torch.equal(first, again)
    assert first.numel() == 0 or not torch.equal(first, other)
