"""The model classes: loading, outputs, invariances, capacity, policies, and the losses of whole models."""

import copy
import inspect
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from st_moe import STMoEConfig, STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel, upcycle
from st_moe.modeling import Routing, STMoECausalLMOutput, STMoEModelOutput, STMoESequenceClassifierOutput
from st_moe.modeling.routing import TopKRouter
from st_moe.modeling.routing.scope import RoutingScope, activate, active_scope, token_mask_of
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import (
    HIDDEN,
    LAYERS,
    TOLERANCE,
    VOCAB,
    WIDTH,
    assert_same_gradients,
    dense_model,
    gradients,
    mixture,
    pair,
    perturb,
    relative_difference,
    sharpen,
    tiny_config,
    token_ids,
)

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "st_moe")


def sparse_blocks(model: nn.Module) -> list[SparseBlock]:
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


def logits_of(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    difference = relative_difference(actual, expected)
    assert difference <= tolerance, f"{difference:.1e}"


def routings(model: nn.Module, *args: Any, **kwargs: Any) -> list[Routing]:
    """What the routers hand out in one forward pass, in the order of the layers."""
    found: list[Routing] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        for module in model.modules()
        if isinstance(module, TopKRouter)
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


# ---- saving and loading ----


def test_sharded_checkpoint_is_safetensors_with_an_index(tmp_path: Path) -> None:
    model = mixture(num_hidden_layers=4)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    names = {path.name for path in tmp_path.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names == shards | {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert len(shards) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert set(index["weight_map"].values()) == shards
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_experts_are_stored_as_stacked_tensors() -> None:
    state = mixture().state_dict()
    shapes = {name: tuple(state[f"model.layers.1.mlp.{name}"].shape) for name in ("gate.weight", "experts.down_proj")}
    assert shapes == {"gate.weight": (4, HIDDEN), "experts.down_proj": (4, HIDDEN, WIDTH)}
    assert state["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 2 * WIDTH, HIDDEN)
    ungated = mixture("gpt2").state_dict()
    assert ungated["transformer.h.0.mlp.experts.up_proj"].shape == (4, WIDTH, HIDDEN)
    assert ungated["transformer.h.0.mlp.experts.up_proj_bias"].shape == (4, WIDTH)
    assert ungated["transformer.h.0.mlp.experts.down_proj_bias"].shape == (4, HIDDEN)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    dense = dense_model("llama", tie_word_embeddings=tied)
    sparse = upcycle(dense, num_experts=2, verify=False)
    sparse.save_pretrained(tmp_path)
    fresh = STMoEForCausalLM(sparse.config)
    for model in (sparse, STMoEForCausalLM.from_pretrained(tmp_path), fresh, copy.deepcopy(sparse)):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert model.config.tie_word_embeddings is tied
    assert sparse.lm_head.weight is not dense.lm_head.weight
    ids = token_ids()
    assert torch.equal(logits_of(STMoEForCausalLM.from_pretrained(tmp_path), ids), logits_of(sparse, ids))
    sparse.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not tied


def test_construction_on_meta_allocates_nothing() -> None:
    config = STMoEConfig.from_dense(tiny_config("llama"), num_experts=4)
    with torch.device("meta"):
        model = STMoEForCausalLM(config)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(STMoEForCausalLM(config).state_dict())


class _AllocationShapes(TorchDispatchMode):
    """Shapes of every tensor that any operator makes outside of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.device.type != "meta":
            self.shapes.add(tuple(output.shape))
        return output


def test_construction_never_allocates_the_dense_ffns() -> None:
    dense_shapes = {(WIDTH, HIDDEN), (HIDDEN, WIDTH)}
    with _AllocationShapes() as control:
        LlamaForCausalLM(tiny_config("llama"))
    assert dense_shapes <= control.shapes
    with _AllocationShapes() as seen:
        STMoEForCausalLM(STMoEConfig.from_dense(tiny_config("llama"), num_experts=4))
    assert (4, HIDDEN, WIDTH) in seen.shapes
    assert not dense_shapes & seen.shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path / "full")
    half = STMoEForCausalLM.from_pretrained(tmp_path / "full", dtype=dtype)
    assert half.config.dtype == dtype
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    ids = token_ids()
    output = half(ids, labels=ids, output_router_logits=True)
    assert output.logits.dtype == dtype
    assert {logits.dtype for logits in output.router_logits} == {torch.float32}
    assert output.balance_loss.dtype == torch.float32
    assert_close(output.logits.float(), logits_of(model, ids), tolerance=0.1)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert torch.equal(logits_of(again, ids), logits_of(half, ids))


def test_autocast_computes_experts_in_its_dtype() -> None:
    dense, sparse = pair("llama")
    seen: list[torch.dtype] = []
    hook = sparse_blocks(sparse)[0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (logits_of(model, token_ids()).float() for model in (dense, sparse))
    hook.remove()
    assert_close(actual, expected, tolerance=2e-2)
    assert relative_difference(actual, logits_of(dense, token_ids())) > 1e-5
    assert len(seen) == 1


def test_device_map_and_disk_offload(tmp_path: Path) -> None:
    model = mixture(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    ids = token_ids()
    expected = logits_of(model, ids)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert torch.equal(
            logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map), ids), expected
        )
    places = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    places |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[2].mlp.experts.down_proj.device.type == "meta"
    assert offloaded.model.layers[0].mlp.experts.down_proj.device.type == "cpu"
    assert torch.equal(logits_of(offloaded, ids), expected)


def test_automatic_disk_offload_splits_between_layers(tmp_path: Path) -> None:
    model = mixture(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size * 2 // 3}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(name.endswith(("gate", "experts")) for name in loaded.hf_device_map)
    ids = token_ids()
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    generated = loaded.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied: bool, tmp_path: Path) -> None:
    model = mixture(tie_word_embeddings=tied)
    ids = token_ids()
    expected = logits_of(model, ids)
    model.resize_token_embeddings(VOCAB + 8)
    assert model.config.vocab_size == VOCAB + 8
    assert model.model.embed_tokens.weight.shape == (VOCAB + 8, HIDDEN)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    actual = logits_of(model, ids)
    assert actual.shape[-1] == VOCAB + 8
    assert torch.equal(actual[..., :VOCAB], expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), actual)


def test_dense_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path)
    for public in (STMoEForCausalLM, STMoEModel, STMoEForSequenceClassification):
        with pytest.raises(ValueError, match=r"model_type must be 'st_moe', got 'llama'.*st_moe\.upcycle"):
            public.from_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_dense_configs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"needs an STMoEConfig, got LlamaConfig; use STMoEConfig\.from_dense"):
        STMoEForCausalLM(tiny_config("llama"))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = mixture()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        STMoEForCausalLM.from_pretrained(tmp_path)


def test_config_fields_can_be_changed_at_load(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    model = STMoEForCausalLM.from_pretrained(tmp_path, balance_loss_coef=0.5, output_router_logits=True)
    assert model.config.balance_loss_coef == 0.5
    assert len(model(token_ids()).router_logits) == LAYERS
    config = model.config
    config.num_experts_per_tok = 1
    again = STMoEForCausalLM.from_pretrained(tmp_path, config=config)
    assert sparse_blocks(again)[0].gate.top_k == 1


# ---- outputs ----


def test_hidden_states_and_attentions_are_the_familys() -> None:
    dense, sparse = (copy.deepcopy(model) for model in pair("llama"))
    for model in (dense, sparse):
        model.set_attn_implementation("eager")
    ids = token_ids()
    with torch.no_grad():
        expected, actual = (m(ids, output_hidden_states=True, output_attentions=True) for m in (dense, sparse))
    assert len(actual.hidden_states) == LAYERS + 1
    assert len(actual.attentions) == LAYERS
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            assert_close(ours, theirs)
    sparse.config.output_hidden_states = True
    assert len(sparse(ids).hidden_states) == LAYERS + 1
    assert len(sparse.model(ids).hidden_states) == LAYERS + 1


def test_router_logits_have_the_routers_values() -> None:
    model = mixture(num_hidden_layers=3)
    ids = token_ids(2, 7)
    inputs: list[Tensor] = []
    hooks = [
        block.gate.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        for block in sparse_blocks(model)
    ]
    with torch.no_grad():
        found = model(ids, output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
    assert len(found) == len(inputs) == 3
    for logits, hidden, block in zip(found, inputs, sparse_blocks(model), strict=True):
        assert logits.shape == (14, 4)
        assert_close(logits, hidden.float() @ block.gate.weight.T)
    assert relative_difference(found[0], found[1]) > 0.1


@pytest.mark.parametrize("kind", ["head", "base"])
def test_router_logits_follow_the_flag_and_the_argument(kind: str) -> None:
    head = mixture()
    model = head if kind == "head" else head.model
    ids = token_ids()
    assert model(ids).router_logits is None
    asked = model(ids, output_router_logits=True).router_logits
    assert len(asked) == LAYERS
    head.config.output_router_logits = True
    for given, always in zip(asked, model(ids).router_logits, strict=True):
        assert torch.equal(given, always)
    assert model(ids, output_router_logits=False).router_logits is None


def test_router_logits_of_the_base_model_carry_gradients() -> None:
    """Tools that compute losses of their own call the base model."""
    model = mixture().train().model
    output = model(token_ids(), output_router_logits=True)
    assert isinstance(output, STMoEModelOutput)
    torch.cat(output.router_logits).square().mean().backward()
    assert all(block.gate.weight.grad.abs().max() > 0 for block in sparse_blocks(model))


@pytest.mark.parametrize("kind", ["head", "base", "classifier"])
def test_outputs_survive_pickle_copies_and_pytrees(kind: str) -> None:
    """Data parallelism, export and compilation take outputs apart and put them together again."""
    model = mixture(auto=STMoEForSequenceClassification) if kind == "classifier" else mixture()
    model = model.model if kind == "base" else model
    labels = {"classifier": {"labels": torch.tensor([0, 1])}, "head": {"labels": token_ids()}}.get(kind, {})
    with torch.no_grad():
        output = model(token_ids(), output_router_logits=True, output_hidden_states=True, use_cache=False, **labels)
    for twin in (
        pickle.loads(pickle.dumps(output)),
        copy.deepcopy(output),
        tree_map(lambda leaf: leaf, output),
    ):
        assert type(twin) is type(output)
        assert set(twin) == set(output)
        for name, value in output.items():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
            others = twin[name]
            others = others.values() if isinstance(others, dict) else others if isinstance(others, tuple) else [others]
            assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True)), name
            assert twin[name] is getattr(twin, name)


def test_tuples_hold_what_the_output_holds() -> None:
    model = mixture()
    ids = token_ids()
    with torch.no_grad():
        output = model(ids, labels=ids, output_router_logits=True, output_hidden_states=True)
        as_tuple = model(ids, labels=ids, output_router_logits=True, output_hidden_states=True, return_dict=False)
        bare = model(ids, return_dict=False)
        base = model.model(ids, output_router_logits=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(output.to_tuple())
    assert torch.equal(as_tuple[0], output.loss)
    assert any(isinstance(item, Tensor) and torch.equal(item, output.logits) for item in as_tuple)
    assert isinstance(bare, tuple)
    assert torch.equal(bare[0], output.logits)
    assert isinstance(base, tuple)
    assert torch.equal(base[0], output.hidden_states[-1])
    assert all(torch.equal(a, b) for a, b in zip(base[-1], output.router_logits, strict=True))


def test_output_carries_losses_and_statistics_only_where_they_mean_something() -> None:
    model = mixture()
    ids = token_ids()
    plain = model(ids)
    assert set(plain) == {"logits", "past_key_values"}
    labelled = model(ids, labels=ids)
    statistics = {"balance_loss", "router_z_loss", "aux_loss", "aux_losses", "expert_load", "router_entropy"}
    assert statistics | {"loss", "lm_loss", "dropped_fraction"} <= set(labelled)
    assert torch.equal(labelled.loss, labelled.lm_loss)
    assert labelled.expert_load.shape == (LAYERS, 4)
    torch.testing.assert_close(labelled.expert_load.sum(-1), torch.ones(LAYERS))
    assert labelled.router_entropy.shape == labelled.dropped_fraction.shape == (LAYERS,)
    assert not labelled.dropped_fraction.any()
    assert set(labelled.aux_losses) == {"balance_loss", "router_z_loss"}
    assert not any(labelled[name].requires_grad for name in ("expert_load", "router_entropy", "dropped_fraction"))
    training = model.train()(ids)
    assert training.loss is None
    assert training.balance_loss.requires_grad


def test_signature_is_the_familys_with_router_logits() -> None:
    model = mixture()
    names = list(inspect.signature(model.forward).parameters)
    dense = [name for name in inspect.signature(LlamaForCausalLM.forward).parameters if name != "self"]
    assert [name for name in names if name != "output_router_logits"] == dense
    assert inspect.signature(model.forward).return_annotation is STMoECausalLMOutput


def test_arguments_by_position_are_the_familys() -> None:
    model = mixture()
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert torch.equal(logits_of(model, ids, mask), logits_of(model, input_ids=ids, attention_mask=mask))
    assert not torch.equal(logits_of(model, ids, mask), logits_of(model, ids))


def test_logits_to_keep() -> None:
    model = mixture()
    ids = token_ids()
    kept = logits_of(model, ids, logits_to_keep=2)
    assert_close(kept, logits_of(model, ids)[:, -2:])


def test_inputs_embeds_take_the_place_of_ids() -> None:
    model = mixture()
    ids = token_ids()
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    by_embeds = model(inputs_embeds=embeds, attention_mask=mask, labels=ids)
    by_ids = model(ids, attention_mask=mask, labels=ids)
    for name in ("logits", "loss", "balance_loss", "expert_load"):
        assert torch.equal(by_embeds[name], by_ids[name])
    by_embeds.loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_keys_to_ignore_cover_every_other_output(tmp_path: Path) -> None:
    for model in (mixture(), mixture("gpt2"), mixture(auto=STMoEForSequenceClassification)):
        model.config.output_router_logits = True
        labels = token_ids() if isinstance(model, STMoEForCausalLM) else torch.tensor([0, 1])
        output = model(token_ids(), labels=labels)
        assert set(output) - {"loss", "logits"} <= set(model.config.keys_to_ignore_at_inference)
        arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=2)
        rows = [{"input_ids": row, "labels": label} for row, label in zip(token_ids(), labels, strict=True)]
        predicted = Trainer(model, arguments).predict(rows)
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), output.logits.detach())


# ---- implementations ----


def test_attention_implementations_agree(tmp_path: Path) -> None:
    model = mixture()
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    assert model.config._attn_implementation == "sdpa"
    expected = logits_of(model, ids, attention_mask=mask)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    for eager in (model, loaded):
        assert_close(logits_of(eager, ids, attention_mask=mask)[mask.bool()], expected[mask.bool()])
        assert eager(ids, output_attentions=True).attentions is not None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "nemotron"])
@pytest.mark.parametrize("way", ["switch", "load", "build"])
def test_experts_implementations_agree(family: str, way: str, tmp_path: Path) -> None:
    model = mixture(family)
    assert model.config._experts_implementation == "st_moe"
    model.save_pretrained(tmp_path)
    ids = token_ids()
    results = {}
    for name in IMPLEMENTATIONS:
        if way == "switch":
            model.set_experts_implementation(name)
        elif way == "load":
            model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        else:
            state = model.state_dict()
            model = AutoModelForCausalLM.from_config(model.config, experts_implementation=name).eval()
            model.load_state_dict(state)
        assert model.config._experts_implementation == name
        assert model.base_model.config._experts_implementation == name
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results[name] = (output.logits.detach(), gradients(model))
    for logits, found in results.values():
        assert_close(logits, results["eager"][0])
        assert_same_gradients(found, results["eager"][1], tolerance=1e-4)


def test_each_experts_implementation_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = mixture()
    called: list[str] = []
    for name in IMPLEMENTATIONS[1:]:
        original = ALL_EXPERTS_FUNCTIONS[name]

        def counting(*args: Any, _name: str = name, _original: Any = original) -> Tensor:
            called.append(_name)
            return _original(*args)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, name, counting)
        model.set_experts_implementation(name)
        # With gradients: for a few tokens without them, ours may leave the work to a quicker one of the host.
        model(token_ids())
    model.set_experts_implementation("eager")
    model(token_ids())
    assert called == [name for name in IMPLEMENTATIONS[1:] for _ in range(LAYERS)]


def test_unknown_experts_implementations_are_refused(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fastest"):
        model.set_experts_implementation("fastest")
    with pytest.raises(ValueError, match="fastest"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fastest")
    assert model.config._experts_implementation == "st_moe"
    logits_of(model, token_ids())


def test_experts_implementation_is_not_stored(tmp_path: Path) -> None:
    model = mixture()
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "st_moe"


# ---- invariances ----

INVARIANT = ("llama", "gpt2", "bloom", "falcon", "gemma2", "opt")


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("family", INVARIANT)
def test_later_tokens_never_change_earlier_logits(family: str) -> None:
    model = mixture(family)
    ids = token_ids(1, 10)
    expected = logits_of(model, ids)
    for t in range(1, 10):
        changed = ids.clone()
        changed[:, t:] = token_ids(1, 10 - t, seed=t)
        actual = logits_of(model, changed)
        assert_close(actual[:, :t], expected[:, :t])
        assert relative_difference(actual[:, t:], expected[:, t:]) > 1e-2


@pytest.mark.parametrize("family", INVARIANT)
def test_neighbours_in_the_batch_change_nothing(family: str) -> None:
    model = mixture(family)
    ids = token_ids(5)
    together = logits_of(model, ids)
    for row in range(5):
        assert_close(logits_of(model, ids[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", INVARIANT)
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = mixture(family)
    ids = token_ids(2, 9)
    expected = model(ids, labels=ids)
    # The first token of a sequence is nobody's next token; behind padding it would be.
    labels = ids.clone()
    labels[:, 0] = -100
    pad = (4, 0) if side == "left" else (0, 4)
    mask = F.pad(torch.ones_like(ids), pad)
    arguments = {"attention_mask": mask}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = positions(mask)
    for filler in (0, 7):
        padded = model(F.pad(ids, pad, value=filler), labels=F.pad(labels, pad, value=-100), **arguments)
        assert_close(padded.logits[mask.bool()].view_as(expected.logits), expected.logits)
        for name in ("loss", "balance_loss", "router_z_loss", "expert_load", "router_entropy"):
            torch.testing.assert_close(padded[name], expected[name], rtol=1e-4, atol=1e-6)
    unmasked = model(F.pad(ids, pad, value=7), labels=F.pad(labels, pad, value=-100))
    assert (unmasked.router_z_loss - expected.router_z_loss).abs() > 1e-4


@pytest.mark.parametrize("family", INVARIANT)
def test_cache_equals_the_full_forward(family: str) -> None:
    model = mixture(family)
    ids = token_ids(2, 10)
    expected = logits_of(model, ids)
    cache = DynamicCache(config=model.config)
    pieces = []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 10)):
            output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), expected)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 10


def test_cache_with_padding_counts_the_new_tokens_only() -> None:
    model = mixture()
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], position_ids=positions(mask)[:, :6], past_key_values=cache)
        step = model(
            ids[:, 6:],
            attention_mask=mask,
            position_ids=positions(mask)[:, 6:],
            past_key_values=cache,
            labels=ids[:, 6:],
        )
    full = routings(model, ids, attention_mask=mask, position_ids=positions(mask))
    for layer, routing in enumerate(full):
        index = routing.index.view(2, 8, 2)[:, 6:]
        expected = torch.bincount(index.flatten(), minlength=4) / index.numel()
        torch.testing.assert_close(step.expert_load[layer], expected)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_four_dimensional_masks_equal_two_dimensional_ones(kind: str, side: str) -> None:
    model = mixture()
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if side == "right":
        mask = mask.flip(-1)
    causal = torch.ones(8, 8, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    square = causal if kind == "boolean" else torch.zeros(causal.shape).masked_fill(~causal, torch.finfo().min)
    expected, actual = (
        model(ids, attention_mask=given, position_ids=positions(mask), labels=ids.masked_fill(mask == 0, -100))
        for given in (mask, square)
    )
    assert_close(actual.logits[mask.bool()], expected.logits[mask.bool()])
    for name in ("balance_loss", "router_z_loss", "expert_load", "router_entropy"):
        torch.testing.assert_close(actual[name], expected[name])


def test_token_mask_of_every_form() -> None:
    def mask_of(attention_mask: Any, batch: int = 2, length: int = 3) -> list[list[int]]:
        return token_mask_of(attention_mask, batch, length, torch.device("cpu")).int().tolist()

    everything = [[1, 1, 1], [1, 1, 1]]
    assert mask_of(None) == everything
    assert mask_of(torch.tensor([[0, 1, 1], [1, 1, 0]])) == [[0, 1, 1], [1, 1, 0]]
    assert mask_of(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])) == [[1, 1, 1], [0, 1, 0]]
    # Ids of packed sequences, as some collators put them into the mask: whatever is not zero is real.
    assert mask_of(torch.tensor([[1, 1, 2], [1, 0, 0]])) == [[1, 1, 1], [1, 0, 0]]
    assert mask_of({"full_attention": None}) == everything
    assert mask_of(torch.ones(2, 2)) == everything
    square = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    square[..., 0] = False
    assert mask_of(square) == [[0, 1, 1], [0, 1, 1]]


# ---- which layers are sparse ----


@pytest.mark.parametrize(
    ("sparse_layers", "expected"),
    [(None, [0, 1, 2, 3]), ("every:2", [1, 3]), ("every:3", [2]), ("last:1", [3]), ([2, 0], [0, 2]), ((1,), [1])],
)
def test_sparse_layers_choose_layers(sparse_layers: Any, expected: list[int], tmp_path: Path) -> None:
    dense = dense_model("llama", num_hidden_layers=4)
    sparse = upcycle(dense, num_experts=2, sparse_layers=sparse_layers, verify=False)
    assert sparse.config.sparse_layer_indices == expected
    assert [i for i, layer in enumerate(sparse.model.layers) if isinstance(layer.mlp, SparseBlock)] == expected
    ids = token_ids()
    assert_close(logits_of(sparse, ids), logits_of(dense, ids))
    output = sparse(ids, labels=ids, output_router_logits=True)
    assert len(output.router_logits) == len(output.expert_load) == len(expected)
    sparse.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits_of(sparse, ids))


# ---- capacity and second-expert policies ----


def test_capacity_drops_in_training_only() -> None:
    model = mixture(capacity_factor=0.5, min_capacity=1)
    ids = token_ids(3, 16)
    found = routings(model.train(), ids)
    output = model(ids, labels=ids)
    for layer, routing in enumerate(found):
        counted = routing.weight.view(3, 16, 2)
        # floor(16 * 0.5 / 4) = 2 assignments per expert and sequence.
        for sequence, index in zip(counted, routing.index.view(3, 16, 2), strict=True):
            per_expert = torch.bincount(index[sequence > 0], minlength=4)
            assert per_expert.max() <= 2
        dropped = (counted == 0).float().mean()
        torch.testing.assert_close(output.dropped_fraction[layer], dropped)
        assert torch.equal(routing.dropped, routing.weight == 0)
    assert output.dropped_fraction.min() > 0.4
    torch.testing.assert_close(output.expert_load.sum(-1), torch.ones(LAYERS))
    assert not model.eval()(ids, labels=ids).dropped_fraction.any()
    dropless = mixture()
    assert torch.equal(logits_of(model, ids), logits_of(dropless, ids))


def test_ample_capacity_drops_nothing() -> None:
    model = mixture(capacity_factor=4.0).train()
    ids = token_ids(3, 16)
    output = model(ids, labels=ids)
    assert not output.dropped_fraction.any()
    assert_close(output.logits, mixture().train()(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_slot(side: str) -> None:
    """In training with tight capacity, padded and unpadded sequences drop the same assignments."""
    model = mixture(capacity_factor=0.75, min_capacity=1).train()
    ids = token_ids(2, 10)
    labels = ids.clone()
    labels[:, 0] = -100
    expected = model(ids, labels=labels)
    assert expected.dropped_fraction.min() > 0
    pad = (6, 0) if side == "left" else (0, 6)
    mask = F.pad(torch.ones_like(ids), pad)
    padded = model(
        F.pad(ids, pad, value=9),
        attention_mask=mask,
        position_ids=positions(mask),
        labels=F.pad(labels, pad, value=-100),
    )
    assert_close(padded.logits[mask.bool()].view_as(expected.logits), expected.logits)
    for name in ("loss", "balance_loss", "expert_load", "dropped_fraction"):
        torch.testing.assert_close(padded[name], expected[name])
    for routing in routings(model, F.pad(ids, pad, value=9), attention_mask=mask, position_ids=positions(mask)):
        assert not routing.weight[~mask.flatten().bool()].any()
        assert not routing.dropped[~mask.flatten().bool()].any()


@pytest.mark.parametrize(("top_k", "leaks"), [(1, False), (2, True)])
def test_capacity_is_causal_for_one_choice_only(top_k: int, leaks: bool) -> None:
    """All first choices come before any second choice: a later token can push an earlier one's second choice out."""
    model = mixture(num_experts_per_tok=top_k, eval_capacity_factor=1.0, min_capacity=1)
    ids = token_ids(1, 16)
    expected = logits_of(model, ids)
    largest = 0.0
    for seed in range(10):
        changed = ids.clone()
        changed[:, 12:] = token_ids(1, 4, seed=seed)
        largest = max(largest, relative_difference(logits_of(model, changed)[:, :12], expected[:, :12]))
    assert largest > 1e-2 if leaks else largest <= TOLERANCE


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
def test_second_expert_policies(policy: str, train: bool) -> None:
    other = "all" if policy == "none" else "none"
    fields = {"second_expert_policy_train": policy, "second_expert_policy_eval": other}
    if not train:
        fields = {"second_expert_policy_train": other, "second_expert_policy_eval": policy}
    model = mixture(second_expert_threshold=0.3, **fields)
    with torch.no_grad():
        for block in sparse_blocks(model):
            block.gate.weight /= 5
    ids = token_ids(8, 32)
    plain = routings(mixture_like(model), ids)[0]
    assert (plain.weight[:, 1] > 0.3).float().mean().item() == pytest.approx(0.5, abs=0.45)
    routing = routings(model.train(train), ids)[0]
    assert torch.equal(routing.index, plain.index)
    assert_close(routing.weight[:, 0], plain.weight[:, 0])
    second, available = routing.weight[:, 1], plain.weight[:, 1]
    used = second != 0
    assert_close(second[used], available[used]) if used.any() else None
    if policy == "all":
        assert used.all()
    elif policy == "none":
        assert not used.any()
    elif policy == "threshold":
        assert torch.equal(used, available > 0.3)
    else:
        chance = (available / 0.3).clamp(max=1)
        assert used[available >= 0.3].all()
        spread = (chance * (1 - chance)).sum().sqrt()
        assert (used.float().sum() - chance.sum()).abs() <= 4 * spread
        assert 0 < used.float().mean() < 1


def mixture_like(model: Any) -> Any:
    """The same weights without policies."""
    plain = mixture()
    plain.load_state_dict(model.state_dict())
    return plain


# ---- losses of whole models ----


def test_labels_of_minus_100_are_ignored() -> None:
    model = mixture()
    ids = token_ids(2, 10)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[1, 4:] = -100
    output = model(ids, labels=labels)
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    chosen = targets != -100
    torch.testing.assert_close(output.loss, F.cross_entropy(logits[chosen], targets[chosen]))
    # What is not asked for is still routed: the routers' losses count real tokens, not labels.
    torch.testing.assert_close(output.balance_loss, model(ids, labels=ids).balance_loss)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_num_items_in_batch_scales_the_whole_loss(as_tensor: bool, shifted: bool) -> None:
    model = mixture(balance_loss_coef=0.3, router_z_loss_coef=0.2).train()
    ids = token_ids(2, 10)
    labels = ids.clone()
    labels[0, :6] = -100
    total = torch.tensor(50) if as_tensor else 50
    given = {"labels": labels}
    if shifted:
        given = {"labels": labels, "shift_labels": F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()}
    output = model(ids, num_items_in_batch=total, **given)
    targets = labels[:, 1:].flatten()
    here = int((targets != -100).sum())
    assert here == 4 + 9
    lm_loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum") / 50
    torch.testing.assert_close(output.lm_loss, lm_loss)
    expected = lm_loss + (0.3 * output.balance_loss + 0.2 * output.router_z_loss) * here / 50
    torch.testing.assert_close(output.loss, expected)
    whole = model(ids, labels=labels)
    torch.testing.assert_close(whole.loss, whole.lm_loss + 0.3 * whole.balance_loss + 0.2 * whole.router_z_loss)
    torch.testing.assert_close(output.loss * 50, whole.loss * here)


def test_auxiliary_losses_are_live_in_training() -> None:
    ids = token_ids(4, 16)
    found = {}
    for coefficient in (0.0, 1.0):
        model = mixture(balance_loss_coef=coefficient, router_z_loss_coef=0.0).train()
        output = model(ids, labels=ids)
        difference = output.loss - output.lm_loss
        torch.testing.assert_close(difference, coefficient * output.balance_loss, rtol=1e-4, atol=1e-6)
        output.loss.backward()
        found[coefficient] = torch.stack([block.gate.weight.grad for block in sparse_blocks(model)])
    model = mixture(balance_loss_coef=0.0, router_z_loss_coef=0.0).train()
    model(ids, labels=ids).balance_loss.backward()
    alone = torch.stack([block.gate.weight.grad for block in sparse_blocks(model)])
    assert alone.abs().max() > 1e-3
    assert_close(found[1.0] - found[0.0], alone, tolerance=1e-4)


def test_losses_of_the_model_are_means_over_its_layers() -> None:
    model = mixture(num_hidden_layers=3, balance_loss_coef=0.5, router_z_loss_coef=0.25).train()
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    real = mask.flatten().bool()
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    balance, z_loss = [], []
    for logits in output.router_logits:
        logits = logits[real]
        chosen = torch.bincount(logits.argmax(-1), minlength=4) / len(logits)
        balance.append(4 * (chosen * logits.softmax(-1).mean(0)).sum())
        z_loss.append(logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(output.balance_loss, torch.stack(balance).mean())
    torch.testing.assert_close(output.router_z_loss, torch.stack(z_loss).mean())
    torch.testing.assert_close(output.aux_loss, 0.5 * output.balance_loss + 0.25 * output.router_z_loss)
    torch.testing.assert_close(output.loss, output.lm_loss + output.aux_loss)
    assert torch.equal(output.aux_losses["balance_loss"], output.balance_loss)


def test_balance_can_be_asked_for_per_sequence() -> None:
    ids = token_ids(3, 8)
    output = mixture(balance_loss_scope="sequence")(ids, labels=ids, output_router_logits=True)
    expected = []
    for logits in output.router_logits:
        for sequence in logits.view(3, 8, 4):
            chosen = torch.bincount(sequence.argmax(-1), minlength=4) / 8
            expected.append(4 * (chosen * sequence.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(output.balance_loss, torch.stack(expected).mean())
    assert (output.balance_loss - mixture()(ids, labels=ids).balance_loss).abs() > 1e-4


def test_expert_load_counts_assignments() -> None:
    model = mixture()
    ids = token_ids(2, 9)
    output = model(ids, labels=ids)
    for layer, routing in enumerate(routings(model, ids)):
        expected = torch.bincount(routing.index.flatten(), minlength=4) / routing.index.numel()
        torch.testing.assert_close(output.expert_load[layer], expected)
        p = routing.logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean() / math.log(4)
        torch.testing.assert_close(output.router_entropy[layer], entropy)


def test_jitter_and_expert_dropout_act_in_training_only() -> None:
    ids = token_ids()
    for fields in ({"router_jitter_noise": 0.3}, {"expert_dropout": 0.5}):
        model = mixture(**fields)
        assert torch.equal(logits_of(model, ids), logits_of(mixture(), ids))
        model.train()
        first, second = (logits_of(model, ids) for _ in range(2))
        assert relative_difference(first, second) > 1e-3
        torch.manual_seed(3)
        again = logits_of(model, ids)
        torch.manual_seed(3)
        assert torch.equal(logits_of(model, ids), again)


# ---- sequence classification ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "falcon", "qwen3", "phi3"])
def test_sequence_classifier_trains_and_loads(family: str, tmp_path: Path) -> None:
    model = mixture(family, auto=STMoEForSequenceClassification, num_labels=3, balance_loss_coef=0.5).train()
    ids = token_ids(6, 10)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(8):
        output = model(ids, attention_mask=mask, labels=labels)
        assert isinstance(output, STMoESequenceClassifierOutput)
        aux = 0.5 * output.balance_loss + 1e-3 * output.router_z_loss
        torch.testing.assert_close(output.loss, output.lm_loss + aux)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(block.gate.weight.grad.abs().max() > 0 for block in sparse_blocks(model))
        optimizer.step()
        history.append(output.lm_loss.item())
    assert output.logits.shape == (6, 3)
    assert history[-1] < 0.7 * history[0]
    model.eval()
    evaluated = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(evaluated.loss, F.cross_entropy(evaluated.logits.float(), labels))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.architectures == ["STMoEForSequenceClassification"]
    assert torch.equal(logits_of(loaded, ids, attention_mask=mask), evaluated.logits)


def test_the_auxiliary_loss_of_a_classifier_is_live() -> None:
    found = []
    for coefficient in (0.0, 1.0):
        model = mixture(auto=STMoEForSequenceClassification, balance_loss_coef=coefficient).train()
        model(token_ids(4), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        found.append(sparse_blocks(model)[0].gate.weight.grad)
    assert relative_difference(found[1], found[0]) > 1e-2


# ---- the scope of a forward pass ----


def test_no_scope_outlives_a_forward_pass() -> None:
    model = mixture()
    ids = token_ids()
    for callee in (model, model.model):
        callee(ids)
        assert active_scope() is None
        with pytest.raises((IndexError, RuntimeError)):
            callee(torch.full((1, 4), VOCAB + 50))
        assert active_scope() is None
    failing = model.model.layers[1].register_forward_pre_hook(_fail)
    for callee in (model, model.model):
        with pytest.raises(ZeroDivisionError):
            callee(ids)
        assert active_scope() is None
    failing.remove()
    expected = mixture()(ids, labels=ids)
    actual = model(ids, labels=ids)
    assert torch.equal(actual.expert_load, expected.expert_load)
    assert torch.equal(actual.loss, expected.loss)


def _fail(*args: Any) -> None:
    raise ZeroDivisionError


def test_scopes_nest_and_come_back() -> None:
    outer, inner = RoutingScope(), RoutingScope()
    with activate(outer):
        with activate(inner):
            assert active_scope() is inner
        assert active_scope() is outer
    assert active_scope() is None


def test_a_mixture_inside_of_another_keeps_its_routing_to_itself() -> None:
    model, other = mixture(), mixture(seed=5, num_hidden_layers=3)
    ids = token_ids()
    expected = model(ids, labels=ids)
    hook = model.model.layers[0].register_forward_hook(lambda *_: other(token_ids(3, 5)) and None)
    actual = model(ids, labels=ids)
    hook.remove()
    assert torch.equal(actual.expert_load, expected.expert_load)
    assert torch.equal(actual.balance_loss, expected.balance_loss)


def test_threads_keep_their_routing_apart() -> None:
    model = mixture()
    batches = [token_ids(2, 6 + seed, seed=seed) for seed in range(6)]

    def run(ids: Tensor) -> Tensor:
        return model(ids, labels=ids).expert_load

    expected = [run(ids) for ids in batches]
    with ThreadPoolExecutor(3) as pool:
        for actual, load in zip(pool.map(run, batches * 2), expected * 2, strict=True):
            assert torch.equal(actual, load)


def test_a_block_on_its_own_counts_every_token() -> None:
    block = sparse_blocks(mixture())[0]
    hidden = torch.randn(2, 5, HIDDEN)
    with torch.no_grad():
        assert_close(block(hidden).flatten(0, 1), block(hidden.flatten(0, 1)))


def test_perturbed_and_sharpened_mixtures_route_differently() -> None:
    """What these tests lean on holds: experts differ and are all used."""
    model = mixture()
    output = model(token_ids(4, 16), labels=token_ids(4, 16))
    assert output.expert_load.min() > 0.02
    assert output.router_entropy.max() < 0.95
    dull = mixture()
    with torch.no_grad():
        for block in sparse_blocks(dull):
            block.gate.weight /= 10
    perturb(dull, std=0.0)
    sharpen(dull)
    torch.testing.assert_close(logits_of(dull, token_ids()), logits_of(model, token_ids()))
