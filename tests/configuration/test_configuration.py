"""`STMoEConfig`: every rule and its message, names and aliases, files, families, counts and plans."""

import copy
import json
import logging
import pickle
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from benchmarks import tiny_models
from st_moe import STMoEConfig, STMoEForCausalLM
from st_moe.configuration import (
    LOSSES,
    MIXTURE_FIELDS,
    configuration_st_moe,
    dense_model_types,
    family_config,
    num_ffn_layers,
)
from tests.families import tiny_config

INF, NAN = float("inf"), float("nan")

#: Every mixture field that the default router reads at a value that is not its default; lists where they are allowed.
CHANGED: dict[str, Any] = {
    "dense_model_type": "qwen3",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "sparse_layers": [1, 3],
    "moe_intermediate_size": 24,
    "router_type": "top_k",
    "norm_topk_prob": False,
    "second_expert_policy_train": "random",
    "second_expert_policy_eval": "threshold",
    "second_expert_threshold": [0.2, 0.1],
    "router_jitter_noise": 0.01,
    "router_gumbel_noise": 0.5,
    "router_gaussian_noise": 1,
    "allow_non_causal_routing": True,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2,
    "min_capacity": 2,
    "capacity_scope": "group",
    "capacity_group_size": 64,
    "drop_priority": "router_prob",
    "renormalize_after_drop": True,
    "balance_loss_coef": 0.02,
    "balance_loss_scope": "sequence",
    "balance_loss_count": "all",
    "balance_loss_after_drop": True,
    "router_z_loss_coef": 0,
    "sequence_balance_loss_coef": 1e-4,
    "second_place_loss_coef": 0.5,
    "importance_loss_coef": 0.1,
    "expert_dropout": 0.1,
    "multiplicative_bias": True,
    "ffn_before": True,
    "ffn_after": True,
    "num_shared_experts": 2,
    "shared_expert_gate": True,
    "output_router_logits": True,
    "initializer_range": 0.01,
}
#: The fields that only other routers read, with their router.
CHANGED_FOR: dict[str, dict[str, Any]] = {
    "noisy_top_k": {"load_loss_coef": 0.1},
    "top_any": {
        "straight_through": "active",
        "fallback": "none",
        "initial_experts": 3,
        "diversity_loss_coef": 0.1,
        "simplicity_loss_coef": 0,
        "top_any_balance_loss_coef": 0.2,
        "efficiency_loss_coef": 0.3,
    },
    "sigmoid_top_k": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "bias_update_rate": 0},
    "coordinate_descent": {
        "coordinate_descent_iterations": 50,
        "coordinate_descent_epsilon": 1,
        "coordinate_descent_k_ratio": 1,
    },
    "soft": {"slots_per_expert": 4, "allow_non_causal_routing": True},
    "mixture_of_depths": {
        "depth_fraction": 0.5,
        "depth_loss_coef": 0.1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    "hash": {"hash_by": "position"},
}


def faults_of(**fields: Any) -> list[str]:
    """The lines of the error that a config raises."""
    with pytest.raises(ValueError, match="invalid field") as caught:
        STMoEConfig(**fields)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(lines)} invalid field(s) in STMoEConfig:"
    return [line.removeprefix("- ") for line in lines]


# Rules.


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_experts", 0, "at least 1"),
        ("num_experts", -3, "at least 1"),
        ("num_experts_per_tok", 0, "between 1 and num_experts=8"),
        ("num_experts_per_tok", 9, "between 1 and num_experts=8"),
        ("moe_intermediate_size", 0, "positive or None"),
        ("router_type", "topk", r"one of .*top_k.*did you mean 'top_k'"),
        ("router_type", "hashed", "one of .*top_k.*did you mean 'hash'"),
        ("router_type", "expert_choice", "causal .*unless allow_non_causal_routing=True"),
        ("router_type", "soft", "causal .*unless allow_non_causal_routing=True"),
        ("num_experts", [4, 8], r"one value or 8 \(one per sparse layer\)"),
        ("num_experts_per_tok", [2], r"one value or 8 \(one per sparse layer\)"),
        ("num_experts_per_tok", [1, 1, 1, 1, 1, 1, 1, 9], "between 1 and num_experts=8"),
        ("num_experts", [8, 8, 8, 0, 8, 8, 8, 8], "at least 1"),
        ("router_gumbel_noise", -0.1, "finite and not negative"),
        ("router_gaussian_noise", INF, "finite and not negative"),
        ("capacity_group_size", 0, "at least 1"),
        ("importance_loss_coef", NAN, "finite and not negative"),
        ("load_loss_coef", 0.1, r"'top_k' has no such loss \(noisy_top_k\)"),
        ("depth_loss_coef", 1, r"has no such loss \(mixture_of_depths\)"),
        ("n_group", 2, "read by router_type sigmoid_top_k only, not by top_k;"),
        ("fallback", "none", "read by router_type top_any only, not by top_k;"),
        ("hash_by", "position", "read by router_type hash only"),
        ("second_expert_threshold", -0.1, r"in \[0, 1\]"),
        ("second_expert_threshold", 1.5, r"in \[0, 1\]"),
        ("second_expert_threshold", NAN, r"in \[0, 1\]"),
        ("second_expert_threshold", [0.1, 0.2], r"one value or 1 \(one per rank"),
        ("second_expert_threshold", [], r"one value or 1 \(one per rank"),
        ("second_expert_threshold", [2.0], r"in \[0, 1\]"),
        ("router_jitter_noise", -0.1, r"in \[0, 1\)"),
        ("router_jitter_noise", 1.0, r"in \[0, 1\)"),
        ("router_jitter_noise", NAN, r"in \[0, 1\)"),
        ("expert_dropout", 1, r"in \[0, 1\)"),
        ("expert_dropout", -0.5, r"in \[0, 1\)"),
        ("capacity_factor", 0, "positive and finite, or None for dropless"),
        ("capacity_factor", INF, "positive and finite"),
        ("eval_capacity_factor", -1.0, "positive and finite"),
        ("eval_capacity_factor", NAN, "positive and finite"),
        ("min_capacity", 0, "at least 1"),
        ("balance_loss_coef", -1e-3, "finite and not negative"),
        ("balance_loss_coef", INF, "finite and not negative"),
        ("router_z_loss_coef", NAN, "finite and not negative"),
        ("initializer_range", -0.02, "finite and not negative"),
        ("num_shared_experts", -1, "not be negative"),
        ("sparse_layers", [], "fit 8 layers"),
        ("sparse_layers", [8], "fit 8 layers"),
        ("sparse_layers", [-1], "fit 8 layers"),
        ("sparse_layers", [1, 1], "distinct"),
        ("sparse_layers", "every:0", "'every:k'"),
        ("sparse_layers", "every:9", "fit 8 layers"),
        ("sparse_layers", "last:9", "fit 8 layers"),
        ("sparse_layers", "every:2:8", "'every:k:first'"),
        ("sparse_layers", "every:2:", "'every:k:first'"),
        ("sparse_layers", "every:2:-1", "'every:k:first'"),
        ("sparse_layers", "every:0:1", "'every:k:first'"),
        ("sparse_layers", "every:1:1:1", "'every:k:first'"),
        ("sparse_layers", "last:2:0", "'last:k'"),
        ("sparse_layers", "last:-1", "'last:k'"),
        ("sparse_layers", "last:", "'last:k'"),
        ("sparse_layers", "first:2", "'every:k', 'every:k:first', 'last:k'"),
        ("sparse_layers", "every:2.0", "'every:k'"),
        ("sparse_layers", "all", "None"),
    ],
)
def test_each_rule_names_field_rule_and_value(field: str, value: Any, rule: str) -> None:
    faults = [fault for fault in faults_of(**{field: value}) if fault.startswith(f"{field}: ")]
    assert len(faults) == 1
    assert re.search(rule, faults[0]), faults
    assert faults[0].endswith(f"got {value!r}"), faults


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_experts", "8", "expected int, got str"),
        ("num_experts", 8.0, "expected int, got float"),
        ("num_experts", True, "expected int, got bool"),
        ("num_experts", None, "expected int, got NoneType"),
        ("num_experts_per_tok", [2.0], "doesn't match any type"),
        ("capacity_scope", "layer", r"expected one of \('sequence', 'batch', 'group'\)"),
        ("drop_priority", "random", r"expected one of \('position', 'router_prob'\)"),
        ("fallback", "first", r"expected one of \('best', 'none'\)"),
        ("sparse_layers", 3, "doesn't match any type"),
        ("sparse_layers", [0, "1"], "doesn't match any type"),
        ("sparse_layers", [True], "doesn't match any type"),
        ("router_type", None, "expected str, got NoneType"),
        ("norm_topk_prob", 1, "expected bool, got int"),
        ("second_expert_policy_train", "sometimes", r"expected one of \('all', 'none', 'threshold', 'random'\)"),
        ("second_expert_policy_eval", None, "expected one of"),
        ("balance_loss_scope", "layer", r"expected one of \('batch', 'sequence'\)"),
        ("capacity_factor", "1.25", "doesn't match any type"),
        ("balance_loss_coef", None, "doesn't match any type"),
        ("ffn_before", "yes", "expected bool, got str"),
        ("output_router_logits", 0, "expected bool, got int"),
    ],
)
def test_types_are_strict(field: str, value: Any, expected: str) -> None:
    (fault,) = faults_of(**{field: value})
    assert fault.startswith(f"{field}: "), fault
    assert re.search(expected, fault), fault
    shown = value if isinstance(value, str) and "expected one of" in expected else repr(value)
    assert str(shown).strip("'") in fault, "the value is named"


@pytest.mark.parametrize(
    ("fields", "field", "rule"),
    [
        ({"router_type": "sigmoid_top_k", "n_group": 3}, "n_group", "divide num_experts=8"),
        ({"router_type": "sigmoid_top_k", "n_group": 8}, "n_group", "groups of two or more"),
        ({"router_type": "sigmoid_top_k", "n_group": 4, "topk_group": 5}, "topk_group", "between 1 and n_group=4"),
        (
            {"router_type": "sigmoid_top_k", "n_group": 4, "num_experts_per_tok": 3},
            "topk_group",
            "hold num_experts_per_tok=3 experts",
        ),
        ({"router_type": "mixture_of_depths"}, "num_experts", "must be 1, with num_experts_per_tok=1"),
        ({"router_type": "top_any", "initial_experts": 9}, "initial_experts", "between 1 and num_experts=8"),
        ({"router_type": "top_any", "initial_experts": 0}, "initial_experts", "between 1 and num_experts=8"),
        ({"num_experts_per_tok": 1, "second_place_loss_coef": 0.1}, "second_place_loss_coef", "of 2 or more"),
        ({"num_experts_per_tok": [2, 3], "second_expert_threshold": [0.1]}, "second_expert_threshold", "or 2"),
        (
            {"router_type": "soft", "allow_non_causal_routing": True, "capacity_factor": 1.0},
            "capacity_factor",
            "must be None with router_type 'soft'",
        ),
        ({"shared_expert_gate": True}, "shared_expert_gate", "needs num_shared_experts"),
        ({"router_type": "hash", "second_expert_policy_eval": "none"}, "second_expert_policy_eval", "read by"),
    ],
)
def test_rules_between_fields(fields: dict[str, Any], field: str, rule: str) -> None:
    (fault,) = faults_of(num_hidden_layers=2, **fields)
    assert fault.startswith(f"{field}: "), fault
    assert rule in fault, fault


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_encoders_take_routers_that_see_every_token(family: str) -> None:
    assert STMoEConfig(dense_model_type=family, router_type="expert_choice").router_type == "expert_choice"


def test_an_encoder_used_as_a_decoder_is_causal() -> None:
    (fault,) = faults_of(dense_model_type="bert", is_decoder=True, router_type="soft")
    assert "allow_non_causal_routing" in fault


def test_numbers_per_sparse_layer() -> None:
    config = STMoEConfig(num_hidden_layers=5, sparse_layers=[4, 1], num_experts=[2, 6], num_experts_per_tok=2)
    assert config.layer_sizes == [(2, 2), (6, 2)]
    assert STMoEConfig(num_hidden_layers=2).layer_sizes == [(8, 2), (8, 2)]


def test_loss_coefficients_are_the_routers_unless_given() -> None:
    assert STMoEConfig(router_z_loss_coef=0.5).loss_coefficients == {
        "balance_loss": 0.01,
        "router_z_loss": 0.5,
        "sequence_balance_loss": 0.0,
        "second_place_loss": 0.0,
        "importance_loss": 0.0,
    }
    noisy = STMoEConfig(router_type="noisy_top_k", load_loss_coef=0)
    assert noisy.loss_coefficients == {"importance_loss": 0.01, "load_loss": 0, "router_z_loss": 0.001}
    assert STMoEConfig(router_type="hash").loss_coefficients == {}


def test_every_loss_of_a_router_has_its_coefficient() -> None:
    assert LOSSES
    assert {f"{name}_coef" for name in LOSSES} == {name for name in MIXTURE_FIELDS if name.endswith("_loss_coef")}


def test_all_faults_are_gathered() -> None:
    faults = faults_of(
        num_experts=4,
        num_experts_per_tok=5,
        sparse_layers=[99],
        min_capacity="4",
        capacity_factor=-1.0,
        num_expert=3,
        second_expert_policy_train="maybe",
    )
    assert sorted(fault.split(":")[0] for fault in faults) == [
        "capacity_factor",
        "min_capacity",
        "num_expert",
        "num_experts_per_tok",
        "second_expert_policy_train",
        "sparse_layers",
    ]


def test_fields_are_checked_against_each_other() -> None:
    assert "between 1 and num_experts=1" in faults_of(num_experts=1)[0]
    assert "fit 3 layers" in faults_of(num_hidden_layers=3, sparse_layers=[3])[0]
    assert "fit 3 layers" in faults_of(dense_model_type="gpt2", n_layer=3, sparse_layers="last:4")[0]
    assert "fit 12 layers" in faults_of(dense_model_type="gpt2", sparse_layers=[12])[0]
    faults = faults_of(num_experts_per_tok=4, second_expert_threshold=[0.1])
    assert "one value or 3" in faults[0]
    assert STMoEConfig(num_experts_per_tok=4, second_expert_threshold=(0.1, 0.2, 0.3)).second_expert_threshold


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 8},
        {"second_expert_threshold": 0},
        {"second_expert_threshold": 1.0},
        {"second_expert_threshold": [0.5]},
        {"balance_loss_coef": 0},
        {"capacity_factor": 1},
        {"router_jitter_noise": 0.99},
        {"initializer_range": 0},
        {"sparse_layers": [7, 0]},
        {"sparse_layers": "every:8"},
    ],
)
def test_ends_of_the_ranges_are_allowed(fields: dict[str, Any]) -> None:
    config = STMoEConfig(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())


def test_a_fault_of_the_family_is_an_error_too() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        STMoEConfig(hidden_size="64")
    with pytest.raises(StrictDataclassClassValidationError, match="attention heads"):
        STMoEConfig(hidden_size=65, num_attention_heads=8)


def test_types_stay_strict_after_construction() -> None:
    config = STMoEConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="num_experts"):
        config.num_experts = "8"
    with pytest.raises(StrictDataclassFieldValidationError, match="second_expert_policy_eval"):
        config.second_expert_policy_eval = "often"
    assert config.num_experts == 8


def test_a_rule_broken_after_construction_is_found_before_saving(tmp_path: Path) -> None:
    config = STMoEConfig()
    config.num_experts_per_tok = 9
    with pytest.raises(StrictDataclassClassValidationError, match="num_experts_per_tok: must be between 1 and num_exp"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# Names.


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("num_expert", "num_experts"),
        ("n_experts", "num_experts"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("experts_per_tok", "num_experts_per_tok"),
        ("sparse_layer", "sparse_layers"),
        ("capacity_facto", "capacity_factor"),
        ("minimal_capacity", "min_capacity"),
        ("router_jiter_noise", "router_jitter_noise"),
        ("router_zloss_coef", "router_z_loss_coef"),
        ("router_aux_loss_coeff", "router_aux_loss_coef"),
        ("balanc_loss_coef", "balance_loss_coef"),
        ("ffn_befor", "ffn_before"),
        ("mutliplicative_bias", "multiplicative_bias"),
        ("norm_top_k_prob", "norm_topk_prob"),
        ("output_router_logit", "output_router_logits"),
        ("num_shared_expert", "num_shared_experts"),
        ("dense_modeltype", "dense_model_type"),
    ],
)
def test_a_misspelt_mixture_field_is_an_error_with_the_nearest_name(misspelt: str, nearest: str) -> None:
    (fault,) = faults_of(**{misspelt: 1})
    assert fault == f"{misspelt}: is not a field of STMoEConfig; did you mean {nearest!r}?"


def test_every_mixture_field_misspelt_by_one_letter_is_found() -> None:
    for name in MIXTURE_FIELDS:
        for wrong in (name[:-1], name + "s", name[1:]):
            if wrong not in MIXTURE_FIELDS and wrong != "st_moe_versions":
                assert f"did you mean {name!r}" in faults_of(**{wrong: 1})[0], wrong


def test_attributes_of_the_users_own_are_kept() -> None:
    config = STMoEConfig(my_note="kept", task_specific_params={"a": 1})
    assert config.my_note == "kept"
    assert config.to_dict()["my_note"] == "kept"


def test_experts_implementation_is_no_misspelling() -> None:
    config = STMoEConfig(experts_implementation="grouped_mm", attn_implementation="eager")
    assert config._experts_implementation == "grouped_mm"
    assert config._attn_implementation == "eager"


def test_aliases() -> None:
    config = STMoEConfig(num_local_experts=4, router_aux_loss_coef=0.5)
    assert (config.num_experts, config.num_local_experts) == (4, 4)
    assert (config.balance_loss_coef, config.router_aux_loss_coef) == (0.5, 0.5)
    config.num_local_experts = 6
    assert config.num_experts == 6
    written = config.to_dict()
    assert written["num_experts"] == 6
    assert "num_local_experts" not in written
    assert "between 1 and num_experts=1" in faults_of(num_local_experts=1)[0]
    assert faults_of(num_local_experts="4")[0].startswith("num_experts: ")
    assert faults_of(router_aux_loss_coef=-1.0)[0].startswith("balance_loss_coef: ")


def test_a_field_and_its_alias_must_not_contradict_each_other() -> None:
    assert STMoEConfig(num_experts=4, num_local_experts=4).num_experts == 4
    with pytest.raises(ValueError, match="num_local_experts"):
        STMoEConfig(num_experts=8, num_local_experts=4)


@pytest.mark.parametrize(
    ("family", "own", "generic"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4}, {"hidden_size": 32, "num_hidden_layers": 3}),
        ("bloom", {"n_layer": 3, "n_head": 4, "hidden_size": 32}, {"num_hidden_layers": 3, "num_attention_heads": 4}),
        ("opt", {"ffn_dim": 48, "num_hidden_layers": 3}, {"num_hidden_layers": 3}),
        ("falcon", {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}, {"num_hidden_layers": 3}),
    ],
)
def test_the_familys_own_names(family: str, own: dict[str, Any], generic: dict[str, Any]) -> None:
    config = STMoEConfig(dense_model_type=family, **own, num_local_experts=4, sparse_layers="last:2")
    assert config.sparse_layer_indices == [1, 2]
    assert config.num_experts == 4
    assert all(getattr(config, name) == value for name, value in {**own, **generic}.items())
    assert isinstance(config, CONFIG_MAPPING[family])
    assert set(CONFIG_MAPPING[family].attribute_map) <= set(type(config).attribute_map)
    again = STMoEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    also = STMoEConfig(dense_model_type=family, **{**own, **generic}, num_experts=4, sparse_layers="last:2")
    assert also.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("layers", "sparse_layers", "expected"),
    [
        (4, None, [0, 1, 2, 3]),
        (4, [3, 1], [1, 3]),
        (4, (0,), [0]),
        (4, "every:1", [0, 1, 2, 3]),
        (6, "every:2", [1, 3, 5]),
        (7, "every:3", [2, 5]),
        (7, "every:2:0", [0, 2, 4, 6]),
        (7, "every:3:1", [1, 4]),
        (4, "every:1:3", [3]),
        (8, "every:4", [3, 7]),
        (4, "every:4", [3]),
        (4, "last:1", [3]),
        (4, "last:4", [0, 1, 2, 3]),
    ],
)
def test_sparse_layers(layers: int, sparse_layers: Any, expected: list[int]) -> None:
    config = STMoEConfig(num_hidden_layers=layers, sparse_layers=sparse_layers)
    assert config.sparse_layer_indices == expected
    assert config.sparse_layers == sparse_layers, "what the user wrote is kept"


# Files.


def test_the_table_of_changed_fields_is_whole() -> None:
    changed = {**CHANGED, **{name: value for fields in CHANGED_FOR.values() for name, value in fields.items()}}
    # native_fields is for families with experts of their own, and is tested with them.
    assert set(changed) == set(MIXTURE_FIELDS) - {"st_moe_version", "native_fields"}
    default = family_config("llama")()
    same = [name for name, value in changed.items() if getattr(default, name) == value]
    assert same == ["router_type"]


def assert_same_config(actual: PreTrainedConfig, expected: PreTrainedConfig) -> None:
    assert type(actual) is type(expected)
    assert actual.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        CHANGED,
        {"sparse_layers": (0, 2)},
        {"capacity_factor": None},
        {"num_experts": [4, 8, 2, 1], "num_experts_per_tok": (2, 3, 2, 1)},
        *({"router_type": name, **fields} for name, fields in CHANGED_FOR.items()),
    ],
)
def test_files_keep_every_field(fields: dict[str, Any], tmp_path: Path) -> None:
    config = STMoEConfig(
        **{"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, **fields}
    )
    for name, value in fields.items():
        assert getattr(config, name) == value, name
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["model_type"] == "st_moe"
    assert written["st_moe_version"] == configuration_st_moe.installed_version()
    assert not {"base_model_tp_plan", "base_model_ep_plan"} & set(written)
    for loaded in (
        STMoEConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_pretrained(tmp_path),
        STMoEConfig.from_dict(written),
        STMoEConfig.from_json_file(tmp_path / "config.json"),
    ):
        assert type(loaded) is type(config)
        for name in MIXTURE_FIELDS:
            before, after = getattr(config, name), getattr(loaded, name)
            assert after == (list(before) if isinstance(before, tuple) else before), name
        assert loaded.rope_parameters == config.rope_parameters
        assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())


def test_arguments_beside_a_file_win_and_obey_the_rules(tmp_path: Path) -> None:
    STMoEConfig(num_experts=4).save_pretrained(tmp_path)
    assert STMoEConfig.from_pretrained(tmp_path, num_experts_per_tok=3).num_experts_per_tok == 3
    assert STMoEConfig.from_pretrained(tmp_path, capacity_factor=1.5).capacity_factor == 1.5
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="num_experts_per_tok"):
        STMoEConfig.from_pretrained(tmp_path, num_experts_per_tok=7)


def test_a_file_with_a_fault_is_an_error(tmp_path: Path) -> None:
    STMoEConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, "num_experts_per_tok": 99, "num_exprts": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)num_exprts.*num_experts_per_tok.*99"):
        STMoEConfig.from_pretrained(tmp_path)


def test_a_file_of_a_newer_version_warns_and_survives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    STMoEConfig(num_experts=4).save_pretrained(tmp_path / "new")
    path = tmp_path / "new" / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    newer = {**written, "st_moe_version": "99.1.0", "router_temperature": 2.5, "num_expert_groups": [1, 2]}
    path.write_text(json.dumps(newer), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        config = STMoEConfig.from_pretrained(tmp_path / "new")
    message = " ".join(record.getMessage() for record in caplog.records)
    assert "99.1.0" in message
    assert configuration_st_moe.installed_version() in message
    assert "num_expert_groups, router_temperature" in message
    assert config.router_temperature == 2.5
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert {name: again[name] for name in newer} == newer
    assert faults_of(**{**newer, "num_experts": 0}), "known fields are checked all the same"
    older = STMoEConfig.from_dict({**written, "st_moe_version": "0.0.1"})
    assert older.st_moe_version == configuration_st_moe.installed_version()
    with pytest.raises(ValueError, match="router_temperature"):
        STMoEConfig.from_dict({**written, "router_temperature": 2.5})


@pytest.mark.parametrize("version", ["not a version", 3, ""])
def test_a_version_that_is_none_is_an_error_of_its_field(version: Any) -> None:
    with pytest.raises(ValueError, match="st_moe_version"):
        STMoEConfig(st_moe_version=version)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "youtu"])
def test_pickle_and_copy(family: str) -> None:
    config = STMoEConfig.from_dense(CONFIG_MAPPING[family](), num_experts=4, sparse_layers=[0, 1], my_note="kept")
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert_same_config(copied, config)
        assert copied.my_note == "kept"
    assert pickle.loads(pickle.dumps(type(config))) is type(config)


def test_pickle_makes_the_family_on_demand() -> None:
    """What another process unpickles names a family that it may not have made yet."""
    name = "nemotron"
    assert getattr(configuration_st_moe, name).STMoEConfig is family_config(name)
    with pytest.raises(AttributeError, match="no_such_family"):
        _ = configuration_st_moe.no_such_family


# Families.


def test_the_default_is_a_small_llama() -> None:
    config = STMoEConfig()
    assert isinstance(config, LlamaConfig)
    assert isinstance(config, STMoEConfig)
    assert config.model_type == "st_moe"
    assert config.dense_model_type == "llama"
    assert config.num_parameters(active=True) < 1e8
    assert STMoEConfig(dense_model_type="qwen3").hidden_size == Qwen3Config().hidden_size


def test_a_family_is_made_once() -> None:
    assert family_config("qwen3") is family_config("qwen3") is type(STMoEConfig(dense_model_type="qwen3"))
    assert issubclass(family_config("qwen3"), Qwen3Config)
    assert family_config("qwen3") is not family_config("llama")


@pytest.mark.parametrize(
    "dense",
    [
        LlamaConfig(hidden_size=96, num_attention_heads=6, rope_parameters={"rope_type": "linear", "factor": 2.0}),
        Qwen3Config(sliding_window=7, use_sliding_window=True, max_window_layers=3, tie_word_embeddings=True),
        GPT2Config(n_embd=32, n_head=4, n_inner=64, activation_function="relu", resid_pdrop=0.3),
        FalconConfig(alibi=True, new_decoder_architecture=True, num_kv_heads=2, bias=True),
        CONFIG_MAPPING["gemma2"](final_logit_softcapping=12.5, query_pre_attn_scalar=100),
        CONFIG_MAPPING["opt"](ffn_dim=33, do_layer_norm_before=False),
        CONFIG_MAPPING["phi3"](partial_rotary_factor=0.5),
        CONFIG_MAPPING["bloom"](n_layer=3, slow_but_exact=True),
    ],
    ids=lambda dense: dense.model_type,
)
def test_from_dense_keeps_every_field_and_gives_it_back(dense: PreTrainedConfig) -> None:
    dense.my_note = "kept"
    dense.id2label = {0: "no", 1: "yes", 2: "maybe"}
    before = copy.deepcopy(dense.to_dict())
    config = STMoEConfig.from_dense(dense, num_experts=4, sparse_layers=[0])
    written = config.to_dict()
    for name, value in before.items():
        if name not in ("model_type", "architectures", "transformers_version"):
            assert written[name] == value, name
    assert (config.dense_model_type, config.num_experts, config.sparse_layers) == (dense.model_type, 4, [0])
    assert dense.to_dict() == before, "the dense config is left as it is"
    back = config.dense_config()
    assert type(back) is type(dense)
    assert back.to_dict() == before


def test_every_family_makes_a_config() -> None:
    """Every dense decoder family of the host: its defaults become a mixture's config and come back unchanged."""
    for family in dense_model_types():
        dense = CONFIG_MAPPING[family]()
        config = STMoEConfig.from_dense(dense)
        assert config.sparse_layer_indices == list(range(num_ffn_layers(dense))), family
        assert config.dense_config().to_dict() == dense.to_dict(), family
        assert_same_config(STMoEConfig.from_dict(config.to_dict()), config)
        assert (config.num_experts, config.num_local_experts, config.num_experts_per_tok) == (8, 8, 2), family
        assert STMoEConfig(dense_model_type=family).balance_loss_coef == 1e-2, family
    assert len(dense_model_types()) > 50


def test_a_dense_configs_own_attributes_are_not_taken_for_misspelt() -> None:
    """Nobody spelt them for us: `from_dense` takes what the checkpoint's config has."""
    dense = CONFIG_MAPPING["opt"](intermediate_size=64, moe_note="none")
    config = STMoEConfig.from_dense(dense, num_experts=4)
    assert config.intermediate_size == 64
    with pytest.raises(ValueError, match="num_expert: is not a field"):
        STMoEConfig.from_dense(dense, num_expert=4)


def test_mixture_fields_win_over_dense_ones() -> None:
    config = STMoEConfig.from_dense(LlamaConfig(initializer_range=0.5), initializer_range=0.1)
    assert config.initializer_range == 0.1
    assert STMoEConfig.from_dense(LlamaConfig(initializer_range=0.5)).initializer_range == 0.5
    assert STMoEConfig.from_dense(LlamaConfig(), hidden_size=128).hidden_size == 128


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("lama", r"must be a model_type of Transformers, got 'lama'; did you mean 'llama'\?"),
        ("st_moe", "dense_model_type.*'st_moe'"),
        ("", "must be a model_type of Transformers, got ''"),
        (None, "must be a model_type of Transformers, got None"),
        (["llama"], "must be a model_type of Transformers"),
        ("mixtral", "no mixture can be made from 'mixtral': each of its layers holds experts of its own"),
        ("gpt_oss", "no mixture can be made from 'gpt_oss': each of its layers holds experts of its own"),
        ("gemma3", "'gemma3' is a composite of several models; use its text model: 'gemma3_text'"),
        ("llava", "'llava' is a composite of several models"),
    ],
)
def test_families_that_are_none_are_refused(family: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        STMoEConfig(dense_model_type=family)


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_from_dense_refuses_them_too(family: str) -> None:
    with pytest.raises(ValueError, match=f"dense_model_type: .*{family}"):
        STMoEConfig.from_dense(CONFIG_MAPPING[family]())


def test_from_dense_refuses_a_mixture() -> None:
    with pytest.raises(ValueError, match="dense_config: must be a dense model's config"):
        STMoEConfig.from_dense(STMoEConfig())


def test_dense_families_hold_no_mixture() -> None:
    families = dense_model_types()
    assert len(families) == len(set(families))
    assert {"llama", "qwen3", "gpt2", "gemma3_text", "phi3"} <= set(families)
    assert not {"mixtral", "gpt_oss", "gemma3", "st_moe"} & set(families)


# Families with experts of their own in other layers.


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoehybrid", "bailing_hybrid", "doge"])
def test_numbers_of_a_familys_own_experts_are_kept_apart(family: str) -> None:
    dense = tiny_models.tiny_config(family)
    config = STMoEConfig.from_dense(dense, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
    names = config.shared_names()
    assert config.native_fields == {name: getattr(dense, name) for name in names}
    assert "num_experts_per_tok" in names
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (6, 3, 24)
    assert config.dense_config().to_dict() == dense.to_dict()
    assert dense.num_experts_per_tok == 2
    config.native_fields["num_experts_per_tok"] = 4
    assert dense.num_experts_per_tok == 2
    assert config.dense_config().num_experts_per_tok == 4
    assert_same_config(STMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))), config)
    assert_same_config(pickle.loads(pickle.dumps(config)), config)


def test_native_fields_that_are_left_out_are_the_familys_defaults() -> None:
    fresh = STMoEConfig(dense_model_type="qwen3_moe", num_experts=4, native_fields={"num_experts": 16})
    assert (fresh.num_experts, fresh.dense_config().num_experts) == (4, 16)
    default = CONFIG_MAPPING["qwen3_moe"]()
    assert fresh.dense_config().num_experts_per_tok == default.num_experts_per_tok != fresh.num_experts_per_tok
    assert STMoEConfig(dense_model_type="qwen3_moe").dense_config().to_dict() == default.to_dict()
    assert STMoEConfig.from_dense(LlamaConfig()).native_fields is None


@pytest.mark.parametrize(
    ("family", "native", "match"),
    [
        (
            "llama",
            {"num_experts": 4},
            r"native_fields: must name fields that 'llama' shares .* \(none\), got 'num_experts'",
        ),
        ("qwen3_moe", {"hidden_size": 4}, r"shares with the mixture \(moe_intermediate_size, .*, got 'hidden_size'"),
        ("qwen3_moe", {"num_experts": "four"}, "native_fields: num_experts expected int, got str .*'four'"),
        ("qwen3_moe", [4], "native_fields: .*dict"),
    ],
)
def test_native_fields_at_fault(family: str, native: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        STMoEConfig(dense_model_type=family, native_fields=native)


def test_another_name_of_a_coefficient_is_ours_where_the_family_has_such_a_field() -> None:
    config = STMoEConfig(dense_model_type="qwen3_moe", router_aux_loss_coef=0.5)
    assert config.balance_loss_coef == 0.5
    assert config.dense_config().router_aux_loss_coef == 0.001
    with pytest.raises(ValueError, match="num_local_experts: is another name of num_experts, got 4 and 5"):
        STMoEConfig(dense_model_type="granitemoehybrid", num_local_experts=4, num_experts=5)


# Counts.


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "bloom", "falcon", "olmo2"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"sparse_layers": [1], "num_shared_experts": 1, "ffn_before": True, "multiplicative_bias": True}],
    ids=["plain", "extras"],
)
def test_count_equals_the_built_model(family: str, fields: dict[str, Any]) -> None:
    config = STMoEConfig.from_dense(tiny_config(family), num_experts=4, **fields)
    model = STMoEForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if ".experts." in names[id(p)])
    assert experts > 0
    assert config.num_parameters(active=True) == config.num_parameters() - experts * 2 // 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_count_equals_an_independent_formula(tied: bool, extras: bool) -> None:
    vocabulary, hidden, width, heads, groups, layers, experts, choices = 50, 16, 24, 4, 2, 5, 6, 3
    sparse = [1, 2, 4]
    fields: dict[str, Any] = {"sparse_layers": sparse, "num_experts": experts, "num_experts_per_tok": choices}
    expert_width, shared = width, 0
    if extras:
        expert_width, shared = 10, 2
        fields |= {"moe_intermediate_size": expert_width, "num_shared_experts": shared, "ffn_after": True}
    config = STMoEConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        **fields,
    )
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * groups)
    common = vocabulary * hidden * (1 if tied else 2) + hidden + layers * (attention + 2 * hidden)
    common += (layers - len(sparse)) * 3 * hidden * width + len(sparse) * experts * hidden
    common += len(sparse) * 3 * hidden * expert_width * shared
    common += len(sparse) * (3 * hidden * expert_width + hidden) * extras
    expert = 3 * hidden * expert_width
    assert config.num_parameters() == common + len(sparse) * experts * expert
    assert config.num_parameters(active=True) == common + len(sparse) * choices * expert


def test_counting_allocates_nothing() -> None:
    config = STMoEConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_experts=64)
    assert config.num_parameters() > 1.8e11
    assert torch.get_default_device() == torch.device("cpu")


# Parallel plans.


def matches(rule: str, name: str) -> bool:
    return fnmatchcase(name, rule)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "cohere"])
def test_tensor_parallel_plan(family: str) -> None:
    dense = CONFIG_MAPPING[family].base_model_tp_plan
    ffn = {rule for rule in dense if ".mlp." in rule}
    assert ffn
    whole = STMoEConfig.from_dense(tiny_config(family), num_experts=4).base_model_tp_plan
    part = STMoEConfig.from_dense(tiny_config(family), num_experts=4, sparse_layers=[1]).base_model_tp_plan
    assert whole is not None
    assert part is not None
    for plan in (whole, part):
        plan.pop("embed_tokens", None)  # Transformers before 5.23 writes this rule for tied embeddings
    experts = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    assert whole == {rule: style for rule, style in dense.items() if rule not in ffn} | experts
    assert part == dense | experts, "dense layers that stay keep their rules"
    assert CONFIG_MAPPING[family].base_model_tp_plan == dense, "the family's own plan is left as it is"


def test_plan_of_shared_experts() -> None:
    plan = STMoEConfig(num_shared_experts=1).base_model_tp_plan
    assert plan is not None
    shared = {rule.rpartition(".")[2]: style for rule, style in plan.items() if "shared_experts" in rule}
    assert shared == {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "starcoder2", "phi", "gpt_neox"])
@pytest.mark.parametrize("fields", [{}, {"multiplicative_bias": True}], ids=["plain", "multiplicative_bias"])
def test_expert_parallel_plan_shards_every_expert_parameter(family: str, fields: dict[str, Any]) -> None:
    """One stacked parameter left whole would pair experts with the wrong rows on every rank but the first."""
    config = STMoEConfig.from_dense(tiny_config(family), num_experts=4, **fields)
    with torch.device("meta"):
        model = STMoEForCausalLM(config).base_model
    plan = model.ep_plan
    assert "ep_dispatch_experts" in plan.values()
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert names
    sharded = [rule for rule, style in plan.items() if style == "grouped_gemm"]
    whole = [name for name in names if not any(matches(rule, name) for rule in sharded)]
    assert not whole


def test_a_family_without_a_plan_has_none() -> None:
    assert STMoEConfig(dense_model_type="gpt2").base_model_tp_plan is None
    assert STMoEConfig(dense_model_type="gpt2").base_model_ep_plan is None
