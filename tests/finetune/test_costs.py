"""Costs against formulas written by hand."""

from __future__ import annotations

import pytest
from rich.console import Console

from st_moe import STMoEConfig
from st_moe.finetune.costs import cost_tables, count_costs

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "sparse_layers": [0, 2],
}
ATTENTION = 2 * 16 * 16 + 2 * 16 * 8
EXPERT = 3 * 16 * 24
ROUTER = 6 * 16
NORMS = 2 * 16


@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_formula(tied: bool) -> None:
    costs = count_costs(STMoEConfig(**SIZES, tie_word_embeddings=tied))
    embedding = 50 * 16
    outside = embedding * (1 if tied else 2) + 16
    sparse, dense = ATTENTION + ROUTER + NORMS, ATTENTION + EXPERT + NORMS
    assert costs.total == outside + 2 * (sparse + 6 * EXPERT) + dense
    assert costs.active == outside + 2 * (sparse + 3 * EXPERT) + dense
    # The head multiplies; an embedding is looked up, and norms are no matrix products.
    multiplied = embedding + 2 * (ATTENTION + ROUTER + 3 * EXPERT) + ATTENTION + EXPERT
    assert costs.forward_flops == 2 * multiplied
    assert costs.training_flops == 6 * multiplied
    assert costs.inference_bytes == costs.total * 4
    assert costs.training_bytes == costs.total * 16


def test_half_precision_halves_the_weights() -> None:
    whole, half = (count_costs(STMoEConfig(**SIZES, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert half.inference_bytes * 2 == whole.inference_bytes
    assert half.training_bytes == whole.training_bytes


def test_tables_name_layers_and_fit_eighty_columns() -> None:
    config = STMoEConfig(**SIZES)
    console = Console(width=80, record=True)
    for table in cost_tables(config, count_costs(config), per_layer=True):
        console.print(table)
    text = console.export_text()
    assert text.count("sparse") >= 2
    assert "layer 1" in text
    assert "dense" in text
    assert max(map(len, text.splitlines())) <= 80
