"""Families that are mixtures in some layers: their dense layers become sparse, their own experts stay as they are."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from benchmarks.families import generated
from benchmarks.tiny_models import dense_model, perturb, tiny_config
from st_moe import STMoEConfig, STMoEForCausalLM, locate_ffns, upcycle
from st_moe.configuration import REFUSED_FAMILIES, family_config
from st_moe.finetune.costs import count_costs
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import TOLERANCE, relative_difference, token_ids

#: Three layers, of which the middle one alone is dense, or the first one where only that can be.
MIXED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "deepseek_v3": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
DENSE_LAYER = {"qwen3_moe": 1, "deepseek_v3": 0}
#: Fields that a model needs and that have no default.
NO_DEFAULT: dict[str, dict[str, int]] = {
    "hunyuan_v1_moe": {"head_dim": 128},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256}
    | {"indexer_budget": 64, "indexer_compress_ratio": 8},
}
FIELDS = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": None, "norm_topk_prob": True}


def dense_of(family: str) -> PreTrainedModel:
    return dense_model(family, **MIXED[family])


def sparse_of(dense: PreTrainedModel, **fields: Any) -> Any:
    layer = DENSE_LAYER[dense.config.model_type]
    return upcycle(dense, sparse_layers=[layer], verify=False, **{**FIELDS, **fields})


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def native_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the layers' own mixtures."""
    layers = [name for name, module in model.named_modules() if name.endswith(".mlp") and hasattr(module, "experts")]
    own = tuple(f"{name}." for name in layers if not isinstance(model.get_submodule(name), SparseBlock))
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(own)}


@pytest.mark.parametrize("family", MIXED)
def test_step_0_is_exact_and_native_layers_are_untouched(family: str) -> None:
    dense = dense_of(family)
    sparse = sparse_of(dense)
    ids = token_ids()
    expected = logits_of(dense, ids)
    assert relative_difference(logits_of(sparse, ids), expected) <= TOLERANCE
    assert torch.equal(generated(sparse), generated(dense))
    native = native_tensors(dense)
    assert len({re.search(r"layers\.(\d)", name)[1] for name in native}) == 2  # type: ignore[index]
    ours = native_tensors(sparse)
    assert ours.keys() == native.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in native.items())
    layers = [type(layer.mlp) for layer in dense.model.layers]
    layers[DENSE_LAYER[family]] = SparseBlock
    assert [type(layer.mlp) for layer in sparse.model.layers] == layers


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("part", ["ours", "native"])
def test_a_changed_expert_moves_the_logits(family: str, part: str) -> None:
    """Negative control of the equality, for either kind of expert."""
    dense = dense_of(family)
    sparse = sparse_of(dense)
    block = next(m.mlp for m in sparse.model.layers if isinstance(m.mlp, SparseBlock) == (part == "ours"))
    with torch.no_grad():
        block.experts.down_proj += 0.2
    assert relative_difference(logits_of(sparse, token_ids()), logits_of(dense, token_ids())) > 100 * TOLERANCE


@pytest.mark.parametrize("family", MIXED)
def test_saving_and_loading_keeps_both_kinds(family: str, tmp_path: Path) -> None:
    sparse = sparse_of(dense_of(family))
    perturb(sparse, seed=3)
    sparse.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(sparse)
    before, after = sparse.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Where tensors lie in memory may turn the last bit of a product.
    assert relative_difference(logits_of(loaded, token_ids()), logits_of(sparse, token_ids())) <= 1e-6
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(sparse.config)
    assert config.native_fields == sparse.config.native_fields
    assert config.native_fields["num_experts_per_tok"] == 2 != config.num_experts_per_tok
    again = pickle.loads(pickle.dumps(loaded))
    assert relative_difference(logits_of(again, token_ids()), logits_of(sparse, token_ids())) <= 1e-6
    assert relative_difference(logits_of(copy.deepcopy(loaded), token_ids()), logits_of(sparse, token_ids())) <= 1e-6


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_the_loss_is_the_language_models_and_ours_alone(family: str, output_router_logits: bool) -> None:
    """Asked for router logits, the host would add a loss of its own, on routers of another number of experts."""
    dense = dense_of(family)
    sparse = sparse_of(dense, num_experts_per_tok=2, output_router_logits=output_router_logits).train()
    ids = token_ids()
    output = sparse(input_ids=ids, labels=ids)
    expected = dense(input_ids=ids, labels=ids, output_router_logits=False).loss
    torch.testing.assert_close(output.lm_loss, expected, rtol=1e-5, atol=0)
    ours = 1e-2 * output.balance_loss + 1e-3 * output.router_z_loss
    assert ours > 5e-3
    torch.testing.assert_close(output.loss, output.lm_loss + ours)
    assert output.expert_load.shape == (1, 3)
    if output_router_logits:
        assert [logits.shape for logits in output.router_logits] == [(ids.numel(), 3)]
    else:
        assert output.router_logits is None
    evaluated = sparse.eval()(input_ids=ids, labels=ids)
    assert evaluated.loss == evaluated.lm_loss


@pytest.mark.parametrize("family", MIXED)
def test_gradients_reach_both_kinds(family: str) -> None:
    sparse = sparse_of(dense_of(family)).train()
    ids = token_ids()
    sparse(input_ids=ids, labels=ids).loss.backward()
    for layer in sparse.model.layers:
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            assert layer.mlp.get_parameter(name).grad.abs().max() > 0, name


@pytest.mark.parametrize("family", MIXED)
def test_a_fresh_model_has_both_kinds(family: str) -> None:
    dense = tiny_config(family, **MIXED[family])
    config = STMoEConfig.from_dense(dense, sparse_layers=[DENSE_LAYER[family]], **FIELDS)
    torch.manual_seed(0)
    model: Any = STMoEForCausalLM(config)
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(dense)])
    sizes = {layer.mlp.experts.num_experts: layer.mlp.experts.gate_up_proj.std().item() for layer in model.model.layers}
    assert sizes.keys() == {3, 4}
    assert all(0.01 < std < 0.03 for std in sizes.values())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model.config is model.model.config is config


@pytest.mark.parametrize("layers", [None, [0, 1], "last:3"])
def test_layers_of_experts_cannot_be_sparse(layers: Any) -> None:
    dense = dense_of("qwen3_moe")
    match = (
        r"sparse_layers: layer 0: .*experts of its own \(mlp\.experts\); the layers that can be are sparse_layers=\[1\]"
    )
    with pytest.raises(ValueError, match=match):
        upcycle(dense, num_experts=3, sparse_layers=layers)
    config = STMoEConfig.from_dense(dense.config, sparse_layers=layers)
    with pytest.raises(ValueError, match=match):
        STMoEForCausalLM(config)


def test_a_model_without_a_dense_layer_is_refused() -> None:
    dense = dense_model("qwen3_moe", mlp_only_layers=[])
    with pytest.raises(ValueError, match=r"layer 0: .*experts of its own \(mlp\.experts\); no other layer can be"):
        upcycle(dense, num_experts=3)


def test_a_model_without_a_native_layer_is_all_sparse() -> None:
    """Granite 4.0's small models: a hybrid whose FFN is the shared one, for there are no experts to share with."""
    dense = dense_model("granitemoehybrid")
    assert dense.config.num_local_experts == 0
    assert [ffn.path for ffn in locate_ffns(dense)] == [f"model.layers.{layer}.shared_mlp" for layer in range(2)]
    assert all(ffn.gated and ffn.storage == "tensors" for ffn in locate_ffns(dense))
    sparse = upcycle(dense, num_experts=4, verify=False)
    assert sparse.config.sparse_layer_indices == [0, 1]
    assert sparse.config.native_fields["num_local_experts"] == 0
    assert relative_difference(logits_of(sparse, token_ids()), logits_of(dense, token_ids())) <= TOLERANCE
    with torch.no_grad():
        sparse.model.layers[0].shared_mlp.experts.down_proj[:2] += 0.2
    assert relative_difference(logits_of(sparse, token_ids()), logits_of(dense, token_ids())) > 100 * TOLERANCE


def test_a_dense_ffn_beside_experts_is_left_alone() -> None:
    dense = dense_model("granitemoehybrid", num_local_experts=4, num_experts_per_tok=2)
    assert {ffn.reason for ffn in locate_ffns(dense)} == {"it holds experts of its own (block_sparse_moe.experts)"}


@pytest.mark.parametrize("family", MIXED)
def test_what_is_switched_reaches_every_module(family: str) -> None:
    sparse = sparse_of(dense_of(family))
    expected = logits_of(sparse, token_ids())
    configs = {id(module.config) for module in sparse.modules() if hasattr(module, "config")}
    assert configs == {id(sparse.config)}
    assert sparse.config._attn_implementation == "sdpa"
    sparse.set_attn_implementation("eager")
    sparse.set_experts_implementation("eager")
    assert relative_difference(logits_of(sparse, token_ids()), expected) <= TOLERANCE
    output = sparse(input_ids=token_ids(), output_attentions=True)
    assert len(output.attentions) == 3


def test_active_parameters_count_the_choices_of_either_kind() -> None:
    dense = dense_of("qwen3_moe")
    config = sparse_of(dense).config
    one = 3 * 32 * 16
    assert config.native_sizes(STMoEForCausalLM(config)) == {
        f"model.layers.{layer}.mlp.experts": (4, 2) for layer in (0, 2)
    }
    assert dense.num_parameters() == config.num_parameters() - 2 * 3 * 32 * 48 - 3 * 32
    unused = 2 * (4 - 2) * one + (3 - 1) * 3 * 32 * 48
    assert config.num_parameters(active=True) == config.num_parameters() - unused
    costs = count_costs(config)
    assert (costs.total, costs.active) == (config.num_parameters(), config.num_parameters(active=True))
    assert [part.kind for part in costs.parts] == ["", "native", "sparse", "native"]
    native = costs.parts[1]
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert native.matmul == 2 * one + 4 * 32 + attention


def test_classifiers_have_native_layers_too(tmp_path: Path) -> None:
    dense = dense_model("qwen3_moe", AutoModelForSequenceClassification, num_labels=3, **MIXED["qwen3_moe"])
    sparse = sparse_of(dense)
    ids = token_ids()
    assert relative_difference(logits_of(sparse, ids), logits_of(dense, ids)) <= TOLERANCE
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert relative_difference(logits_of(loaded, ids), logits_of(sparse, ids)) <= 1e-6


@pytest.mark.parametrize("family", sorted(n for n, why in REFUSED_FAMILIES.items() if "experts of its own" in why))
def test_families_refused_for_their_experts_have_no_dense_layer(family: str) -> None:
    """As they are by default; on the meta device, for they are large."""
    if family not in CONFIG_MAPPING:
        pytest.skip("this Transformers has no such family")
    with pytest.raises(ValueError, match="each of its layers holds experts of its own"):
        family_config(family)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**NO_DEFAULT.get(family, {})))
    except AttributeError as error:
        pytest.skip(f"the model of this Transformers cannot be built: {error}")
    holding = [
        any(name.rpartition(".")[2] == "experts" for name, _ in layer.named_modules())
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and name.count(".") <= 1 and name.endswith(("layers", "blocks"))
        for layer in stack
    ]
    assert holding
    assert all(holding)


def test_native_experts_are_counted_in_a_config_that_leaves_them_to_the_familys_defaults() -> None:
    shared = family_config("qwen3_moe").shared_names()
    default = CONFIG_MAPPING["qwen3_moe"]()
    dense = tiny_config("qwen3_moe", **MIXED["qwen3_moe"], **{name: getattr(default, name) for name in shared})
    through = STMoEConfig.from_dense(dense, **FIELDS, sparse_layers=[1])
    alone = STMoEConfig.from_dict({**through.to_dict(), "native_fields": None})
    assert alone.native_fields is None
    assert alone.num_parameters(active=True) == through.num_parameters(active=True) < through.num_parameters() / 2
    assert [part.kind for part in count_costs(alone).parts] == [part.kind for part in count_costs(through).parts]


def test_native_fields_given_are_laid_over_the_dense_models() -> None:
    dense = tiny_config("qwen3_moe", **MIXED["qwen3_moe"])
    config = STMoEConfig.from_dense(dense, **FIELDS, sparse_layers=[1], native_fields={"num_experts_per_tok": 1})
    untouched = STMoEConfig.from_dense(dense, **FIELDS, sparse_layers=[1]).native_fields
    assert config.native_fields == {**untouched, "num_experts_per_tok": 1}
    assert untouched["num_experts_per_tok"] != 1
