"""The families of the project: each mixture computes its dense parent's function, and is a citizen of the host."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
)

from st_moe import (
    STMoEConfig,
    STMoEForCausalLM,
    STMoEForSequenceClassification,
    STMoEModel,
    prove_identity,
    upcycle,
)
from st_moe.configuration import family_config
from st_moe.conversion.recipes import read_ffn
from st_moe.modeling import families, family_of, locate_ffns
from st_moe.modeling.experts import STMoEExperts
from st_moe.modeling.routing import TopKRouter
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import (
    FAMILIES,
    LAYERS,
    POST_NORM,
    TOLERANCE,
    assert_same_gradients,
    dense_model,
    mixture,
    pair,
    relative_difference,
    tiny_config,
    token_ids,
)

each_family = pytest.mark.parametrize("family", FAMILIES)
# Each of these inherits one layout or location rule that no other of them has.
DIVERSE = ("llama", "phi3", "gpt2", "opt", "bloom", "olmo2")


def sparse_blocks(model: nn.Module) -> list[SparseBlock]:
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names that a checkpoint leaves out because another name holds the same tensor."""
    return set(model.all_tied_weights_keys)


def test_the_promised_families_are_all_here() -> None:
    assert len(FAMILIES) == len(set(FAMILIES)) == 24


@each_family
def test_logits_and_loss_equal_the_dense_model(family: str) -> None:
    dense, sparse = pair(family)
    ids = token_ids(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected, actual = (model(input_ids=ids, attention_mask=mask, labels=ids) for model in (dense, sparse))
    real = mask.bool()
    assert relative_difference(actual.logits[real], expected.logits[real]) <= TOLERANCE
    torch.testing.assert_close(actual.loss, expected.loss, rtol=TOLERANCE, atol=0)
    assert torch.equal(actual.loss, actual.lm_loss)


@each_family
def test_greedy_generation_equals_the_dense_model(family: str) -> None:
    dense, sparse = pair(family)
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected, actual = (model.generate(ids, **options) for model in (dense, sparse))
    assert torch.equal(actual, expected)
    assert actual.shape == (2, 14)


@each_family
def test_gradients_equal_the_dense_model(family: str) -> None:
    """Shared parameters get the dense gradient, a layer's experts share it, and copies teach the router nothing."""
    dense, sparse = (copy.deepcopy(model) for model in pair(family))
    ids = token_ids()
    for model in (dense, sparse):
        model(ids, labels=ids).loss.backward()
    inside = tuple(f"{name}." for name, module in sparse.named_modules() if isinstance(module, SparseBlock))
    expected = {name: parameter.grad for name, parameter in dense.named_parameters()}
    outside = [name for name, _ in sparse.named_parameters() if not name.startswith(inside)]
    outside = [name for name in outside if expected[name] is not None]
    assert len(outside) >= 5 * LAYERS
    actual = {name: sparse.get_parameter(name).grad for name in outside}
    expected = {name: expected[name] for name in outside}
    for block, location in zip(sparse_blocks(sparse), locate_ffns(dense), strict=True):
        assert block.gate.weight.grad.abs().max() <= 1e-6
        for linear in location.linears():
            linear.weight.data = linear.weight.grad
            if linear.bias is not None:
                linear.bias.data = linear.bias.grad
        for part, ours, theirs in zip("ABCD", block.experts.parameters_of_all(), read_ffn(location), strict=False):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                actual[location.path + part], expected[location.path + part] = ours.grad.sum(0), theirs
    assert_same_gradients(actual, expected)


@each_family
def test_the_attention_mask_reaches_every_router(family: str) -> None:
    sparse = copy.deepcopy(pair(family)[1])
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    seen: list[Tensor] = []
    for block in sparse_blocks(sparse):
        block.gate.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.token_mask))
    for model in (sparse, sparse.base_model):
        model(input_ids=ids, attention_mask=mask)
        assert len(seen) == LAYERS
        assert all(torch.equal(token_mask, mask.bool()) for token_mask in seen)
        seen.clear()


@each_family
def test_training_reaches_every_parameter(family: str) -> None:
    model = mixture(family).train()
    ids = token_ids(4, 16)
    output = model(ids, labels=ids)
    expected = output.lm_loss + 1e-2 * output.balance_loss + 1e-3 * output.router_z_loss
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for block in sparse_blocks(model):
        assert block.gate.weight.grad.abs().max() > 0
        assert (next(block.experts.parameters()).grad.abs().amax((1, 2)) > 0).sum() >= 2


@each_family
def test_round_trip_is_bit_exact(family: str, tmp_path: Path) -> None:
    # Weights away from their initial values, experts that differ: nothing could be right by chance.
    model = mixture(family)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for kind in ("named_parameters", "named_buffers"):
        saved, read = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, loaded))
        assert saved.keys() == read.keys()
        for name, tensor in saved.items():
            assert tensor.dtype == read[name].dtype, name
            assert torch.equal(tensor, read[name]), name
    ids = token_ids()
    with torch.no_grad():
        # A copy: the file's tensors are mapped at addresses that torch's kernels may take another way for.
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, model(ids).logits)
    before, after = ({k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (model, loaded))
    assert after == before


@each_family
def test_the_host_converts_none_of_our_keys(family: str, tmp_path: Path) -> None:
    _, sparse = pair(family)
    sparse.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = sparse.state_dict()
    assert stored.keys() == state.keys() - tied_names(sparse)
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    _, report = type(sparse).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@each_family
def test_from_scratch_is_finite_and_takes_the_weights(family: str) -> None:
    dense, sparse = pair(family)
    fresh = STMoEForCausalLM(sparse.config).eval()
    assert type(fresh) is type(sparse)
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        assert tensor.device.type == "cpu", name
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    expected = dict(dense.named_buffers())
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    for module in fresh.modules():
        weights = []
        if isinstance(module, TopKRouter):
            weights = [module.weight]
        elif isinstance(module, STMoEExperts):
            weights = [getattr(module, module.in_name), module.down_proj]
        for weight in weights:
            assert weight.std().item() == pytest.approx(sparse.config.initializer_range, rel=0.25)
    fresh.load_state_dict(sparse.state_dict())
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, sparse(ids).logits)


@each_family
def test_changed_mixtures_are_told_apart(family: str) -> None:
    """Negative controls: what must not pass for the dense model does not."""
    dense, sparse = pair(family)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE
    one_expert, zeroed, norm = (copy.deepcopy(sparse) for _ in range(3))
    with torch.no_grad():
        for parameter in sparse_blocks(one_expert)[0].experts.parameters():
            parameter[1] += 0.1 * torch.randn(parameter.shape[1:])
        for block in sparse_blocks(zeroed)[:1]:
            for parameter in block.experts.parameters():
                parameter.zero_()
        for block in sparse_blocks(norm):
            block.gate.normalize = False
    for name, changed in {"one expert": one_expert, "a zeroed FFN": zeroed}.items():
        proof = prove_identity(dense, changed)
        assert not proof.holds, name
        assert proof.max_relative_difference > 100 * TOLERANCE, name
    unnormalised = prove_identity(dense, norm).max_relative_difference
    # A norm behind the FFN divides its scale out again; everywhere else the combine weights must sum to 1.
    assert unnormalised < 1e-2 if family in POST_NORM else unnormalised > 1e-3


def test_swapped_copies_change_nothing_and_swapped_experts_do() -> None:
    dense, copies = (copy.deepcopy(model) for model in pair("llama"))
    different = mixture("llama")
    ids = token_ids()
    for model, same in ((copies, True), (different, False)):
        with torch.no_grad():
            before = model(ids).logits
            experts = sparse_blocks(model)[0].experts
            for parameter in experts.parameters():
                parameter.copy_(parameter[[1, 0, 2, 3]])
            assert (relative_difference(model(ids).logits, before) <= TOLERANCE) is same
    assert prove_identity(dense, copies).holds


@each_family
def test_classes_are_the_familys_and_the_projects(family: str) -> None:
    dense, sparse = pair(family)
    ours = family_of(family)
    assert type(sparse) is ours.STMoEForCausalLM
    assert isinstance(sparse, STMoEForCausalLM)
    assert isinstance(sparse, type(dense))
    assert isinstance(sparse.config, STMoEConfig)
    assert isinstance(sparse.config, type(dense.config))
    base = getattr(sparse, sparse.base_model_prefix)
    assert sparse.base_model is base
    assert isinstance(base, STMoEModel)
    assert isinstance(base, MODEL_MAPPING[type(dense.config)])
    assert sparse.config.model_type == "st_moe"
    assert sparse.config.dense_model_type == family
    assert type(sparse).__name__ == "STMoEForCausalLM"


@each_family
def test_classes_and_models_pickle(family: str) -> None:
    _, sparse = pair(family)
    ours = family_of(family)
    kinds = ("STMoEConfig", "STMoEModel", "STMoEForCausalLM", "STMoEForSequenceClassification")
    for cls in (getattr(ours, name) for name in kinds if hasattr(ours, name)):
        assert pickle.loads(pickle.dumps(cls)) is cls
    ids = token_ids()
    with torch.no_grad():
        expected = sparse(ids).logits
        for twin in (pickle.loads(pickle.dumps(sparse)), copy.deepcopy(sparse)):
            assert type(twin) is type(sparse)
            assert twin is not sparse
            assert twin.config is not sparse.config
            assert twin.config.to_dict() == sparse.config.to_dict()
            assert torch.equal(twin(ids).logits, expected)
            shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in sparse.parameters()}
            assert not shared


@each_family
def test_saved_config_names_the_public_class(family: str, tmp_path: Path) -> None:
    _, sparse = pair(family)
    sparse.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architectures"] == ["STMoEForCausalLM"]
    assert stored["model_type"] == "st_moe"
    assert stored["dense_model_type"] == family
    assert "auto_map" not in stored
    assert type(AutoConfig.from_pretrained(tmp_path)) is family_config(family)


@each_family
def test_auto_classes_build_the_familys_class(family: str, tmp_path: Path) -> None:
    _, sparse = pair(family)
    config, ours = sparse.config, family_of(family)
    kinds = {
        "STMoEModel": (AutoModel, STMoEModel, MODEL_MAPPING),
        "STMoEForCausalLM": (AutoModelForCausalLM, STMoEForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        "STMoEForSequenceClassification": (
            AutoModelForSequenceClassification,
            STMoEForSequenceClassification,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        ),
    }
    sparse.save_pretrained(tmp_path)
    for name, (auto, public, mapping) in kinds.items():
        if config.dense_config_class not in mapping:
            with pytest.raises(ValueError, match=f"dense_model_type: '{family}' has no dense class for {name}"):
                public(config)
            continue
        expected = getattr(ours, name)
        with torch.device("meta"):
            assert type(auto.from_config(config)) is expected
            assert type(public(config)) is expected
        assert type(auto.from_pretrained(tmp_path)) is expected
        assert type(public.from_pretrained(tmp_path)) is expected


@pytest.mark.parametrize("family", DIVERSE)
def test_base_model_and_head_share_a_checkpoint(family: str, tmp_path: Path) -> None:
    _, sparse = pair(family)
    sparse.save_pretrained(tmp_path / "head")
    base = STMoEModel.from_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    ids = token_ids()
    with torch.no_grad():
        expected = sparse.base_model(ids).last_hidden_state
        # Copies: a file's tensors are mapped at addresses that torch's kernels may take another way for.
        assert torch.equal(copy.deepcopy(base)(ids).last_hidden_state, expected)
        again = copy.deepcopy(AutoModel.from_pretrained(tmp_path / "base"))
        assert torch.equal(again(ids).last_hidden_state, expected)
        headed = copy.deepcopy(STMoEForCausalLM.from_pretrained(tmp_path / "base"))
        assert torch.equal(headed.base_model(ids).last_hidden_state, expected)


def test_number_of_parameters_is_counted_without_building() -> None:
    for family in DIVERSE:
        _, sparse = pair(family)
        assert sparse.config.num_parameters() == sum(p.numel() for p in sparse.parameters())


def test_other_kinds_of_config_are_refused() -> None:
    for public in (STMoEForCausalLM, STMoEModel, STMoEForSequenceClassification):
        with pytest.raises(ValueError, match=f"config: {public.__name__} needs an STMoEConfig, got LlamaConfig"):
            public(LlamaConfig())


def test_families_resolve_as_attributes_and_unknown_names_do_not() -> None:
    assert families.llama is family_of("llama")
    with pytest.raises(AttributeError, match="no attribute 'lama'"):
        _ = families.lama
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        family_of("lama")


def test_a_model_of_one_family_is_none_of_another() -> None:
    assert not issubclass(family_of("llama").STMoEForCausalLM, family_of("mistral").STMoEForCausalLM)
    assert family_of("qwen2").STMoEForCausalLM is not family_of("qwen3").STMoEForCausalLM


def test_upcycling_twice_gives_the_same_classes() -> None:
    first, second = (upcycle(dense_model("qwen3"), num_experts=2, verify=False) for _ in range(2))
    assert type(first) is type(second)
    assert type(first.config) is type(second.config)


def test_activations_with_tensors_start_from_their_own_values() -> None:
    """Apertus' activation has parameters and constants that its constructor alone knows."""
    dense = dense_model("apertus").model.layers[0].mlp.act_fn
    model = STMoEForCausalLM(STMoEConfig.from_dense(tiny_config("apertus"), num_experts=4))
    fresh = type(dense)()
    for expert in model.model.layers[0].mlp.experts:
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(expert.act_fn.state_dict()[name], tensor), name
