"""The sparse block: router, experts, shared experts and extra dense FFNs, against the formulas they stand for.

Shape letters: B sequences, S tokens per sequence, T = B * S, H hidden size, I width, E experts, K choices.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig, BloomConfig, GPT2Config

from st_moe import STMoEConfig, STMoEForCausalLM, locate_ffns
from st_moe.modeling.experts import ModuleExperts, STMoEExperts
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.routing.scope import RoutingScope, activate
from st_moe.modeling.sparse_block import DenseFFN, SparseBlock
from tests.families import mixture
from tests.modeling.reference import (
    assert_close,
    difference,
    location,
    reference_experts,
    small_config,
)

HIDDEN, WIDTH = 8, 12
NEAR = 2e-5


def make_block(ffn: FFNLocation | None = None, **fields: Any) -> SparseBlock:
    """A block with N(0, 0.5) parameters everywhere, in training mode, with this project's experts implementation."""
    config = small_config(**fields)
    config._experts_implementation = "st_moe"
    block = SparseBlock(config, ffn or location())
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def routed(block: SparseBlock, x: Tensor) -> Tensor:
    """The experts' weighted sum from the loop over tokens, [B, S, H]."""
    tokens = x.reshape(-1, x.shape[-1])
    routing = block.gate(tokens, torch.ones(x.shape[:2], dtype=torch.bool))
    experts = block.experts
    assert isinstance(experts, STMoEExperts)
    gated = experts.in_name == "gate_up_proj"
    p = experts.parameters_of_all()
    return reference_experts(tokens, routing.index, routing.weight, p, experts.act_fn, gated).view_as(x)


def dense(ffn: DenseFFN, x: Tensor, normed: bool) -> Tensor:
    """A dense FFN written out, [B, S, H]."""
    if normed:
        eps = torch.finfo(x.dtype).eps
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * ffn.norm.weight

    def linear(module: nn.Linear, value: Tensor) -> Tensor:
        out = value @ module.weight.t()
        return out if module.bias is None else out + module.bias

    if ffn.gate_proj is None:
        return linear(ffn.down_proj, ffn.act_fn(linear(ffn.up_proj, x)))
    return linear(ffn.down_proj, ffn.act_fn(linear(ffn.gate_proj, x)) * linear(ffn.up_proj, x))


def formula(block: SparseBlock, x: Tensor) -> Tensor:
    """x1 = x + before(x); x2 = x1 + moe(x1) + shared(x1); x3 = x2 + after(x2); the block's output is x3 - x."""
    x1 = x if block.ffn_before is None else x + dense(block.ffn_before, x, normed=True)
    x2 = x1 + routed(block, x1)
    if block.shared_experts is not None:
        shared = dense(block.shared_experts, x1, normed=False)
        if block.shared_expert_gate is not None:
            shared = shared / (1 + (-(x1 @ block.shared_expert_gate.weight[0])).exp())[..., None]
        x2 = x2 + shared
    x3 = x2 if block.ffn_after is None else x2 + dense(block.ffn_after, x2, normed=True)
    return x3 - x


def parameter_gradients(output: Tensor, cotangent: Tensor, x: Tensor, block: nn.Module) -> dict[str, Tensor]:
    named = {"x": x, **dict(block.named_parameters())}
    return dict(zip(named, torch.autograd.grad(output, list(named.values()), cotangent), strict=True))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_shared_experts": 1},
        {"num_shared_experts": 2, "shared_expert_gate": True},
        {"num_shared_experts": 3, "moe_intermediate_size": 5},
        {"ffn_before": True},
        {"ffn_after": True},
        {"ffn_before": True, "ffn_after": True, "num_shared_experts": 1, "moe_intermediate_size": 5},
    ],
    ids=lambda fields: "+".join(fields) or "plain",
)
def test_values_and_gradients_against_the_formula(fields: dict[str, Any], gated: bool, bias: bool) -> None:
    block = make_block(location(HIDDEN, WIDTH, gated=gated, bias=bias), **fields)
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)
    cotangent = torch.randn(2, 5, HIDDEN)
    actual, expected = block(x), formula(block, x)
    assert_close(actual, expected, NEAR)
    found, wanted = (parameter_gradients(y, cotangent, x, block) for y in (actual, expected))
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-4, name)
        assert gradient.abs().max() > 0, name
    assert difference(routed(block, x), expected) > 0.05 or not fields, "negative control: the extras matter"


def test_negative_controls() -> None:
    """Zero, a dropped token, swapped experts and exchanged extra FFNs are all seen."""
    block = make_block(ffn_before=True, ffn_after=True, num_shared_experts=1)
    x = torch.randn(2, 5, HIDDEN)
    expected = formula(block, x)
    assert difference(torch.zeros_like(expected), expected) > 0.05
    dropped = block(x).clone()
    dropped[1, 2] = 0
    assert difference(dropped, expected) > 0.05
    block.ffn_before, block.ffn_after = block.ffn_after, block.ffn_before
    assert difference(block(x), expected) > 0.05
    block.ffn_before, block.ffn_after = block.ffn_after, block.ffn_before
    assert_close(block(x), expected, NEAR)
    block.experts.down_proj.data = block.experts.down_proj.flip(0)
    assert difference(block(x), expected) > 0.05


def test_widths_of_the_parts() -> None:
    block = make_block(num_shared_experts=3, ffn_before=True, moe_intermediate_size=5)
    assert block.experts.down_proj.shape == (4, HIDDEN, 5)
    assert block.shared_experts is not None
    assert block.ffn_before is not None
    assert block.shared_experts.down_proj.weight.shape == (HIDDEN, 15)
    assert block.ffn_before.down_proj.weight.shape == (HIDDEN, 5)
    assert isinstance(block.shared_experts.norm, nn.Identity)
    assert block.ffn_after is None
    assert make_block().experts.down_proj.shape == (4, HIDDEN, WIDTH)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fresh_extras_add_nothing(family: str) -> None:
    """Step 0 of an upcycled model: extra FFNs and shared experts are there, but their output is zero."""
    fields = {
        "num_experts": 4,
        "ffn_before": True,
        "ffn_after": True,
        "num_shared_experts": 1,
        "shared_expert_gate": True,
    }
    config = small_config(**fields)
    if family == "gpt2":
        config = STMoEConfig.from_dense(GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2), **fields)
    model = STMoEForCausalLM(config).eval()
    blocks = [module for module in model.modules() if isinstance(module, SparseBlock)]
    assert len(blocks) == 2
    x = torch.randn(2, 5, 8)
    for block in blocks:
        assert torch.equal(block(x), block.route(x))
        assert block(x).abs().max() > 0
        for ffn in (block.ffn_before, block.ffn_after, block.shared_experts):
            assert ffn is not None
            assert (ffn.down_proj.weight == 0).all()
            assert ffn.up_proj.weight.abs().max() > 0, "or it could never learn"
            assert ffn(x).abs().max() == 0
        # It learns: the zero projection gets a gradient.
        block(x).square().sum().backward()
        assert block.shared_experts is not None
        assert block.shared_experts.down_proj.weight.grad is not None
        assert block.shared_experts.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, {"ffn_before": True, "ffn_after": True}])
def test_residual_is_added_last(fields: dict[str, Any]) -> None:
    block = make_block(**fields)
    x, residual = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN)
    assert torch.equal(block(x, residual), residual + block(x))
    assert torch.equal(block(x, residual=residual), residual + block(x))


def test_the_layer_that_hands_over_its_residual() -> None:
    """Bloom's FFN is handed the residual and adds it: so does the block, in the model's own forward pass."""
    model = mixture("bloom")
    block = next(module for module in model.modules() if isinstance(module, SparseBlock))
    seen: list[tuple[Any, Tensor]] = []
    block.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    with torch.no_grad():
        model(input_ids=torch.arange(5)[None])
        (x, residual), output = seen[0]
        assert residual.abs().max() > 0
        assert_close(output, residual + block.route(x), 1e-6)
    with torch.device("meta"):
        found = locate_ffns(AutoModelForCausalLM.from_config(BloomConfig(n_layer=1)))
    assert [ffn.adds_residual for ffn in found] == [True]


def test_output_dropout() -> None:
    """Dropout falls on what the dense FFN's output was: the experts' and shared experts' sum, no more."""
    ffn = location(output_dropout=0.5)
    block = make_block(ffn, num_shared_experts=1, ffn_before=True)
    x, residual = torch.randn(2, 50, HIDDEN), torch.randn(2, 50, HIDDEN)
    plain = copy.deepcopy(block).eval()
    assert block.ffn_before is not None
    before = block.ffn_before(x)
    inner = plain(x) - before
    assert_close(plain(x), formula(plain, x), NEAR)
    factors = (block(x, residual) - residual - before) / inner
    kept = factors > 1
    assert_close(factors[kept], torch.full_like(factors[kept], 2.0), 1e-2)
    assert factors[~kept].abs().max() < 1e-2
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(block(x), block(x))


def test_output_dropout_of_gpt2_is_found() -> None:
    config = GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.25)
    with torch.device("meta"):
        found = locate_ffns(AutoModelForCausalLM.from_config(config))
    assert [ffn.output_dropout for ffn in found] == [0.25, 0.25]
    model = STMoEForCausalLM(STMoEConfig.from_dense(config, num_experts=2))
    blocks = [module for module in model.modules() if isinstance(module, SparseBlock)]
    assert [block.output_dropout.p for block in blocks] == [0.25, 0.25]


# Tokens, masks and records.


def test_two_dimensional_inputs() -> None:
    block = make_block(ffn_before=True, num_shared_experts=1)
    x = torch.randn(2, 5, HIDDEN)
    assert_close(block(x.flatten(0, 1)), block(x).flatten(0, 1), 1e-6)


@pytest.mark.parametrize("shape", [(0, 5, HIDDEN), (2, 0, HIDDEN), (0, HIDDEN), (1, 1, HIDDEN)])
def test_few_or_no_tokens(shape: tuple[int, ...]) -> None:
    block = make_block(num_shared_experts=1, ffn_after=True, capacity_factor=1.0)
    x = torch.randn(shape, requires_grad=True)
    output = block(x)
    assert output.shape == shape
    output.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_mask_of_the_scope_reaches_the_router() -> None:
    block = make_block(capacity_factor=0.5, min_capacity=1)
    x = torch.randn(2, 6, HIDDEN)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :3] = False
    with activate(RoutingScope(mask)) as scope:
        output = block(x)
        block(x.flatten(0, 1))
    assert len(scope.records) == 2
    for record in scope.records:
        assert torch.equal(record.token_mask, mask)
        assert torch.equal(record.weight, scope.records[0].weight)
    weight = scope.records[0].weight.view(2, 6, 2)
    assert (weight[~mask] == 0).all(), "under capacity padding takes no slot"
    assert (output[~mask] == 0).all()
    # Capacity is per sequence: left padding leaves the sequence's real tokens as they were without it.
    with activate(RoutingScope(mask[:1, 3:])):
        assert_close(block(x[:1, 3:]), output[:1, 3:], 1e-5)


def test_outside_of_a_forward_pass_every_token_counts() -> None:
    block = make_block(capacity_factor=0.5, min_capacity=1)
    x = torch.randn(2, 6, HIDDEN)
    alone = block(x)
    with activate(RoutingScope(torch.ones(2, 6, dtype=torch.bool))):
        assert torch.equal(block(x), alone)
    with activate(RoutingScope(torch.zeros(3, 5, dtype=torch.bool))):
        assert torch.equal(block(x), alone), "a mask of another shape says nothing about these tokens"


def test_sequences_do_not_see_each_other() -> None:
    block = make_block(capacity_factor=0.7, min_capacity=1, num_shared_experts=1)
    x = torch.randn(4, 6, HIDDEN)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(block(x[order]), block(x)[order], 1e-5)
    assert_close(torch.cat([block(row[None]) for row in x]), block(x), 1e-5)


def test_a_token_that_nobody_takes_gets_zero() -> None:
    block = make_block(capacity_factor=0.01, min_capacity=1, num_experts=2, num_experts_per_tok=1)
    block.gate.weight.data.zero_()
    x = torch.randn(1, 4, HIDDEN)
    output = block(x)
    assert output[0, 0].abs().max() > 0
    assert (output[0, 1:] == 0).all()


# Experts as modules.


class NormedFFN(nn.Module):
    """A gated FFN with an inner norm, which 3-D tensors cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH)
        self.up_proj = nn.Linear(HIDDEN, WIDTH)
        self.inner_norm = nn.LayerNorm(WIDTH)
        self.down_proj = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner_norm(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        output: Tensor = self.down_proj(inner)
        return output


def as_modules() -> FFNLocation:
    return FFNLocation(0, "layers.0.mlp", "module", NormedFFN(), storage="modules", reason="inner_norm")


@pytest.mark.parametrize("choices", [1, 2, 4])
def test_experts_as_modules(choices: int) -> None:
    block = make_block(as_modules(), num_experts_per_tok=choices, second_expert_policy_train="threshold")
    experts = block.experts
    assert isinstance(experts, ModuleExperts)
    assert len({id(expert) for expert in experts}) == len(experts) == 4
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)
    routing = block.gate(x.flatten(0, 1), torch.ones(2, 5, dtype=torch.bool))
    rows = []
    for token, index, weight in zip(x.flatten(0, 1), routing.index, routing.weight, strict=True):
        parts = [w * experts[int(e)](token) for e, w in zip(index, weight, strict=True) if w != 0]
        rows.append(torch.stack(parts).sum(0))
    expected = torch.stack(rows).view_as(x)
    actual = block(x)
    assert_close(actual, expected, NEAR)
    cotangent = torch.randn_like(x)
    named = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad(actual, list(named.values()), cotangent)
    wanted = torch.autograd.grad(expected, list(named.values()), cotangent, allow_unused=True)
    for name, a, b in zip(named, found, wanted, strict=True):
        assert_close(a, torch.zeros_like(a) if b is None else b, 1e-4, name)


def test_a_module_without_tokens_gets_gradients_of_zero() -> None:
    block = make_block(as_modules(), num_experts_per_tok=1)
    block.gate.weight.data.zero_()
    block(torch.randn(2, 5, HIDDEN)).sum().backward()
    experts = block.experts
    assert isinstance(experts, ModuleExperts)
    assert experts[0].down_proj.weight.grad.abs().max() > 0
    for expert in list(experts)[1:]:
        for parameter in expert.parameters():
            assert (parameter.grad == 0).all()


def test_a_real_family_with_an_inner_norm() -> None:
    config = BitNetConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        found = locate_ffns(AutoModelForCausalLM.from_config(config))
    assert [ffn.storage for ffn in found] == ["modules", "modules"]
    assert "ffn_sub_norm" in found[0].reason
    model = STMoEForCausalLM(STMoEConfig.from_dense(config, num_experts=3)).train()
    ids = torch.arange(10).view(2, 5)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.balance_loss > 0.5
    experts = [module for module in model.modules() if isinstance(module, ModuleExperts)]
    assert [len(e) for e in experts] == [3, 3]
    assert all(p.grad is not None for e in experts for p in e.parameters())
    for layer in experts:
        first, second = (expert.gate_proj.weight for expert in list(layer)[:2])
        assert not torch.equal(first, second), "fresh experts differ"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ffn_before": True}, "ffn_before"),
        ({"ffn_after": True}, "ffn_after"),
        ({"num_shared_experts": 2}, "num_shared_experts"),
        ({"moe_intermediate_size": 7}, "moe_intermediate_size=7"),
        ({"multiplicative_bias": True}, "multiplicative_bias=True"),
        ({"expert_dropout": 0.25}, r"expert_dropout=0\.25"),
        ({"expert_dropout": 0.25, "multiplicative_bias": True}, r"multiplicative_bias=True, expert_dropout=0\.25"),
    ],
)
def test_what_whole_modules_cannot_do_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*inner_norm"):
        make_block(as_modules(), **fields)
