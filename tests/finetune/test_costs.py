"""What a mixture costs, against formulas by hand and against FLOPs counted while a model runs."""

from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from st_moe import STMoEConfig, STMoEForCausalLM, STMoEForImageClassification, STMoEForSequenceClassification
from st_moe.finetune.costs import _BYTES, _COUNTS, _FLOPS, Costs, Part, _scaled, cost_tables, count_costs
from tests.families import FAMILIES, HIDDEN, LAYERS, VOCAB, WIDTH, mixture, tiny_config, token_ids

EXPERTS, CHOICES = 5, 3
H, I, V = HIDDEN, WIDTH, VOCAB  # noqa: E741  (the names of sizes in formulas)


def config_of(family: str, **fields: Any) -> STMoEConfig:
    settings = {"num_experts": EXPERTS, "num_experts_per_tok": CHOICES, **fields}
    return STMoEConfig.from_dense(tiny_config(family), **settings)


def parts_of(costs: Costs) -> dict[str, Part]:
    return {part.name: part for part in costs.parts}


def test_llama_by_hand() -> None:
    costs = count_costs(config_of("llama", sparse_layers=[1]))
    attention = H * H + 2 * H * (H // 2) + H * H  # 4 query heads and 2 key-value heads of 8
    ffn, norms, router = 3 * H * I, 2 * H, EXPERTS * H
    assert parts_of(costs) == {
        # The embedding is looked up and multiplies nothing; the head does.
        "embeddings and head": Part("embeddings and head", "", 2 * V * H + H, 2 * V * H + H, V * H),
        "layer 0": Part("layer 0", "dense", attention + ffn + norms, attention + ffn + norms, attention + ffn),
        "layer 1": Part(
            "layer 1",
            "sparse",
            attention + norms + router + EXPERTS * ffn,
            attention + norms + router + CHOICES * ffn,
            attention + router + CHOICES * ffn,
        ),
    }
    assert costs.forward_flops == 2 * (V * H + 2 * attention + ffn + router + CHOICES * ffn)
    assert costs.training_flops == 3 * costs.forward_flops
    assert costs.inference_bytes == 4 * costs.total
    assert costs.training_bytes == 16 * costs.total


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_is_counted_once_and_multiplies(tied: bool) -> None:
    dense = tiny_config("llama", tie_word_embeddings=tied)
    costs = count_costs(STMoEConfig.from_dense(dense, num_experts=EXPERTS, num_experts_per_tok=CHOICES))
    outside = (1 if tied else 2) * V * H + H
    assert parts_of(costs)["embeddings and head"] == Part("embeddings and head", "", outside, outside, V * H)


def test_gpt2_by_hand() -> None:
    """Tied embeddings, a table of positions, transposed weights, and biases that cost no product."""
    costs = count_costs(config_of("gpt2"))
    attention, ffn, router = 4 * H * H, 2 * H * I, EXPERTS * H
    biases, norms = 4 * H, 4 * H
    outside = parts_of(costs)["embeddings and head"]
    assert outside == Part("embeddings and head", "", V * H + 64 * H + 2 * H, V * H + 64 * H + 2 * H, V * H)
    layer = attention + biases + norms + router
    assert parts_of(costs)["layer 1"] == Part(
        "layer 1",
        "sparse",
        layer + EXPERTS * (ffn + I + H),
        layer + CHOICES * (ffn + I + H),
        attention + router + CHOICES * ffn,
    )


@pytest.mark.parametrize(
    ("fields", "extra", "matmul"),
    [
        ({"num_shared_experts": 2}, 2 * 3 * H * I, 2 * 3 * H * I),
        ({"ffn_before": True}, 3 * H * I + H, 3 * H * I),
        # One vector per expert, of which CHOICES are used; it scales and multiplies no matrix.
        ({"multiplicative_bias": True}, CHOICES * I, 0),
    ],
    ids=str,
)
def test_extra_parts_are_active(fields: dict[str, Any], extra: int, matmul: int) -> None:
    plain, more = (parts_of(count_costs(config_of("llama", **given)))["layer 0"] for given in ({}, fields))
    assert more.active - plain.active == extra
    assert more.matmul - plain.matmul == matmul


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_the_model(family: str) -> None:
    model = mixture(family, num_experts=EXPERTS, num_experts_per_tok=CHOICES)
    costs = count_costs(model.config)
    assert costs.total == sum(parameter.numel() for parameter in model.parameters())
    assert costs.active == model.config.num_parameters(active=True)
    assert [part.name for part in costs.parts if part.kind == "sparse"] == [f"layer {index}" for index in range(LAYERS)]
    assert costs.active < costs.total


def products_of(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """FLOPs of the products with weights in a forward pass; attention's scores are batched products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_those_of_a_run(family: str) -> None:
    model = mixture(family, num_experts=EXPERTS, num_experts_per_tok=CHOICES)
    model.set_experts_implementation("eager")
    ids = token_ids()
    assert products_of(model, ids) == ids.numel() * count_costs(model.config).forward_flops


def test_experts_as_modules_are_shared_out_as_a_whole() -> None:
    """Apertus' activation has parameters of its own: single numbers, which no K / E divides."""
    dense = tiny_config("apertus", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    costs = [
        count_costs(STMoEConfig.from_dense(dense, num_experts=EXPERTS, num_experts_per_tok=choices))
        for choices in (CHOICES, CHOICES + 1)
    ]
    one_expert = 2 * H * I + 2
    for name in ("layer 0", "layer 1"):
        fewer, more = (parts_of(count)[name] for count in costs)
        assert more.active - fewer.active == one_expert
        assert more.matmul - fewer.matmul == 2 * H * I
        assert fewer.total == fewer.active + (EXPERTS - CHOICES) * one_expert


def test_a_classifier_is_counted_with_its_own_head() -> None:
    model = mixture(auto=STMoEForSequenceClassification, num_labels=3)
    model.config.architectures = ["STMoEForSequenceClassification"]
    costs = count_costs(model.config)
    assert costs.total == sum(parameter.numel() for parameter in model.parameters())
    assert parts_of(costs)["embeddings and head"].matmul == 3 * H


def test_an_image_model_is_counted_with_its_own_head() -> None:
    model = mixture("vit", auto=STMoEForImageClassification, num_labels=3)
    costs = count_costs(model.config)
    assert costs.total == sum(parameter.numel() for parameter in model.parameters())
    assert costs.active == model.config.num_parameters(active=True)
    assert costs.active < costs.total


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4), (None, 4)])
def test_weights_take_the_memory_of_their_dtype(dtype: torch.dtype | None, size: int, tmp_path: Any) -> None:
    model = STMoEForCausalLM(config_of("llama"))
    model.config.dtype = dtype
    model.config.save_pretrained(tmp_path)
    costs = count_costs(STMoEConfig.from_pretrained(tmp_path))
    assert costs.inference_bytes == size * costs.total
    assert costs.training_bytes == 16 * costs.total


def test_nothing_is_allocated() -> None:
    """Sizes of a published model: Mixtral 8x7B has 46.7 billion parameters, 12.9 billion of them active."""
    config = STMoEConfig(
        dense_model_type="mistral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_experts=8,
        num_experts_per_tok=2,
    )
    costs = count_costs(config)
    assert (costs.total, costs.active) == (46_702_792_704, 12_879_925_248)


@pytest.mark.parametrize(
    ("value", "units", "shown"),
    [
        (0, _COUNTS, ("0", "")),
        (999, _COUNTS, ("999", "")),
        (1_000, _COUNTS, ("1.00", "thousand")),
        (49_568, _COUNTS, ("49.6", "thousand")),
        (999_499, _COUNTS, ("999", "thousand")),
        (999_500, _COUNTS, ("1.00", "million")),
        (9_994_999, _COUNTS, ("9.99", "million")),
        (9_996_000, _COUNTS, ("10.0", "million")),
        (99_960_000, _COUNTS, ("100", "million")),
        (46_702_792_704, _COUNTS, ("46.7", "billion")),
        (1.2e12, _COUNTS, ("1.20", "trillion")),
        (3.4e15, _COUNTS, ("3,400", "trillion")),
        (24_830, _FLOPS, ("24.8", "kFLOP")),
        (25.8e9, _FLOPS, ("25.8", "GFLOP")),
        (1023, _BYTES, ("1,023", "bytes")),
        (1024, _BYTES, ("1.00", "KiB")),
        (1_000_000, _BYTES, ("977", "KiB")),
        (3 * 1024**3 // 2, _BYTES, ("1.50", "GiB")),
        (7 * 1024**4, _BYTES, ("7.00", "TiB")),
    ],
)
def test_units_fit_the_value(value: float, units: Any, shown: tuple[str, str]) -> None:
    assert _scaled(value, units) == shown


def rendered(config: STMoEConfig, per_layer: bool) -> str:
    stream = StringIO()
    console = Console(file=stream, width=80)
    for table in cost_tables(config, count_costs(config), per_layer):
        console.print(table)
    return stream.getvalue()


def test_table_fits_a_terminal() -> None:
    config = config_of("llama", sparse_layers=[1])
    text = rendered(config, per_layer=False)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    costs = count_costs(config)
    assert rows == [
        ["parameters", f"{costs.total / 1e3:.1f}", "thousand", ""],
        ["active parameters", f"{costs.active / 1e3:.1f}", "thousand per token", ""],
        ["compute, inference", f"{costs.forward_flops / 1e3:.1f}", "kFLOP per token", "attention scores"],
        ["compute, training", f"{costs.training_flops / 1e3:.0f}", "kFLOP per token", "attention scores"],
        ["memory, inference", f"{costs.total * 4 / 1024:.0f}", "KiB (float32)", "KV cache, activations"],
        ["memory, training", f"{costs.total * 16 / 1024:.0f}", "KiB (float32, AdamW)", "activations"],
    ]
    assert "llama mixture: 5 experts, 3 per token, 1 of 2 layers sparse" in text
    assert "per layer" not in text


def test_layer_table_sums_to_the_whole() -> None:
    config = config_of("llama", sparse_layers=[1])
    text = rendered(config, per_layer=True)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.split("per layer")[1].splitlines()]
    rows = [row for row in rows if row]
    assert [row[:2] for row in rows] == [["embeddings and head", ""], ["layer 0", "dense"], ["layer 1", "sparse"]]
    shown = [float(row[2].removesuffix(" thousand")) for row in rows]
    assert sum(shown) == pytest.approx(count_costs(config).total / 1e3, abs=0.2)
    assert max(map(len, text.splitlines())) <= 80
