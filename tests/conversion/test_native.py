"""Native export and import: every pair of the table holds the same function and the same bits, and says no in words."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from benchmarks import serving
from st_moe import STMoEForCausalLM, STMoEForSequenceClassification, cli, upcycle
from st_moe.conversion import (
    export_dense,
    export_native,
    export_per_expert,
    import_checkpoint,
    import_native,
    native,
    read_per_expert,
    to_dense,
)
from st_moe.conversion.native_targets import TARGETS, NativeTarget
from tests.families import (
    FAMILIES,
    TOLERANCE,
    dense_model,
    favour_experts,
    mixture,
    perturb,
    relative_difference,
    tiny_tokenizer,
    token_ids,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "export.md"
# Older hosts lack some architectures.
ROWS = [row for row in TARGETS if row.name in CONFIG_MAPPING]
PAIRS = [(row.name, name) for row in ROWS for name in row.family_names if name in CONFIG_MAPPING]

# What a family needs to be small, or to be one that targets can hold.
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "youtu": {
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "olmo3": {"layer_types": ["full_attention"] * 2},
    "seed_oss": {"attention_out_bias": False},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "granite_swa": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
}


def row_of(target: str) -> NativeTarget:
    return native.native_target(target)


def mixture_for(target: str, family: str, **fields: Any) -> STMoEForCausalLM:
    """A mixture that the target can hold; experts differ, routers are sharp, selection biases are not zero."""
    model = mixture(family, **{"router_type": row_of(target).router_type, **OWN_FIELDS.get(family, {}), **fields})
    favour_experts(model)
    return model


def logits(model: Any, length: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(token_ids(2, length)).logits.float()


def native_model(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------------- every pair


@pytest.mark.parametrize(("target", "family"), PAIRS)
def test_export_holds_the_function_and_comes_back_bit_by_bit(target: str, family: str, tmp_path: Path) -> None:
    model = mixture_for(target, family)
    proof = export_native(model, target, tmp_path / "native")
    assert proof.max_relative_difference <= TOLERANCE
    held = native_model(tmp_path / "native")
    assert held.config.model_type == target
    assert not type(held).__module__.startswith("st_moe")
    assert relative_difference(logits(held), logits(model)) <= TOLERANCE
    back = import_native(tmp_path / "native", family=family)
    assert back.config.dense_model_type == family
    assert same(back.state_dict(), model.state_dict())
    assert relative_difference(logits(back), logits(model)) <= TOLERANCE
    # Negative control: the comparison tells experts apart.
    with torch.no_grad():
        experts = back.base_model.sparse_blocks[0].experts
        experts.down_proj[[0, 1]] = experts.down_proj[[1, 0]]
    assert relative_difference(logits(back), logits(model)) > 10 * TOLERANCE


@pytest.mark.parametrize(("target", "family"), PAIRS)
def test_export_of_a_folder_is_proven_from_the_disk(
    target: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files and nearly the same figure as of the model in memory, one module in memory at a time."""
    model = mixture_for(target, family)
    model.save_pretrained(tmp_path / "moe")
    whole = export_native(model, target, tmp_path / "from memory")
    proven: list[Any] = []
    real = native.outputs_of

    def watched(each: Any, *inputs: Any) -> Any:
        proven.append({parameter.device.type for parameter in each.parameters()})
        return real(each, *inputs)

    monkeypatch.setattr(native, "outputs_of", watched)
    proof = export_native(tmp_path / "moe", target, tmp_path / "from disk")
    assert proven == [{"meta"}, {"meta"}]
    assert proof.max_relative_difference <= TOLERANCE
    assert proof.sparse_loss == pytest.approx(whole.sparse_loss, rel=1e-6)
    weights = [(tmp_path / way / "model.safetensors").read_bytes() for way in ("from memory", "from disk")]
    assert weights[0] == weights[1]
    assert contents(tmp_path / "from disk") == contents(tmp_path / "from memory")


@pytest.mark.parametrize("kind", ["swapped", "nan"])
def test_a_wrong_translation_of_a_folder_is_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = native._translated

    def wrong(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = original(*args, **kwargs)
        name = "model.layers.1.mlp.experts.down_proj"
        tensors[name] = tensors[name][[1, 0, 2, 3]] if kind == "swapped" else tensors[name] * torch.nan
        return tensors

    monkeypatch.setattr(native, "_translated", wrong)
    mixture().save_pretrained(tmp_path / "moe")
    message = r"must have equal logits, but they differ by " + (r"\d" if kind == "swapped" else "nan")
    with pytest.raises(ValueError, match=message):
        export_native(tmp_path / "moe", "mixtral", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def random_native(target: str) -> PreTrainedModel:
    """A native mixture as its own class draws it, around the first family of its row, moved off its initial values."""
    row = row_of(target)
    fields: dict[str, Any] = {"num_shared_experts": 1 if row.shared else 0}
    fields["shared_expert_gate"] = bool(row.shared and row.shared.gated)
    ours = mixture_for(target, row.families[0].name, **fields)
    config = native._native_config(row, row.families[0], ours.config)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    perturb(model, seed=4)
    # Loading a Youtu model sets this row to zero, whatever the file says.
    model.get_input_embeddings().weight.data[0].zero_()
    for name, parameter in model.named_parameters():
        if any(name.endswith(zero) for zero in row.zeros):
            parameter.data.zero_()
    return model


def test_a_qwen2_moe_without_biases_is_read_and_gets_zeros_when_it_is_written(tmp_path: Path) -> None:
    config = random_native("qwen2_moe").config
    config.qkv_bias = False
    source = AutoModelForCausalLM.from_config(config).eval()
    perturb(source, seed=4)
    ours = import_native(source)
    assert ours.config.dense_model_type == "llama"
    assert relative_difference(logits(ours), logits(source)) <= TOLERANCE
    export_native(ours, "qwen2_moe", tmp_path / "again")
    again = native_model(tmp_path / "again")
    state = again.state_dict()
    assert same({name: state[name] for name in source.state_dict()}, source.state_dict())
    biases = [name for name in state if name not in source.state_dict()]
    assert len(biases) == 3 * config.num_hidden_layers
    assert not any(state[name].any() for name in biases)
    assert relative_difference(logits(again), logits(source)) <= TOLERANCE


@pytest.mark.parametrize("target", [row.name for row in ROWS])
def test_import_holds_the_function_and_goes_back_bit_by_bit(target: str, tmp_path: Path) -> None:
    source = random_native(target)
    source.save_pretrained(tmp_path / "source")
    ours = import_native(tmp_path / "source")
    assert isinstance(ours, STMoEForCausalLM)
    assert ours.config.dense_model_type == row_of(target).families[0].name
    assert ours.config.num_shared_experts == (1 if row_of(target).shared else 0)
    assert relative_difference(logits(ours), logits(source)) <= TOLERANCE
    export_native(ours, target, tmp_path / "again")
    assert same(native_model(tmp_path / "again").state_dict(), source.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    assert same(STMoEForCausalLM.from_pretrained(tmp_path / "ours").state_dict(), ours.state_dict())


@pytest.mark.parametrize("target", [row.name for row in ROWS if row.shared])
@pytest.mark.parametrize("count", [1, 2])
def test_shared_experts_find_their_place(target: str, count: int, tmp_path: Path) -> None:
    row = row_of(target)
    assert row.shared is not None
    fields = {"num_shared_experts": count, "shared_expert_gate": row.shared.gated, "moe_intermediate_size": 20}
    model = mixture_for(target, row.families[0].name, **fields)
    if count > 1 and not row.shared.field:
        with pytest.raises(ValueError, match="num_shared_experts: must be 1, got 2"):
            export_native(model, target, tmp_path / "native")
        return
    export_native(model, target, tmp_path / "native")
    assert relative_difference(logits(native_model(tmp_path / "native")), logits(model)) <= TOLERANCE
    assert same(import_native(tmp_path / "native").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("qwen2_moe", [0, 2]),
        ("qwen3_moe", [1]),
        ("glm4_moe", [1, 2]),
        ("dots1", [2]),
        ("deepseek_v3", [1, 2]),
        ("glm4_moe_lite", [0, 2]),
        ("cohere2_moe", [1]),
        ("ernie4_5_moe", [1, 2]),
        ("ernie4_5_moe", [0]),
    ],
)
def test_dense_layers_stay_dense(target: str, layers: list[int], tmp_path: Path) -> None:
    family = row_of(target).families[0].name
    own = {name: [*value, value[-1]] for name, value in OWN_FIELDS.get(family, {}).items() if isinstance(value, list)}
    fields = {**own, "num_hidden_layers": 3, "sparse_layers": layers, "moe_intermediate_size": 20}
    model = mixture_for(target, family, **fields)
    export_native(model, target, tmp_path / "native")
    back = import_native(tmp_path / "native")
    assert back.config.sparse_layer_indices == layers
    assert same(back.state_dict(), model.state_dict())
    assert relative_difference(logits(back), logits(model)) <= TOLERANCE


@pytest.mark.parametrize("target", ["qwen3_moe", "flex_olmo", "glm4_moe"])
def test_weights_that_do_not_sum_to_one_are_kept(target: str, tmp_path: Path) -> None:
    model = mixture_for(target, row_of(target).families[0].name, norm_topk_prob=False)
    export_native(model, target, tmp_path / "native")
    assert import_native(tmp_path / "native").config.norm_topk_prob is False
    assert relative_difference(logits(native_model(tmp_path / "native")), logits(model)) <= TOLERANCE


def test_groups_and_scale_of_sigmoid_routers_are_kept(tmp_path: Path) -> None:
    fields = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    model = mixture_for("dots1", "qwen3", **fields)
    export_native(model, "dots1", tmp_path / "native")
    back = import_native(tmp_path / "native")
    assert {name: getattr(back.config, name) for name in fields} == fields
    assert relative_difference(logits(native_model(tmp_path / "native")), logits(model)) <= TOLERANCE


@pytest.mark.parametrize(
    ("target", "family", "fields"),
    [
        ("mixtral", "mistral", {"sliding_window": 6}),
        ("mixtral", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
        ("mixtral", "llama", {"tie_word_embeddings": True}),
        ("mixtral", "llama", {"hidden_act": "gelu"}),
        ("mixtral", "llama", {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 20}),
        ("granitemoe", "llama", {"attention_bias": True}),
        ("granitemoe", "granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.2}),
        (
            "glm4_moe",
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 1.0}},
        ),
        ("dots1", "qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen2_moe", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        (
            "cohere2_moe",
            "cohere2",
            {"logit_scale": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        ),
    ],
)
def test_what_the_family_sets_is_carried(target: str, family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = mixture_for(target, family, **fields)
    export_native(model, target, tmp_path / "native")
    held, back = native_model(tmp_path / "native"), import_native(tmp_path / "native", family=family)
    assert relative_difference(logits(held), logits(model)) <= TOLERANCE
    assert relative_difference(logits(back), logits(model)) <= TOLERANCE
    assert same(back.state_dict(), model.state_dict())


def test_bfloat16_keeps_every_bit(tmp_path: Path) -> None:
    model = mixture_for("glm4_moe", "llama").to(torch.bfloat16)
    export_native(model, "glm4_moe", tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == "bfloat16"
    back = import_native(tmp_path / "native", family="llama")
    assert back.dtype == torch.bfloat16
    assert back.base_model.sparse_blocks[0].gate.e_score_correction_bias.dtype == torch.float32
    assert same(back.state_dict(), model.state_dict())


def test_files_have_the_names_that_engines_read(tmp_path: Path) -> None:
    model = upcycle(dense_model("qwen3"), num_experts=4, verify=False)
    export_native(model, "qwen3_moe", tmp_path / "native")
    names = load_file(tmp_path / "native" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.weight" in names


@pytest.mark.parametrize(
    ("target", "fields", "written"),
    [
        ("deepseek_v3", {}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("dots1", {}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("glm4_moe_lite", {}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 0}),
        ("glm4_moe_lite", {"sparse_layers": [1]}, {"first_k_dense_replace": 1}),
        # This field cannot say so, and engines must not read it as if it could.
        ("glm4_moe_lite", {"sparse_layers": [0]}, {"first_k_dense_replace": None}),
        (
            "hunyuan_v1_moe",
            {"moe_intermediate_size": 20},
            {
                "moe_topk": [2, 2],
                "moe_intermediate_size": [20, 20],
                "num_shared_expert": [1, 1],
                "use_mixed_mlp_moe": True,
            },
        ),
    ],
)
def test_engines_find_the_fields_that_transformers_does_not_read(
    target: str, fields: dict[str, Any], written: dict[str, Any], tmp_path: Path
) -> None:
    model = mixture_for(target, row_of(target).families[0].name, **fields)
    export_native(model, target, tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert {name: config.get(name) for name in written} == written
    assert import_native(tmp_path / "native").config.num_experts_per_tok == 2


def test_what_llama_cpp_computes_otherwise_is_told_and_nothing_else() -> None:
    """Against every row of the measured table."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if " yes |" in line]
    measured = {tuple(row[:3]): float(row[5]) for row in rows if len(row) == 9 and row[5]}
    told = {}
    for case in serving.cases([row.name for row in TARGETS]):
        if tuple(case) in measured:
            config = serving.mixture_of(case).config
            told[tuple(case)] = bool(native.served_otherwise(row_of(case.target), config))
    assert told == {case: difference > serving.TOLERANCE for case, difference in measured.items()}
    assert 10 < sum(told.values()) < len(told) - 60


def test_a_caution_names_what_llama_cpp_needs_and_another_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.logger, "propagate", True)
    model = mixture_for("qwen2_moe", "llama")
    export_native(model, "qwen2_moe", tmp_path / "cautioned")
    message = "qwen2_moe: llama.cpp computes other logits of this checkpoint than Transformers, without a word, for it "
    assert message + "needs norm_topk_prob=False here; take 'mixtral' or 'granitemoe'" in caplog.text
    caplog.clear()
    export_native(model, "mixtral", tmp_path / "plain")
    assert "llama.cpp" not in caplog.text


@pytest.mark.parametrize("gate", [None, 0.0], ids=["as it is written", "as it once was"])
@pytest.mark.parametrize("target", ["qwen2_moe", "qwen3_5_moe_text"])
def test_the_gate_of_an_expert_of_zeros_is_not_zero(target: str, gate: float | None, tmp_path: Path) -> None:
    """llama.cpp divides by what this gate says."""
    model = mixture_for(target, row_of(target).families[0].name)
    export_native(model, target, tmp_path / "native")
    file = tmp_path / "native" / "model.safetensors"
    tensors = load_file(file)
    gates = [name for name in tensors if name.endswith("shared_expert_gate.weight")]
    assert len(gates) == 2
    assert all(tensors[name].all() for name in gates)
    assert not any(tensors[name].any() for name in tensors if ".shared_expert." in name)
    if gate is not None:
        save_file(tensors | {name: torch.full_like(tensors[name], gate) for name in gates}, file, {"format": "pt"})
    back = import_native(tmp_path / "native")
    assert back.config.num_shared_experts == 0
    assert same(back.state_dict(), model.state_dict())


def test_every_field_of_every_pair_is_accounted_for() -> None:
    """A field that the host adds must be looked at before a model that uses it is written."""
    loose = set()
    for row in ROWS:
        for family in (family for family in row.families if family.name in CONFIG_MAPPING):
            dense, held = CONFIG_MAPPING[family.name], CONFIG_MAPPING[row.name]
            known = {*native._copied(row, family), *family.dense, *family.unread, "intermediate_size", *native._UNREAD}
            loose |= {f"{family.name}.{name} -> {row.name}" for name in native._fields(dense) - known - {"head_dim"}}
            for name in {*family.native, *row.native, *row.written, row.width, row.dense_width, *row.fields.values()}:
                if name != "rope_parameters":
                    assert name in native._fields(held) | set(held.attribute_map), f"{row.name}.{name}"
    assert not loose


# --------------------------------------------------------------------------------------------------------- refusals


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("mixtral", "gpt2", {}, r"dense_model_type: must be one of mistral, llama, .*got 'gpt2'"),
    ("mixtral", "qwen2", {}, r"got 'qwen2'.*'granitemoe'.* can hold it"),
    ("mixtral", "qwen3", {}, r"got 'qwen3'.*'qwen3_moe' can hold it"),
    ("qwen3_moe", "llama", {}, r"dense_model_type: must be one of qwen3, got 'llama'.*'mixtral'"),
    ("mixtral", "llama", {"attention_bias": True}, r"attention_bias: must be False, got True.*'granitemoe'"),
    ("granitemoe", "llama", {"mlp_bias": True}, r"mlp_bias: must be False, got True.*the nearest is"),
    (
        "mixtral",
        "llama",
        {"router_type": "sigmoid_top_k"},
        r"router_type: must be 'top_k'.*'glm4_moe' and 'solar_open' can",
    ),
    ("glm4_moe", "llama", {"router_type": "top_k"}, r"router_type: must be 'sigmoid_top_k', got 'top_k'.*'mixtral'"),
    ("mixtral", "llama", {"router_type": "hash"}, r"router_type: must be 'top_k', got 'hash'.*the nearest is"),
    ("mixtral", "llama", {"norm_topk_prob": False}, r"norm_topk_prob: must be True, got False.*'qwen2_moe' can"),
    ("mixtral", "llama", {"eval_capacity_factor": 2.0}, r"eval_capacity_factor: must be None, got 2.0"),
    ("mixtral", "llama", {"ffn_before": True}, r"ffn_before: must be False, got True"),
    ("mixtral", "llama", {"ffn_after": True}, r"ffn_after: must be False, got True"),
    ("mixtral", "llama", {"multiplicative_bias": True}, r"multiplicative_bias: must be False, got True"),
    ("mixtral", "llama", {"second_expert_policy_eval": "threshold"}, r"second_expert_policy_eval: must be 'all'"),
    (
        "qwen2_moe",
        "llama",
        {"renormalize_after_drop": True, "norm_topk_prob": False},
        r"renormalize_after_drop: must be False",
    ),
    ("mixtral", "llama", {"num_experts": [4, 3]}, r"num_experts: must be the same in all layers, got \[4, 3\]"),
    ("mixtral", "llama", {"num_experts_per_tok": [2, 1]}, r"num_experts_per_tok: must be the same in all layers"),
    (
        "mixtral",
        "llama",
        {"sparse_layers": [1]},
        r"sparse_layers: every layer must be sparse, got \[1\].*'qwen2_moe' can",
    ),
    ("dots1", "qwen3", {"sparse_layers": [0]}, r"sparse_layers: dense layers may be the first few, got \[0\]"),
    ("mixtral", "llama", {"num_shared_experts": 1}, r"num_shared_experts: must be 0, got 1.*'granitemoeshared' can"),
    ("qwen2_moe", "qwen2", {"num_shared_experts": 1}, r"shared_expert_gate: must be True, got False"),
    (
        "qwen2_moe",
        "llama",
        {"head_dim": 16},
        r"it needs head_dim to be hidden_size / num_attention_heads.*'mixtral' can",
    ),
    ("qwen3_moe", "qwen3", {"use_sliding_window": True, "max_window_layers": 1}, r"use_sliding_window: must be False"),
    ("granitemoe", "mistral", {"sliding_window": 6}, r"sliding_window: must be None, got 6.*'mixtral' can"),
    ("flex_olmo", "olmo3", {"layer_types": ["sliding_attention", "full_attention"]}, r"layer_types: must be"),
    (
        "mixtral",
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor=1",
    ),
]


@pytest.mark.parametrize(("target", "family", "fields", "message"), REFUSED)
def test_what_cannot_be_held_is_refused(
    target: str, family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = mixture_for(target, family, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        export_native(model, target, tmp_path / "native")
    assert str(caught.value).startswith(f"target: {target} cannot hold this mixture exactly: ")
    assert not contents(tmp_path)
    # What the message names can.
    able = re.search(r"((?:'\w+'(?: and )?)+) can hold it", str(caught.value))
    for name in re.findall(r"'(\w+)'", able.group(1) if able else ""):
        export_native(model, name, tmp_path / name)


def test_unknown_target_and_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target: must be one of .* \(did you mean 'mixtral'\?\), got 'mixtrl'"):
        export_native(mixture(), "mixtrl", tmp_path / "x")
    with pytest.raises(ValueError, match="model: must be a mixture, a folder or a Hub name, got LlamaForCausalLM"):
        export_native(dense_model("llama"), "mixtral", tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have a language-model head"):
        export_native(mixture(auto=STMoEForSequenceClassification), "mixtral", tmp_path / "x")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="destination: must not exist"):
        export_native(mixture(), "mixtral", tmp_path / "there")
    with pytest.raises(ValueError, match=r"model_type must be one of mixtral, .* got 'llama'"):
        import_native(dense_model("llama"))
    with pytest.raises(ValueError, match=r"family: must be one of mistral, .* for mixtral, got 'gpt2'"):
        import_native(random_native("mixtral"), family="gpt2")


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("qwen2_moe", {"qkv_bias": False, "use_sliding_window": True}, r"use_sliding_window: must be False, got True"),
        ("qwen3_moe", {"use_sliding_window": True}, r"qwen3: use_sliding_window: must be False, got True"),
        ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}, r"attention_bias: must be False, got True"),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, r"expert_selection_fn: must be 'softmax', got 'sigmoid'"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "average"}, r"it needs shared_expert_combination"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 50}, r"must be a multiple of moe_intermediate_size=48"),
        ("glm4_moe", {"first_k_dense_replace": 2}, r"must have a sparse layer to be a mixture"),
        (
            "ernie4_5_moe",
            {"moe_norm_min": 0.1},
            r"moe_norm_min: must be 1e-12, got 0.1; the other side has no such field",
        ),
    ],
)
def test_native_models_that_no_family_holds_are_refused(target: str, change: dict[str, Any], message: str) -> None:
    config = random_native(target).config
    with pytest.raises(ValueError, match=message):
        import_native(AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **change})))


def test_partial_rotary_of_published_glm_is_refused_by_name() -> None:
    config = copy.deepcopy(random_native("glm4_moe").config)
    config.rope_parameters["partial_rotary_factor"] = 0.5
    with pytest.raises(ValueError, match=r"rope_parameters: must be .*'partial_rotary_factor': 1.0"):
        import_native(AutoModelForCausalLM.from_config(config))


# ------------------------------------------------------------------------------------------------ negative controls


@pytest.mark.parametrize("kind", ["swapped", "dropped", "extra", "shape", "nan"])
def test_a_wrong_translation_is_seen_and_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = native._translated

    def wrong(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = original(*args, **kwargs)
        name = "model.layers.1.mlp.experts.down_proj"
        if kind == "swapped":
            tensors[name] = tensors[name][[1, 0, 2, 3]]
        if kind == "nan":
            tensors[name] = tensors[name] * torch.nan
        return tensors

    monkeypatch.setattr(native, "_translated", wrong)
    model = mixture()
    state = model.state_dict()
    if kind == "dropped":
        del state["model.layers.1.mlp.experts.down_proj"]
    if kind == "extra":
        state["model.layers.1.mlp.gate.bias"] = torch.zeros(4)
    if kind == "shape":
        state["model.layers.1.mlp.gate.weight"] = torch.zeros(3, 32)
    monkeypatch.setattr(model, "state_dict", lambda: state)
    message = {
        "swapped": r"target: the mixtral checkpoint must have equal logits, but they differ by \d",
        "nan": r"differ by nan.*Look for NaN",
        "dropped": r"missing: model.layers.1.mlp.experts.down_proj",
        "extra": r"without a place: model.layers.1.mlp.gate.bias",
        "shape": r"of another shape: model.layers.1.mlp.gate.weight",
    }[kind]
    with pytest.raises(ValueError, match=message):
        export_native(model, "mixtral", tmp_path / "native")
    assert not contents(tmp_path)


def test_weights_of_what_a_family_lacks_must_be_zero(tmp_path: Path) -> None:
    export_native(mixture_for("qwen2_moe", "llama"), "qwen2_moe", tmp_path / "native")
    source = native_model(tmp_path / "native")
    assert import_native(source, family="llama").config.num_shared_experts == 0
    for name in ("self_attn.q_proj.bias", "mlp.shared_expert.up_proj.weight"):
        spoilt = copy.deepcopy(source)
        spoilt.get_parameter(f"model.layers.1.{name}").data[0] = 1.0
        if "bias" in name:
            with pytest.raises(
                ValueError, match=rf"{name}: must be zero, for a mixture of llama has nothing of the kind"
            ):
                import_native(spoilt, family="llama")
        else:
            assert import_native(spoilt, family="llama").config.num_shared_experts == 1


# ------------------------------------------------------------------------------------------------ dense, per expert


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", ["average", 2])
def test_copies_collapse_to_the_dense_model_bit_by_bit(family: str, experts: str | int) -> None:
    dense = dense_model(family)
    found = to_dense(upcycle(dense, num_experts=3, verify=False), experts)
    assert type(found) is type(dense)
    assert same(found.state_dict(), dense.state_dict())
    assert torch.equal(logits(found, 12), logits(dense, 12))


def test_one_expert_and_the_mean_are_what_they_say() -> None:
    model = mixture(sparse_layers=[1])
    experts = model.base_model.sparse_blocks[0].experts
    one, mean = to_dense(model, 2), to_dense(model)
    assert torch.equal(one.model.layers[1].mlp.down_proj.weight, experts.down_proj[2])
    assert torch.equal(one.model.layers[1].mlp.up_proj.weight, experts.gate_up_proj[2, 48:])
    expected = experts.gate_up_proj[:, :48].double().mean(0).float()
    assert torch.equal(mean.model.layers[1].mlp.gate_proj.weight, expected)
    assert same(one.model.layers[0].state_dict(), model.model.layers[0].state_dict())
    assert not torch.equal(logits(one), logits(mean))


@pytest.mark.parametrize(
    ("fields", "experts", "message"),
    [
        ({"num_shared_experts": 1}, "average", "num_shared_experts: must be 0 for a dense model"),
        ({"ffn_before": True}, "average", "ffn_before: must be False for a dense model"),
        ({}, 4, "experts: must be 'average' or a number from 0 to 3, got 4"),
        ({}, -1, "got -1"),
        ({}, "mean", "got 'mean'"),
        (
            {"sparse_layers": [1], "moe_intermediate_size": 20},
            0,
            "moe_intermediate_size: must be that of the dense FFN, 48",
        ),
    ],
)
def test_what_a_dense_model_cannot_hold_is_refused(fields: dict[str, Any], experts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_dense(mixture(**fields), experts)


def test_scale_and_narrow_experts_are_folded() -> None:
    model = mixture(multiplicative_bias=True, moe_intermediate_size=20, num_experts=2, num_experts_per_tok=1)
    found = to_dense(model, 1)
    assert found.config.intermediate_size == 20
    experts = model.base_model.sparse_blocks[0].experts
    hidden = torch.randn(3, 32)
    expected = experts(hidden, torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert relative_difference(found.model.layers[0].mlp(hidden), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("llama", {"mlp_bias": True, "multiplicative_bias": True}),
    ],
)
def test_one_tensor_per_expert_comes_back_bit_by_bit(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = mixture(family, **fields)
    export_per_expert(model, tmp_path / "split", max_shard_size="20KB")
    names = {name for file in (tmp_path / "split").glob("*.safetensors") for name in load_file(file)}
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    if family == "llama":
        assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert not any(name.endswith("gate_up_proj") for name in names)
    back = read_per_expert(tmp_path / "split")
    assert same(back.state_dict(), model.state_dict())
    assert torch.equal(logits(back, 12), logits(model, 12))
    assert "`from_pretrained` does not read these names" in (tmp_path / "split" / "README.md").read_text().replace(
        "**", ""
    )


def test_a_dropped_expert_is_seen(tmp_path: Path) -> None:
    export_per_expert(mixture(), tmp_path / "split")
    file = tmp_path / "split" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        read_per_expert(tmp_path / "split")


# ----------------------------------------------------------------------------------------------------- folders, CLI


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a mixture and all that lies beside it."""
    folder = tmp_path / "moe"
    model = upcycle(dense_model("llama"), num_experts=4, verify=False)
    perturb(model)
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("Do what you like.", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "write",
    [
        lambda source, to: export_native(source, "mixtral", to),
        lambda source, to: export_dense(source, to),
        lambda source, to: export_per_expert(source, to),
    ],
    ids=["native", "dense", "per-expert"],
)
def test_what_travels_with_a_model_is_copied(write: Callable[[Path, Path], Any], saved: Path, tmp_path: Path) -> None:
    write(saved, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_k == 7
    assert (tmp_path / "out" / "LICENSE.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "out"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused(saved: Path, tmp_path: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.1\.mlp\.gate\.weight"):
        export_native(saved, "mixtral", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["st-moe", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands_go_out_and_come_back(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = STMoEForCausalLM.from_pretrained(saved)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, monkeypatch, "export", "moe", "--to", "mixtral", "native")
    assert code == 0
    assert "largest relative logit difference" in out
    assert "written: native" in out
    assert run(capsys, monkeypatch, "import", "native", "back", "--family", "llama")[0] == 0
    assert same(STMoEForCausalLM.from_pretrained("back").state_dict(), model.state_dict())
    assert run(capsys, monkeypatch, "export", "moe", "split", "--format", "per-expert")[0] == 0
    assert run(capsys, monkeypatch, "import", "split", "back", "--overwrite")[0] == 0
    assert same(STMoEForCausalLM.from_pretrained("back").state_dict(), model.state_dict())
    assert run(capsys, monkeypatch, "export", "moe", "dense", "--to", "dense", "--experts", "3")[0] == 0
    dense = AutoModelForCausalLM.from_pretrained("dense")
    assert torch.equal(
        dense.model.layers[0].mlp.down_proj.weight, model.base_model.sparse_blocks[0].experts.down_proj[3]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "moe", "out"), "--to: name the architecture to write"),
        (("export", "moe", "out", "--to", "mixtral", "--format", "per-expert"), "--to: name the architecture"),
        (("export", "moe", "out", "--to", "mixtral", "--format", "gguf"), "--format: must be native or per-expert"),
        (("export", "moe", "out", "--to", "mixtral", "--experts", "1"), "--experts: is for --to dense, got '1'"),
        (("export", "moe", "out", "--to", "dense", "--experts", "9"), "experts: must be 'average' or a number"),
        (("export", "moe", "out", "--to", "mixtrl"), "did you mean 'mixtral'"),
        (("export", "moe", "out", "--to", "qwen3_moe"), "'mixtral'"),
        (("export", "./nowhere", "out", "--to", "mixtral"), "source: must be a checkpoint folder"),
        (("export", "moe", "moe", "--to", "mixtral"), "destination: must lie outside"),
        (("import", "moe", "out"), "must have one tensor per expert"),
        (("import", "moe", "out", "--family", "llama"), "family: is for native checkpoints"),
        (("import", "./nowhere", "out"), "source: must be a checkpoint folder"),
    ],
)
def test_mistakes_end_in_one_line(
    words: tuple[str, ...],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


@pytest.mark.slow
def test_native_checkpoint_loads_where_the_package_is_hidden(saved: Path, tmp_path: Path) -> None:
    export_native(saved, "mixtral", tmp_path / "native")
    code = (
        "import sys; sys.modules['st_moe'] = None; from transformers import AutoModelForCausalLM as A; "
        f"print(type(A.from_pretrained({str(tmp_path / 'native')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("MixtralForCausalLM")


def test_import_checkpoint_writes_a_mixture(saved: Path, tmp_path: Path) -> None:
    export_native(saved, "granitemoe", tmp_path / "native")
    import_checkpoint(tmp_path / "native", tmp_path / "back")
    back = STMoEForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.dense_model_type == "granite"
    assert relative_difference(logits(back), logits(STMoEForCausalLM.from_pretrained(saved))) <= TOLERANCE


# -------------------------------------------------------------------------------------------------------- the page


def table_of_targets() -> str:
    """The table that the page must show."""
    lines = ["| `--to` | Dense families | Router | Dense layers | Shared experts |", "|---|---|---|---|---|"]
    for row in TARGETS:
        families = ", ".join(row.family_names)
        layers = "none" if row.layers is None else row.layers.words
        shared = "none"
        if row.shared is not None:
            shared = ("gated" if row.shared.gated else "plain") + ("" if row.shared.field else ", one")
        lines.append(f"| `{row.name}` | {families} | `{row.router_type}` | {layers} | {shared} |")
    return "\n".join(lines)


def test_the_page_has_the_table_of_targets() -> None:
    assert table_of_targets() in PAGE.read_text(encoding="utf-8")
