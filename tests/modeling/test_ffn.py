"""The FFN locator: where each family keeps its feed-forward networks, what they look like, and what it refuses."""

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import GELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from st_moe import STMoEConfig, STMoEForCausalLM, locate_ffns, prove_identity, upcycle
from st_moe.conversion.recipes import FFNTensors, read_ffn
from st_moe.modeling import LAYOUTS, FFNLayout, FFNLocation
from st_moe.modeling.experts import ModuleExperts
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    TOLERANCE,
    WIDTH,
    dense_model,
    gradients,
    pair,
    relative_difference,
    tiny_config,
    token_ids,
)

#: Path in the last layer, projections into the FFN, gate, fused, Conv1D, bias, activation, width.
EXPECTED: dict[str, tuple[str, tuple[str, ...], str, str, int]] = {
    "llama": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "mistral": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "ministral": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "qwen2": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "qwen3": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "gemma": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "GELUTanh", WIDTH),
    "gemma2": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "GELUTanh", WIDTH),
    "gemma3_text": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "GELUTanh", WIDTH),
    "phi": ("model.layers.1.mlp", ("fc1",), "ungated, bias", "NewGELUActivation", WIDTH),
    "phi3": ("model.layers.1.mlp", ("gate_up_proj",), "gated, fused", "SiLUActivation", WIDTH),
    "stablelm": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "gpt2": ("transformer.h.1.mlp", ("c_fc",), "ungated, Conv1D, bias", "NewGELUActivation", WIDTH),
    "gpt_neox": ("gpt_neox.layers.1.mlp", ("dense_h_to_4h",), "ungated, bias", "GELUActivation", WIDTH),
    "gpt_bigcode": ("transformer.h.1.mlp", ("c_fc",), "ungated, bias", "GELUTanh", WIDTH),
    "opt": ("model.decoder.layers.1", ("fc1",), "ungated, bias", "ReLU", WIDTH),
    "bloom": ("transformer.h.1.mlp", ("dense_h_to_4h",), "ungated, bias", "BloomGelu", 4 * HIDDEN),
    "falcon": ("transformer.h.1.mlp", ("dense_h_to_4h",), "ungated", "GELUActivation", 4 * HIDDEN),
    "olmo2": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "smollm3": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "granite": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "cohere": ("model.layers.1.mlp", ("gate_proj", "up_proj"), "gated", "SiLUActivation", WIDTH),
    "starcoder2": ("model.layers.1.mlp", ("c_fc",), "ungated, bias", "GELUTanh", WIDTH),
    "nemotron": ("model.layers.1.mlp", ("up_proj",), "ungated", "ReLUSquaredActivation", WIDTH),
    "glm4": ("model.layers.1.mlp", ("gate_up_proj",), "gated, fused", "SiLUActivation", WIDTH),
}

#: Families beyond the promised ones whose FFNs teach the locator something else, and what they need to be tiny.
OTHERS: dict[str, dict[str, Any]] = {
    "electra": {"is_decoder": True},
    "bert": {"is_decoder": True},
    "xglm": {"d_model": HIDDEN, "attention_heads": 4, "num_layers": LAYERS, "ffn_dim": WIDTH},
    "gptj": {"rotary_dim": 4, "n_inner": WIDTH},
    "codegen": {"rotary_dim": 4, "n_inner": WIDTH},
    "openai-gpt": {},
    "lfm2": {},
    "modernbert-decoder": {},
    "gemma4_unified_text": {},
}
#: Families whose FFNs 3-D tensors cannot hold, and why.
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "falcon_h1": (
        {
            "mamba_d_ssm": HIDDEN,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mlp_multipliers": [0.5, 2.0],
            "ssm_multipliers": [0.5, 0.7, 1.1, 1.3, 1.7],
        },
        "parts beyond two projections and an activation: gate_multiplier, down_multiplier",
    ),
    "apertus": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "the activation XIELUActivation is not an elementwise module without parameters",
    ),
    "bitnet": ({}, "parts beyond two projections and an activation: ffn_sub_norm"),
}


def on_meta(family: str, **fields: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **fields))


def run_ffn(ffn: FFNTensors, location: FFNLocation, x: Tensor) -> Tensor:
    """The FFN that the tensors stand for, in plain operations."""
    pre = x @ ffn.w_in.T + (0 if ffn.b_in is None else ffn.b_in)
    if location.gated:
        gate, up = pre.split(location.intermediate_size, dim=-1)
        hidden = location.activation(gate) * up
    else:
        hidden = location.activation(pre)
    return hidden @ ffn.w_out.T + (0 if ffn.b_out is None else ffn.b_out)


def test_every_promised_family_has_its_row() -> None:
    assert tuple(EXPECTED) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_ffns_are_found_and_described(family: str) -> None:
    path, projections, kind, activation, width = EXPECTED[family]
    model = on_meta(family)
    locations = locate_ffns(model)
    assert [location.layer for location in locations] == list(range(LAYERS))
    location = locations[1]
    assert location.path == path
    assert location.module is model.get_submodule(path)
    assert location.rule == ("loose" if family == "opt" else "module")
    assert location.layout in LAYOUTS
    assert location.layout is not None
    assert location.layout.projections_in == projections
    assert location.gated is kind.startswith("gated")
    assert location.bias is kind.endswith("bias")
    assert location.conv1d is ("Conv1D" in kind)
    assert (location.hidden_size, location.intermediate_size) == (HIDDEN, width)
    assert type(location.activation).__name__ == activation
    assert location.adds_residual is (family == "bloom")
    assert location.storage == "tensors"
    assert location.reason == ""
    assert location.describe() == f"layer 1: {path} ({kind}, {activation}, {HIDDEN} -> {width})"


@pytest.mark.parametrize("family", FAMILIES)
def test_read_tensors_compute_the_dense_ffn(family: str) -> None:
    dense, _ = pair(family)
    location = locate_ffns(dense)[0]
    x = torch.randn(5, HIDDEN)
    with torch.no_grad():
        if location.rule == "loose":
            expected = location.module.fc2(location.module.activation_fn(location.module.fc1(x)))
        elif location.adds_residual:
            expected = location.module(x, torch.zeros_like(x))
        else:
            expected = location.module(x)
        assert relative_difference(run_ffn(read_ffn(location), location, x), expected) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_locating_changes_nothing(family: str) -> None:
    dense, _ = pair(family)
    before = {name: (id(p), p._version) for name, p in dense.named_parameters()}
    modules = [id(module) for module in dense.modules()]
    locate_ffns(dense)
    assert {name: (id(p), p._version) for name, p in dense.named_parameters()} == before
    assert [id(module) for module in dense.modules()] == modules


@pytest.mark.parametrize(
    ("family", "fields", "probability"),
    [
        ("gpt2", {"resid_pdrop": 0.3}, 0.3),
        ("gpt_bigcode", {"resid_pdrop": 0.3}, 0.3),
        ("starcoder2", {"residual_dropout": 0.3}, 0.3),
        ("bloom", {"hidden_dropout": 0.3}, 0.3),
        # Their layers drop the FFN's output themselves; a second time would be once too often.
        ("phi3", {"resid_pdrop": 0.3}, 0.0),
        ("phi", {"resid_pdrop": 0.3}, 0.0),
        ("opt", {"dropout": 0.3}, 0.0),
        ("gpt_neox", {"hidden_dropout": 0.3}, 0.0),
        ("falcon", {"hidden_dropout": 0.3}, 0.0),
        ("stablelm", {"hidden_dropout": 0.3}, 0.0),
    ],
)
def test_output_dropout_is_kept(family: str, fields: dict[str, Any], probability: float) -> None:
    location = locate_ffns(on_meta(family, **fields))[0]
    assert location.output_dropout == probability
    assert location.storage == "tensors"
    dense = dense_model(family, **fields)
    sparse = upcycle(dense, num_experts=2, verify=False)
    block = next(module for module in sparse.modules() if isinstance(module, SparseBlock))
    assert block.output_dropout.p == probability
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_drops_what_the_dense_model_drops(family: str) -> None:
    """From one seed both draw the same masks, if each dropout is where it was and none is there twice."""
    known = CONFIG_MAPPING[family].__dataclass_fields__
    dropout = {name: 0.2 for name in known if name.endswith(("dropout", "_pdrop", "layerdrop"))}
    dropout |= {"layerdrop": 0.0} if "layerdrop" in known else {}
    dense = dense_model(family, attn_implementation="eager", **dropout)
    sparse = upcycle(dense, num_experts=3, verify=False)
    ids = token_ids()
    outputs = []
    for model in (dense, sparse):
        model.train()
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model(ids, use_cache=False).logits)
    assert relative_difference(outputs[1], outputs[0]) <= TOLERANCE
    if dropout:
        with torch.no_grad():
            assert relative_difference(sparse.eval()(ids).logits, outputs[0]) > 1e-2


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("falcon", {"bias": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"parallel_attn": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("starcoder2", {"use_bias": False}),
        ("opt", {"enable_bias": False}),
        ("opt", {"do_layer_norm_before": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("gpt2", {"activation_function": "relu"}),
        ("nemotron", {"hidden_act": "silu"}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("smollm3", {"mlp_bias": True}),
        ("granite", {"mlp_bias": True}),
    ],
    ids=str,
)
def test_the_options_of_a_family_stay_exact(family: str, fields: dict[str, Any]) -> None:
    dense = dense_model(family, **fields)
    location = locate_ffns(dense)[0]
    assert location.storage == "tensors"
    assert location.bias is (location.linears()[-1].bias is not None)
    sparse = upcycle(dense, num_experts=3, verify=False)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE


@pytest.mark.parametrize("family", OTHERS)
def test_families_beyond_the_promised_ones(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("needs a newer Transformers")
    dense = dense_model(family, **OTHERS[family])
    assert {location.storage for location in locate_ffns(dense)} == {"tensors"}
    sparse = upcycle(dense, num_experts=3, verify=False)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE


def test_split_ffns_are_found_across_two_modules() -> None:
    location = locate_ffns(on_meta("electra", is_decoder=True))[1]
    assert location.rule == "split"
    assert location.path == "electra.encoder.layer.1"
    assert location.describe() == "layer 1: electra.encoder.layer.1 (ungated, bias, GELUActivation, 32 -> 48)"


def test_a_norm_before_a_split_ffn_stays_where_it_is() -> None:
    dense = dense_model("roberta-prelayernorm", is_decoder=True)
    location = locate_ffns(dense)[0]
    assert (location.rule, location.storage) == ("split", "tensors")
    sparse = upcycle(dense, num_experts=2, verify=False)
    norms = [name for name, _ in sparse.named_parameters() if name.endswith("intermediate.LayerNorm.weight")]
    assert len(norms) == LAYERS
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE


def test_a_split_ffn_with_a_norm_between_its_projections_is_refused() -> None:
    """Two modules of a layer cannot be copied as one expert, so what lies between the projections has no place."""
    dense = on_meta("electra", is_decoder=True)
    for layer in dense.electra.encoder.layer:
        layer.intermediate.norm = nn.LayerNorm(WIDTH)
    location = locate_ffns(dense)[0]
    assert location.rule == "split"
    assert location.storage == "none"
    assert location.reason == "parts beyond two projections and an activation: norm"
    with pytest.raises(ValueError, match="layer 0: cannot be made sparse"):
        upcycle(dense, num_experts=2)


@pytest.mark.parametrize("family", ODD)
def test_odd_ffns_become_experts_as_modules(family: str, tmp_path: Any) -> None:
    fields, reason = ODD[family]
    dense = dense_model(family, **fields)
    for location in locate_ffns(dense):
        assert location.storage == "modules"
        assert location.layout is None
        description = location.describe()
        assert description.startswith(f"layer {location.layer}: {location.path} ({type(location.module).__name__})")
        assert "experts as modules" in description
    sparse = upcycle(dense, num_experts=3, verify=False)
    blocks = [module for module in sparse.modules() if isinstance(module, SparseBlock)]
    assert len(blocks) == LAYERS
    assert all(isinstance(block.experts, ModuleExperts) and len(block.experts) == 3 for block in blocks)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE
    with torch.no_grad():
        changed = copy.deepcopy(sparse)
        for parameter in next(m for m in changed.modules() if isinstance(m, ModuleExperts))[1].parameters():
            parameter.mul_(1.5)
    assert prove_identity(dense, changed).max_relative_difference > 1e-4
    assert re.search(reason, locate_ffns(dense)[0].reason)
    ids = token_ids()
    with torch.no_grad():
        expected = sparse(ids).logits
    fresh = STMoEForCausalLM(sparse.config).eval()
    sparse.save_pretrained(tmp_path)
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        assert tensor.isfinite().all(), name
    fresh.load_state_dict(sparse.state_dict())
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path), fresh):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
    sparse.train()(ids, labels=ids).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(sparse).values())


@pytest.mark.parametrize("family", ODD)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"moe_intermediate_size": 16}, "moe_intermediate_size"),
        ({"multiplicative_bias": True}, "multiplicative_bias=True"),
        ({"expert_dropout": 0.1}, "expert_dropout=0.1"),
        ({"num_shared_experts": 1}, "num_shared_experts"),
        ({"ffn_after": True}, "ffn_after"),
        ({"recipe": "drop"}, "recipe: 'drop'"),
        ({"recipe": "noise"}, "recipe: 'noise'"),
    ],
    ids=str,
)
def test_options_that_modules_cannot_have_are_refused(family: str, fields: dict[str, Any], named: str) -> None:
    dense = on_meta(family, **ODD[family][0])
    with pytest.raises(ValueError, match=re.escape(named)):
        upcycle(dense, num_experts=2, verify=False, **fields)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_model_without_ffns_is_refused_with_the_reason(family: str) -> None:
    dense = on_meta(family, num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match="holds no list of layers with a feed-forward network"):
        locate_ffns(dense)
    with pytest.raises(ValueError, match=f"no mixture can be made from '{family}': its layers are a state-space mixer"):
        upcycle(dense, num_experts=2)
    with pytest.raises(ValueError, match=f"no mixture can be made from '{family}'"):
        STMoEForCausalLM(STMoEConfig.from_dense(dense.config, num_experts=2))


def test_an_ffn_with_a_state_is_refused() -> None:
    """RWKV's channel mixing looks back at the token before: tokens cannot be routed apart."""
    dense = on_meta("rwkv", attention_hidden_size=HIDDEN)
    assert {location.storage for location in locate_ffns(dense)} == {"none"}
    with pytest.raises(ValueError, match="its FFN mixes each token with the one before it"):
        upcycle(dense, num_experts=2)


# ---- small models of our own, for what no family does ----


class Layer(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class MLP(nn.Module):
    """gate_proj, up_proj, down_proj and act_fn, to be bent by a test."""

    def __init__(self, bend: Callable[["MLP"], None] = lambda _: None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 12, bias=False)
        self.up_proj = nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.act_fn = nn.SiLU()
        bend(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DroppingMLP(MLP):
    """An FFN that does drop its output, by a module or by a number."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "dropout"):
            return self.dropout(super().forward(x))
        number = self.hidden_dropout if hasattr(self, "hidden_dropout") else self.residual_dropout
        return nn.functional.dropout(super().forward(x), p=number, training=self.training)


class Model(nn.Module):
    """What the locator looks at: a config and a list of layers."""

    def __init__(self, *layers: nn.Module, num_hidden_layers: int | None = None, **config: Any) -> None:
        super().__init__()
        fields = {"num_hidden_layers": len(layers) if num_hidden_layers is None else num_hidden_layers, **config}
        self.config = dataclasses.make_dataclass("Config", fields)(**fields)
        self.layers = nn.ModuleList(layers)


def locate(bend: Callable[[MLP], None]) -> FFNLocation:
    return locate_mlp(MLP(bend))


def locate_mlp(mlp: nn.Module) -> FFNLocation:
    (location,) = locate_ffns(Model(Layer(mlp=mlp)))  # type: ignore[arg-type]
    return location


def bent(**attributes: Any) -> Callable[[MLP], None]:
    return lambda mlp: [setattr(mlp, name, value) for name, value in attributes.items()] and None


@pytest.mark.parametrize(
    ("bend", "reason"),
    [
        (bent(norm=nn.LayerNorm(12)), "norm"),
        (bent(scale=nn.Parameter(torch.ones(12))), "scale"),
        (bent(multiplier=0.5), "multiplier"),
        (bent(act_fn=nn.PReLU()), "the activation PReLU is not an elementwise module without parameters"),
        (bent(gate_proj=nn.Linear(8, 12)), "only some of its projections have a bias"),
        (bent(gate_proj=nn.Linear(8, 16, bias=False)), "projections of widths 16 and 12"),
        (bent(up_proj=nn.Embedding(8, 12)), "match no row of LAYOUTS"),
        (bent(down_proj=None), "match no row of LAYOUTS"),
    ],
)
def test_whatever_tensors_cannot_hold_is_kept_as_modules(bend: Callable[[MLP], None], reason: str) -> None:
    location = locate(bend)
    assert location.storage == "modules"
    assert reason in location.reason
    assert reason in location.describe()


@pytest.mark.parametrize(
    "bend",
    [
        bent(),
        bent(hidden_size=8, intermediate_size=12, layer_idx=3, pretraining_tp=2, is_causal=True),
        bent(dropout=nn.Dropout(0.2)),
        bent(unused=nn.Identity()),
    ],
)
def test_inert_parts_do_not_matter(bend: Callable[[MLP], None]) -> None:
    assert locate(bend).storage == "tensors"


def test_dropout_of_a_module_or_a_number_is_read() -> None:
    def probability(**attributes: Any) -> float:
        location = locate_mlp(DroppingMLP(bent(**attributes)))
        assert location.storage == "tensors"
        return location.output_dropout

    assert probability(dropout=nn.Dropout(0.2)) == 0.2
    assert probability(hidden_dropout=0.3) == 0.3
    assert probability(residual_dropout=0.4) == 0.4
    assert locate(bent()).output_dropout == 0.0


def test_the_activation_comes_from_the_module_or_the_config() -> None:
    def without_activation(mlp: MLP) -> None:
        del mlp.act_fn

    layer = Layer(mlp=MLP(without_activation))
    assert isinstance(locate_ffns(Model(layer, hidden_act="gelu"))[0].activation, GELUActivation)  # type: ignore[arg-type]
    assert isinstance(locate_ffns(Model(layer))[0].activation, SiLUActivation)  # type: ignore[arg-type]
    named = Layer(mlp=MLP(bent(act_fn=None, activation_fn=nn.Tanh())))
    assert isinstance(locate_ffns(Model(named, hidden_act="gelu"))[0].activation, nn.Tanh)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(layout.projections_in))
@pytest.mark.parametrize("conv1d", [False, True])
def test_every_row_of_the_table_is_recognised(layout: FFNLayout, conv1d: bool) -> None:
    def linear(inputs: int, outputs: int) -> nn.Module:
        return Conv1D(outputs, inputs) if conv1d else nn.Linear(inputs, outputs)

    fused = layout.gated and len(layout.projections_in) == 1
    module = nn.Module()
    for name in layout.projections_in:
        put(module, name, linear(8, 24 if fused else 12))
    put(module, layout.projection_out, linear(12, 8))
    module.act = nn.ReLU()
    (location,) = locate_ffns(Model(Layer(ffn=module)))  # type: ignore[arg-type]
    assert location.storage == "tensors", location.reason
    assert location.layout is layout
    assert location.gated is layout.gated
    assert location.conv1d is conv1d
    assert location.bias
    assert (location.hidden_size, location.intermediate_size) == (8, 12)
    tensors = read_ffn(location)
    assert [tuple(t.shape) for t in tensors if t is not None] == (
        [(24, 8), (8, 12), (24,), (8,)] if layout.gated else [(12, 8), (8, 12), (12,), (8,)]
    )
    x = torch.randn(3, 8)
    parts = [linear(x) for linear in location.linears()[:-1]]
    gate_and_up = parts[0].chunk(2, dim=-1) if fused else parts
    hidden = gate_and_up[0].relu() * (gate_and_up[1] if layout.gated else 1)
    torch.testing.assert_close(run_ffn(tensors, location, x), location.linears()[-1](hidden))


def put(module: nn.Module, dotted: str, child: nn.Module) -> None:
    """Add a child under a dotted name."""
    *parents, name = dotted.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    module.add_module(name, child)


def test_layers_are_the_list_that_holds_ffns() -> None:
    """Other lists of the same length come first in some models."""
    model = Model(Layer(mlp=MLP()), Layer(mlp=MLP()))
    model.layers, decoys = None, nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.embeddings = decoys
    model.blocks = nn.ModuleList([Layer(mlp=MLP()), Layer(mlp=MLP())])
    assert [location.path for location in locate_ffns(model)] == ["blocks.0.mlp", "blocks.1.mlp"]  # type: ignore[arg-type]


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = Model(Layer(mlp=MLP()), num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"Model: must have 3 layers .* but the lists found are layers \(1\)"):
        locate_ffns(model)  # type: ignore[arg-type]


def test_layers_without_ffns_are_told_apart_from_those_with() -> None:
    model = Model(Layer(mlp=MLP()), Layer(mixer=nn.Linear(2, 2)), Layer(mlp=MLP(bent(multiplier=3.0))))
    locations = locate_ffns(model)  # type: ignore[arg-type]
    assert [location.storage for location in locations] == ["tensors", "none", "modules"]
    assert locations[1].reason == "no feed-forward network among its parts (mixer)"


def test_only_some_layers_may_be_sparse_where_others_cannot() -> None:
    dense = dense_model("llama", num_hidden_layers=3)
    sparse = upcycle(dense, num_experts=2, sparse_layers=[0, 2], verify=False)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE
    # The dense layer in between is found as it was; what is sparse already is no dense FFN.
    locations = locate_ffns(sparse)
    assert locations[1].storage == "tensors"
