"""Upcycling a model or a folder: what is kept, what is drawn, what is shared, and what is refused."""

import copy
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)

from st_moe import (
    STMoEForCausalLM,
    STMoEForSequenceClassification,
    STMoEModel,
    prove_identity,
    upcycle,
)
from st_moe.conversion import check_checkpoint, load_dense
from st_moe.conversion.recipes import RECIPES, FFNTensors
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import (
    FAMILIES,
    HIDDEN,
    TOLERANCE,
    VOCAB,
    WIDTH,
    dense_model,
    pair,
    relative_difference,
    tiny_config,
    token_ids,
)


def sparse_blocks(model: nn.Module) -> list[SparseBlock]:
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def dense() -> Any:
    return dense_model("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense checkpoint in shards."""
    path = tmp_path / "dense"
    dense_model("llama").save_pretrained(path, max_shard_size="20KB")
    return path


# ---- what comes out ----


def test_the_mixture_is_what_was_asked_for(dense: Any) -> None:
    sparse = upcycle(dense, num_experts=6, num_experts_per_tok=3, balance_loss_coef=0.5, verify=False)
    assert isinstance(sparse, STMoEForCausalLM)
    assert not sparse.training
    assert (sparse.config.num_experts, sparse.config.num_experts_per_tok) == (6, 3)
    assert sparse.config.balance_loss_coef == 0.5
    assert sparse.config.dense_config().to_dict() | {"architectures": None} == dense.config.to_dict() | {
        "architectures": None
    }
    for block in sparse_blocks(sparse):
        assert block.gate.weight.shape == (6, HIDDEN)
        assert block.experts.down_proj.shape == (6, HIDDEN, WIDTH)
        assert all(parameter.requires_grad for parameter in block.parameters())
    defaults = upcycle(dense, verify=False)
    assert (defaults.config.num_experts, defaults.config.num_experts_per_tok) == (8, 2)


def test_the_proof_is_printed_and_kept(dense: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = upcycle(dense, num_experts=4)
    assert capsys.readouterr().out.strip() == str(sparse.identity_proof)
    assert sparse.identity_proof.holds
    assert sparse.identity_proof.max_relative_difference <= TOLERANCE
    silent = upcycle(dense, num_experts=4, verify=False)
    assert capsys.readouterr().out == ""
    assert silent.identity_proof is None
    moved = upcycle(dense, num_experts=4, recipe="drop")
    assert "NOT equal" in capsys.readouterr().out
    assert not moved.identity_proof.holds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dense: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = dense.to(dtype)
    dense.config.dtype = dtype
    sparse = upcycle(dense, num_experts=4, num_shared_experts=1, multiplicative_bias=True)
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}
    assert sparse.config.dtype == dtype
    assert sparse.identity_proof.holds
    sparse.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_generation_config_is_kept_and_copied(dense: Any, tmp_path: Path) -> None:
    dense.generation_config.do_sample = True
    dense.generation_config.top_k = 7
    dense.generation_config.max_new_tokens = 11
    sparse = upcycle(dense, num_experts=2, verify=False)
    assert sparse.generation_config.to_dict() == dense.generation_config.to_dict()
    assert sparse.generation_config is not dense.generation_config
    sparse.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 7


def test_attention_implementation_is_kept(dense: Any) -> None:
    dense.set_attn_implementation("eager")
    sparse = upcycle(dense, num_experts=2, verify=False)
    assert sparse.config._attn_implementation == "eager"
    assert sparse(token_ids(), output_attentions=True).attentions[0] is not None


def test_frozen_parameters_stay_frozen(dense: Any) -> None:
    dense.model.embed_tokens.weight.requires_grad_(False)
    sparse = upcycle(dense, num_experts=2, verify=False)
    assert not sparse.model.embed_tokens.weight.requires_grad
    assert sparse.lm_head.weight.requires_grad


def test_an_experts_implementation_can_be_chosen_afterwards(dense: Any) -> None:
    sparse = upcycle(dense, num_experts=2, verify=False)
    assert sparse.config._experts_implementation == "st_moe"
    sparse.set_experts_implementation("grouped_mm")
    assert prove_identity(dense, sparse).holds


# ---- the dense model ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_left_alone(family: str) -> None:
    dense = copy.deepcopy(pair(family)[0]).train()
    config, before = dense.config.to_dict(), state_of(dense)
    modes = [module.training for module in dense.modules()]
    sparse = upcycle(dense, num_experts=2)
    assert dense.config.to_dict() == config
    assert [module.training for module in dense.modules()] == modes
    ours = {tensor.untyped_storage().data_ptr() for tensor in [*sparse.parameters(), *sparse.buffers()]}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in [*dense.parameters(), *dense.buffers()]}
    assert not ours & theirs
    assert sparse.config is not dense.config
    optimizer = torch.optim.SGD(sparse.train().parameters(), lr=0.5)
    sparse(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    with torch.no_grad():
        for buffer in sparse.buffers():
            buffer.zero_()
    after = dense.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_the_mixture_outlives_the_dense_model(dense: Any) -> None:
    sparse = upcycle(dense, num_experts=2, verify=False)
    with torch.no_grad():
        expected = sparse(token_ids()).logits
        for tensor in [*dense.parameters(), *dense.buffers()]:
            tensor.zero_()
        assert torch.equal(sparse(token_ids()).logits, expected)


# ---- what is drawn ----


def test_routers_are_drawn_with_the_given_spread(dense: Any) -> None:
    sparse = upcycle(dense, num_experts=64, router_std=0.5, verify=False)
    for block in sparse_blocks(sparse):
        assert block.gate.weight.mean().item() == pytest.approx(0, abs=0.05)
        assert block.gate.weight.std().item() == pytest.approx(0.5, rel=0.1)
    still = upcycle(dense, num_experts=4, router_std=0.0)
    assert not any(block.gate.weight.any() for block in sparse_blocks(still))
    assert still.identity_proof.holds


@pytest.mark.parametrize("recipe", ["copy", "noise", "drop"])
def test_the_seed_decides_everything_random(dense: Any, recipe: str) -> None:
    options = {"num_experts": 4, "recipe": recipe, "verify": False, "num_shared_experts": 1, "ffn_before": True}
    state = torch.get_rng_state()
    first = upcycle(dense, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    torch.manual_seed(77)
    second, other = (upcycle(dense, seed=seed, **options) for seed in (3, 4))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    for name, tensor in first.state_dict().items():
        drawn = "gate.weight" in name or (recipe != "copy" and ".experts." in name)
        if drawn:
            assert not torch.equal(tensor, other.state_dict()[name]), name


# ---- options that keep the function ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "phi3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_shared_experts": 1},
        {"num_shared_experts": 2, "ffn_before": True, "ffn_after": True},
        {"multiplicative_bias": True},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 4},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"capacity_factor": 1.0, "expert_dropout": 0.3, "router_jitter_noise": 0.1},
    ],
    ids=str,
)
def test_extras_keep_the_function(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    dense, _ = pair(family)
    sparse = upcycle(dense, **{"num_experts": 4, **fields})
    assert sparse.identity_proof.max_relative_difference <= TOLERANCE
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, again = token_ids(), loaded.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in sparse.state_dict().items())
    with torch.no_grad():
        # A file's tensors may lie at addresses for which the processor's products round differently.
        assert relative_difference(loaded(ids).logits, sparse(ids).logits) < 1e-6
    block = sparse_blocks(sparse)[0]
    for name in ("shared_experts", "ffn_before", "ffn_after"):
        extra = getattr(block, name)
        if extra is None:
            continue
        assert not extra.down_proj.weight.any()
        assert extra.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
        with torch.no_grad():
            extra.down_proj.weight.normal_()
        assert not prove_identity(dense, sparse).holds, f"{name} does nothing"
        with torch.no_grad():
            extra.down_proj.weight.zero_()


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_topk_prob": False},
        {"second_expert_policy_eval": "none"},
        {"second_expert_policy_eval": "threshold", "second_expert_threshold": 0.9},
        {"eval_capacity_factor": 0.25, "min_capacity": 1},
        {"recipe": "noise", "recipe_options": {"scale": 0.5}},
        {"recipe": "drop"},
    ],
    ids=str,
)
def test_options_that_move_the_function_say_by_how_much(dense: Any, fields: dict[str, Any]) -> None:
    sparse = upcycle(dense, **{"num_experts": 4, **fields})
    assert not sparse.identity_proof.holds
    assert sparse.identity_proof.max_relative_difference > 1e-3


def test_a_mixture_that_should_be_equal_and_is_not_is_an_error(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its full name: the room offers the function under the module's name.
    module = importlib.import_module("st_moe.conversion.upcycle")
    original = module.read_ffn

    def swapped(ffn: Any) -> FFNTensors:
        read = original(ffn)
        gate, up = read.w_in.chunk(2)
        return read._replace(w_in=torch.cat([up, gate]))

    monkeypatch.setattr(module, "read_ffn", swapped)
    with pytest.raises(RuntimeError, match=r"should compute the dense function and does not.*LlamaForCausalLM"):
        upcycle(dense, num_experts=4)
    # Without the proof, or where no equality is promised, nothing is claimed.
    assert upcycle(dense, num_experts=4, verify=False).identity_proof is None
    assert not upcycle(dense, num_experts=4, norm_topk_prob=False).identity_proof.holds


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("fields", [{}, {"recipe": "drop"}, {"norm_topk_prob": False}], ids=str)
def test_weights_that_are_no_numbers_are_named(
    dense: Any, value: str, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight[0, 0] = float(value)
        dense.lm_head.weight[3] = float(value)
    names = r"lm_head\.weight|model\.layers\.1\.mlp\.down_proj\.weight"
    message = rf"^dense: every weight must be finite, but 2 of 21 tensors .*: ({names}), ({names}); take a checkpoint"
    with pytest.raises(ValueError, match=message):
        upcycle(dense, num_experts=4, **fields)
    assert capsys.readouterr().out == "", "no verdict on the mixture, for it is not at fault"


def test_of_many_spoilt_tensors_the_first_are_named(dense: Any) -> None:
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"21 of 21 tensors .*: model\.embed_tokens\.weight(, [\w.]+){4} and 16 more; take"
    ):
        upcycle(dense, num_experts=4)


def test_sound_weights_are_not_searched(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(model: Any) -> None:
        raise AssertionError("every weight was looked at")

    monkeypatch.setattr(importlib.import_module("st_moe.conversion.upcycle"), "_check_finite", search)
    assert upcycle(dense, num_experts=4).identity_proof.holds
    assert not upcycle(dense, num_experts=4, recipe="drop").identity_proof.holds


# ---- other heads ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "phi3", "qwen3"])
def test_a_classifier_stays_a_classifier(family: str, tmp_path: Path) -> None:
    dense = dense_model(family, AutoModelForSequenceClassification, num_labels=3)
    sparse = upcycle(dense, num_experts=4)
    assert isinstance(sparse, STMoEForSequenceClassification)
    assert sparse.config.num_labels == 3
    assert sparse.identity_proof.holds
    ids = token_ids()
    with torch.no_grad():
        expected, actual = dense(ids).logits, sparse(ids).logits
    assert relative_difference(actual, expected) <= TOLERANCE
    dense.config.architectures = [type(dense).__name__]
    dense.save_pretrained(tmp_path)
    from_disk = upcycle(tmp_path, num_experts=4)
    assert isinstance(from_disk, STMoEForSequenceClassification)
    assert all(torch.equal(tensor, from_disk.state_dict()[name]) for name, tensor in sparse.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "phi3", "qwen3"])
def test_a_classifier_without_a_pad_token_is_proven_too(family: str, tmp_path: Path) -> None:
    dense = dense_model(family, AutoModelForSequenceClassification, num_labels=3, pad_token_id=None)
    dense.config.architectures = [type(dense).__name__]
    dense.save_pretrained(tmp_path)
    for source in (dense, tmp_path):
        sparse = upcycle(source, num_experts=4)
        assert sparse.config.pad_token_id is None
        assert sparse.identity_proof.holds
        assert sparse.identity_proof.num_tokens == 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_a_base_model_stays_a_base_model(family: str) -> None:
    dense = dense_model(family, AutoModel)
    sparse = upcycle(dense, num_experts=4)
    assert isinstance(sparse, STMoEModel)
    ids = token_ids()
    with torch.no_grad():
        expected, actual = dense(ids).last_hidden_state, sparse(ids).last_hidden_state
    assert relative_difference(actual, expected) <= TOLERANCE


# ---- from disk ----


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_gives_what_its_model_gives(folder: Path, kind: type) -> None:
    expected = upcycle(AutoModelForCausalLM.from_pretrained(folder), num_experts=4, seed=2)
    actual = upcycle(kind(folder), num_experts=4, seed=2)
    assert type(actual) is type(expected)
    assert all(torch.equal(tensor, actual.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert actual.identity_proof.holds
    assert actual.generation_config.to_dict() == expected.generation_config.to_dict()


def test_a_folder_keeps_its_dtype(tmp_path: Path) -> None:
    dense_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert upcycle(tmp_path, num_experts=2, verify=False).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_keeps_its_ties(tmp_path: Path, tied: bool) -> None:
    dense_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    sparse = upcycle(tmp_path, num_experts=2)
    assert (sparse.lm_head.weight is sparse.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_on_meta_becomes_a_mixture_on_meta(recipe: str) -> None:
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(tiny_config("llama"))
    wanted: dict[str, Any] = {"recipe": recipe, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}
    sparse = upcycle(dense, **wanted)
    expected = upcycle(dense_model("llama"), verify=False, **wanted)
    assert {parameter.device.type for parameter in sparse.parameters()} == {"meta"}
    shapes = {name: tensor.shape for name, tensor in sparse.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}
    assert sparse.identity_proof is None


# ---- what is refused: one clear error each ----


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def truncated(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def not_safetensors(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\x80\x04K\x01.")


def missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()


def pickle_only(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def index_points_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    name = next(iter(stored["weight_map"]))
    stored["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(stored))
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder.parent / "elsewhere.safetensors")


def index_points_to_an_absolute_path(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"][next(iter(stored["weight_map"]))] = str(folder.parent / "elsewhere.safetensors")
    index.write_text(json.dumps(stored))


def index_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("weights")


def index_without_weight_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')


def already_sparse(folder: Path) -> None:
    shutil.rmtree(folder)
    upcycle(dense_model("llama"), num_experts=2, verify=False).save_pretrained(folder)


def without_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))


def with_a_tensor_too_many(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    no_weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without_config, "source: must hold config.json"),
        (config_is_no_json, r"source: .*config\.json must be JSON"),
        (truncated, r"source: .*model-00002.*must be a whole safetensors file"),
        (not_safetensors, r"source: .*model-00001.*must be a whole safetensors file"),
        (missing_shard, r"source: .*index\.json names 'model-00001.*which is missing"),
        (no_weights, "source: must hold model.safetensors or its index"),
        (pickle_only, r"weights must be safetensors, but .* holds pickles \(pytorch_model\.bin\)"),
        (index_points_outside, "must name safetensors files of its own folder, got '../elsewhere.safetensors'"),
        (index_points_to_an_absolute_path, "must name safetensors files of its own folder, got '/"),
        (index_is_no_json, r"index\.json must be JSON"),
        (index_without_weight_map, r"index\.json must be a JSON object with a weight_map"),
        (index_of_nothing, "index.json"),
        (already_sparse, "source: must be a dense model, but .* already is a mixture"),
        (without_a_tensor, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (with_a_tensor_too_many, r"model\.layers\.9\.mlp\.up_proj\.weight"),
    ],
)
def test_a_faulty_folder_is_one_clear_error(folder: Path, fault: Callable[[Path], None], message: str) -> None:
    fault(folder)
    with pytest.raises(ValueError, match=message):
        upcycle(folder, num_experts=2)


def test_a_sound_folder_passes_the_checks(folder: Path) -> None:
    check_checkpoint(folder)
    assert type(load_dense(folder)).__name__ == "LlamaForCausalLM"
    check_checkpoint("org/name-on-the-hub")


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such-folder", "../no-such", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=f"source: must be a checkpoint folder .* but {source} does not exist"):
        upcycle(source)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"source: must be a checkpoint folder, but .*config\.json is a file"):
        upcycle(folder / "config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "clone"}, "recipe: must be one of copy, noise, drop, .*, got 'clone'"),
        (
            {"recipe": "drop", "recipe_options": {"rate": 0.5}},
            "recipe_options: 'drop' takes ratio, shared_set, got rate",
        ),
        ({"recipe": "drop", "recipe_options": {"ratio": 2.0}}, r"recipe_options: ratio must be in \[0, 1\], got 2.0"),
        ({"recipe": "drop", "recipe_options": {"ratio": "x"}}, "recipe_options: ratio must be a real number, got 'x'"),
        ({"router_std": -0.1}, "router_std: must not be negative, got -0.1"),
        ({"router_std": float("nan")}, "router_std: must not be negative, got nan"),
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok: must be between 1 and num_experts=2, got 3",
        ),
        ({"num_experts": 0}, "num_experts: must be at least 1, got 0"),
        ({"sparse_layers": [2]}, r"sparse_layers: .* fit 2 layers, got \[2\]"),
        ({"sparse_layers": [-1]}, r"sparse_layers: .* got \[-1\]"),
        ({"sparse_layers": [0, 0]}, r"sparse_layers: .*distinct.* got \[0, 0\]"),
        ({"sparse_layers": []}, r"sparse_layers: .* got \[\]"),
        ({"sparse_layers": "every:3"}, "sparse_layers: .* got 'every:3'"),
        ({"sparse_layers": "first:1"}, "sparse_layers: .* got 'first:1'"),
        ({"router_type": "topk"}, "router_type: must be one of .*top_k"),
        (
            {"moe_intermediate_size": 24},
            "moe_intermediate_size: recipe 'copy' keeps the dense width, 48 in layer 0, got 24",
        ),
        ({"num_expert": 4}, "num_expert: is not a field of STMoEConfig; did you mean 'num_experts'"),
        ({"num_experts": 2, "num_experts_per_tok": 3, "min_capacity": 0}, r"2 invalid field\(s\)"),
    ],
    ids=str,
)
def test_a_faulty_field_is_one_clear_error(dense: Any, fields: dict[str, Any], message: str) -> None:
    before = state_of(dense)
    with pytest.raises(ValueError, match=message):
        upcycle(dense, **fields)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in before.items())


def test_the_dense_width_may_be_spelt_out(dense: Any) -> None:
    assert upcycle(dense, num_experts=2, moe_intermediate_size=WIDTH).identity_proof.holds


def test_a_mixture_is_not_upcycled_again(dense: Any) -> None:
    sparse = upcycle(dense, num_experts=2, verify=False)
    for model in (sparse, sparse.model):
        with pytest.raises(ValueError, match="dense: must be a dense model, got a mixture"):
            upcycle(model, num_experts=2)


def test_a_quantised_model_is_refused(dense: Any) -> None:
    dense.hf_quantizer = object()
    with pytest.raises(ValueError, match="dense: must not be quantised"):
        upcycle(dense, num_experts=2)


def test_a_quantised_folder_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quanti"):
        upcycle(folder, num_experts=2)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, 3, {"a": 1}], ids=repr)
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match=r"dense: must be a Transformers model, a folder or a Hub name, got \w+"):
        upcycle(thing)


def test_heads_without_a_sparse_counterpart_are_refused() -> None:
    dense = dense_model("llama", AutoModelForQuestionAnswering)
    with pytest.raises(ValueError, match="'llama', got LlamaForQuestionAnswering"):
        upcycle(dense, num_experts=2)


def test_encoders_without_a_decoder_config_are_no_causal_models() -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=WIDTH
    )
    dense = BertModel(config).eval()
    sparse = upcycle(dense, num_experts=3)
    assert isinstance(sparse, STMoEModel)
    ids = token_ids()
    with torch.no_grad():
        assert relative_difference(sparse(ids).last_hidden_state, dense(ids).last_hidden_state) <= TOLERANCE


def test_a_family_that_is_sparse_already_is_refused() -> None:
    dense = AutoModelForCausalLM.from_config(tiny_config("mixtral", num_local_experts=4))
    with pytest.raises(ValueError, match="dense_model_type: no mixture can be made from 'mixtral': each of its layers"):
        upcycle(dense, num_experts=2)


@pytest.mark.parametrize("fields", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts": 3}], ids=str)
@pytest.mark.parametrize("recipe", ["copy", "shared"])
def test_experts_share_memory_with_nothing(recipe: str, fields: dict[str, Any]) -> None:
    dense = dense_model("gpt2")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = upcycle(dense, recipe=recipe, verify=False, **fields)
    for block in sparse.base_model.sparse_blocks:
        for parameter in block.experts.parameters():
            assert parameter.is_contiguous()
            rest = parameter[1:].clone()
            with torch.no_grad():
                parameter[0] += 1
            assert torch.equal(parameter[1:], rest)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
