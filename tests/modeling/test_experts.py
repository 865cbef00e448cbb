"""Experts: outputs and every gradient against a plain loop over tokens in float64, for every implementation.

Shape letters: T tokens, H hidden size, I expert width, E experts, K choices per token, A = T * K assignments.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from st_moe import STMoEConfig, STMoEForCausalLM
from st_moe.modeling.experts import STMoEExperts
from st_moe.modeling.kernels import activations
from st_moe.modeling.kernels.sorted_experts import ExpertParameters, sorted_experts
from tests.modeling.reference import (
    assert_close,
    difference,
    location,
    make_experts,
    reference_experts,
)

FP32, BF16, FP16 = 2e-5, 3e-2, 5e-3
NAMES = ("hidden", "weight", "w_in", "w_out", "b_in", "b_out", "scale")
OWN = ("st_moe", "eager")
IMPLEMENTATIONS = (*OWN, "grouped_mm", "batched_mm")
TABLE = [cls for classes, _ in activations.DERIVATIVES for cls in classes]

each_kind = pytest.mark.parametrize(
    ("gated", "bias", "scaled"), [(g, b, s) for g in (True, False) for b in (True, False) for s in (True, False)]
)


class Batch(NamedTuple):
    """What experts are called with, and the gradient of their output."""

    hidden: Tensor
    index: Tensor
    weight: Tensor
    cotangent: Tensor


def batch(tokens: int = 9, hidden: int = 8, experts: int = 4, choices: int = 2, dtype: Any = torch.float32) -> Batch:
    """Random tokens and distinct choices; the last expert gets none if there are enough others."""
    scores = torch.rand(tokens, experts)
    if experts > choices:
        scores[:, -1] = -1
    index = scores.argsort(-1, descending=True)[:, :choices]
    weight = torch.rand(tokens, choices) + 0.1
    return Batch(torch.randn(tokens, hidden, dtype=dtype), index, weight, torch.randn(tokens, hidden, dtype=dtype))


def run(experts: STMoEExperts, data: Batch) -> list[Tensor | None]:
    """Output and the gradients of NAMES of the experts under their present implementation."""
    inputs = [data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()]
    parameters = experts.parameters_of_all()
    output = experts(inputs[0], data.index, inputs[1])
    return [output.detach(), *gradients(output, data.cotangent, [*inputs, *parameters])]


def gradients(output: Tensor, cotangent: Tensor, tensors: list[Tensor | None]) -> list[Tensor | None]:
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, cotangent.to(output.dtype), allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


def expected(experts: STMoEExperts, data: Batch, keep: Tensor | None = None) -> list[Tensor | None]:
    """The same from the loop over tokens in float64."""
    p = [None if t is None else t.detach().double().requires_grad_() for t in experts.parameters_of_all()]
    hidden, weight = data.hidden.double().requires_grad_(), data.weight.double().requires_grad_()
    keep = None if keep is None else keep.double()
    gated = experts.in_name == "gate_up_proj"
    output = reference_experts(hidden, data.index, weight, ExpertParameters(*p), experts.act_fn, gated, keep)
    found = gradients(output, data.cotangent.double(), [hidden, weight, *p])
    wanted = [None if t is None else torch.zeros_like(t) for t in (hidden, weight, *p)]
    return [output.detach(), *(w if f is None else f for f, w in zip(found, wanted, strict=True))]


def assert_agree(actual: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    for name, a, b in zip(("output", *NAMES), actual, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert_close(a, b, tolerance, name)


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        ones = torch.ones(3)
        assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(ones), ones.new_empty(3)))
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def nan_memory() -> Iterator[None]:
    with uninitialised_memory_is_nan():
        yield


# The comparison itself.


def test_comparison_rejects_what_is_wrong() -> None:
    """Negative controls: at every tolerance used here, zero, swapped experts and dropped tokens are seen."""
    experts, data = make_experts(), batch()
    good = expected(experts, data)
    output = good[0]
    assert output is not None
    assert_agree(run(experts, data), good, FP32)
    assert difference(torch.zeros_like(output), output) > BF16
    dropped = output.clone()
    dropped[3] = 0
    assert difference(dropped, output) > BF16
    assert difference(output * float("nan"), output) == float("inf")
    one_choice = data.weight.clone()
    one_choice[5, 1] = 0
    assert difference(run(experts, data._replace(weight=one_choice))[0], output) > BF16
    swapped = data.index.clone()
    swapped[swapped == 0], swapped[data.index == 1] = 1, 0
    wrong = run(experts, data._replace(index=swapped))
    for a, b in zip(wrong, good, strict=True):
        if a is not None and b is not None:
            assert difference(a, b) > BF16
    with pytest.raises(AssertionError, match="shape"):
        assert_close(output[:-1], output, FP32)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_close(output * (1 + 2 * FP32), output, FP32)


def test_reference_is_the_formula() -> None:
    """The loop over tokens, checked by hand on one token: y = w * W2 (silu(g) * u * s) + bias."""
    experts = make_experts(location(2, 1, bias=True), num_experts=1, num_experts_per_tok=1, multiplicative_bias=True)
    p = experts.parameters_of_all()
    x = torch.tensor([[2.0, -1.0]])
    gate = p.w_in[0, 0] @ x[0] + p.b_in[0, 0]
    up = p.w_in[0, 1] @ x[0] + p.b_in[0, 1]
    hidden = gate * torch.sigmoid(gate) * up * p.scale[0, 0]
    wanted = 0.25 * (p.w_out[0, :, 0] * hidden + p.b_out[0])
    actual = reference_experts(x, torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 0.25), p, nn.SiLU(), True)
    assert_close(actual[0], wanted, 1e-6)


# The handwritten kernel.


@each_kind
@pytest.mark.usefixtures("nan_memory")
def test_kernel_outputs_and_gradients(gated: bool, bias: bool, scaled: bool) -> None:
    experts = make_experts(location(8, 12, gated=gated, bias=bias), multiplicative_bias=scaled)
    data = batch()
    actual, wanted = run(experts, data), expected(experts, data)
    assert (actual[NAMES.index("scale") + 1] is not None) == scaled
    assert_agree(actual, wanted, FP32)
    unused = actual[3]
    assert unused is not None
    assert (unused[-1] == 0).all(), "an expert without tokens gets a gradient of zero"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("cls", TABLE, ids=[cls.__name__ for cls in TABLE])
def test_every_activation_of_the_table(cls: type[nn.Module], gated: bool) -> None:
    experts = make_experts(location(8, 12, gated=gated, act=cls()))
    data = batch()
    assert activations.activation_name(experts.act_fn) is not None
    assert_agree(run(experts, data), expected(experts, data), FP32)


@pytest.mark.parametrize("cls", TABLE, ids=[cls.__name__ for cls in TABLE])
def test_derivatives_of_the_table(cls: type[nn.Module]) -> None:
    x = torch.linspace(-6, 6, 241, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn_like(x)
    name = activations.activation_name(cls())
    assert name is not None
    output = activations.apply(name, x)
    (wanted,) = torch.autograd.grad(cls()(x), x, cotangent)
    assert_close(output, cls()(x), 1e-12)
    # Some of the host's GELUs are the same function up to the digits of a constant.
    assert_close(activations.backward(name, cotangent, x.detach()), wanted, 1e-6)


def test_the_hosts_common_activations_have_a_row() -> None:
    named = [name for name in ACT2FN if activations.activation_name(ACT2FN[name]) is not None]
    assert {"silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2", "quick_gelu"} <= set(named)
    assert activations.activation_name(nn.Tanh()) is None
    assert activations.activation_name(nn.GELU(approximate="tanh")) is None, "one name must not mean two functions"


def test_an_activation_without_a_row_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    experts = make_experts(location(8, 12, act=nn.Softplus()))
    data = batch()
    with caplog.at_level(logging.WARNING):
        actual = run(experts, data)
        run(experts, data)
    assert_agree(actual, expected(experts, data), FP32)
    warnings = [record.message for record in caplog.records if "Softplus" in record.message]
    assert len(warnings) == 1, "said once"


@pytest.mark.usefixtures("nan_memory")
@each_kind
def test_dropout(gated: bool, bias: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout scales each assignment's hidden activation by its own factors."""
    experts = make_experts(location(8, 12, gated=gated, bias=bias), multiplicative_bias=scaled, expert_dropout=0.5)
    data = batch()
    keep = (torch.rand(data.index.numel(), 12) < 0.5).float() * 2
    monkeypatch.setattr(experts.dropout, "forward", lambda ones: ones * keep)
    assert_agree(run(experts, data), expected(experts, data, keep), FP32)


@pytest.mark.parametrize("implementation", OWN)
def test_dropout_is_random_in_training_and_absent_in_evaluation(implementation: str) -> None:
    experts = make_experts(implementation=implementation, expert_dropout=0.5)
    data = batch(tokens=400)
    plain = expected(experts.eval(), data._replace(cotangent=torch.zeros_like(data.hidden)))[0]
    assert_close(run(experts, data)[0], plain, FP32)
    experts.train()
    first, second = run(experts, data)[0], run(experts, data)[0]
    assert not torch.equal(first, second)
    mean = torch.stack([experts(data.hidden, data.index, data.weight).detach() for _ in range(400)]).mean(0)
    assert difference(mean, plain) < 0.2, "factors have mean 1"


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "choices"),
    [
        (0, 8, 12, 4, 2),
        (1, 8, 12, 4, 2),
        (1, 1, 1, 1, 1),
        (7, 5, 3, 3, 3),
        (13, 7, 9, 5, 1),
        (3, 16, 33, 8, 4),
        (6, 8, 12, 1, 1),
    ],
)
def test_sizes(tokens: int, hidden: int, width: int, experts: int, choices: int) -> None:
    module = make_experts(location(hidden, width, bias=True), num_experts=experts, num_experts_per_tok=choices)
    data = batch(tokens, hidden, experts, choices)
    actual, wanted = run(module, data), expected(module, data)
    if tokens:
        assert_agree(actual, wanted, FP32)
    else:
        assert actual[0] is not None
        assert actual[0].shape == (0, hidden)
        assert all(g is None or (g == 0).all() for g in actual[1:])


def test_all_tokens_to_one_expert() -> None:
    experts, data = make_experts(), batch(choices=1)
    data = data._replace(index=torch.full_like(data.index, 2))
    assert_agree(run(experts, data), expected(experts, data), FP32)


@each_kind
def test_gradcheck(gated: bool, bias: bool, scaled: bool) -> None:
    experts = make_experts(location(3, 4, gated=gated, bias=bias), num_experts=3, multiplicative_bias=scaled).double()
    data = batch(5, 3, 3)
    name = activations.activation_name(experts.act_fn)
    assert name is not None
    parameters = experts.parameters_of_all()
    keep = torch.rand(data.index.numel(), 4, dtype=torch.float64) + 0.5
    inputs = [data.hidden.double().requires_grad_(), data.weight.double().requires_grad_(), *parameters]

    def function(*tensors: Tensor) -> Tensor:
        present = iter(tensors[2:])
        p = ExpertParameters(*(None if t is None else next(present) for t in parameters))
        return sorted_experts(tensors[0], data.index, tensors[1], p, name, gated, keep)

    assert torch.autograd.gradcheck(function, [t for t in inputs if t is not None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_kind
def test_low_precision(gated: bool, bias: bool, scaled: bool, dtype: torch.dtype) -> None:
    experts = make_experts(location(8, 12, gated=gated, bias=bias), multiplicative_bias=scaled).to(dtype)
    data = batch(dtype=dtype)
    actual = run(experts, data)
    assert actual[0] is not None
    assert actual[2] is not None
    assert actual[0].dtype == dtype
    assert actual[2].dtype == torch.float32, "the weights' gradient keeps the router's type"
    assert_agree(actual, expected(experts, data), BF16 if dtype is torch.bfloat16 else FP16)


def test_second_backward_with_a_retained_graph() -> None:
    experts, data = make_experts(), batch()
    hidden = data.hidden.clone().requires_grad_()
    output = experts(hidden, data.index, data.weight)
    tensors = [hidden, *(p for p in experts.parameters_of_all() if p is not None)]
    first = torch.autograd.grad(output, tensors, data.cotangent, retain_graph=True)
    again = torch.autograd.grad(output, tensors, data.cotangent, retain_graph=True)
    twice = torch.autograd.grad(output, tensors, 2 * data.cotangent)
    for a, b, c in zip(first, again, twice, strict=True):
        assert torch.equal(a, b)
        assert_close(c, 2 * a, 1e-6)


def test_gradients_accumulate() -> None:
    experts, data = make_experts(), batch()
    for _ in range(2):
        experts(data.hidden, data.index, data.weight).backward(data.cotangent)
    wanted = expected(experts, data)
    assert wanted[3] is not None
    assert experts.gate_up_proj.grad is not None
    assert_close(experts.gate_up_proj.grad, 2 * wanted[3], FP32)


def test_double_backward_is_a_clear_error() -> None:
    experts, data = make_experts(), batch()
    hidden = data.hidden.clone().requires_grad_()
    output = experts(hidden, data.index, data.weight)
    (gradient,) = torch.autograd.grad(output, hidden, data.cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward|differentia"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("implementation", OWN)
@pytest.mark.parametrize("frozen", NAMES)
def test_frozen_tensors_get_no_gradient_and_the_others_theirs(frozen: str, implementation: str) -> None:
    experts = make_experts(location(8, 12, bias=True), implementation, multiplicative_bias=True)
    data = batch()
    wanted = expected(experts, data)
    tensors = dict(zip(NAMES, (data.hidden.clone(), data.weight.clone(), *experts.parameters_of_all()), strict=True))
    for name, t in tensors.items():
        assert t is not None
        t.requires_grad_(name != frozen)
    output = experts(tensors["hidden"], data.index, tensors["weight"])
    found = gradients(output, data.cotangent, list(tensors.values()))
    wanted[1 + NAMES.index(frozen)] = None
    assert_agree([output.detach(), *found], wanted, FP32)


def test_only_one_tensor_needs_a_gradient() -> None:
    experts, data = make_experts(location(8, 12, bias=True), multiplicative_bias=True).requires_grad_(False), batch()
    wanted = expected(experts, data)
    tensors = [data.hidden, data.weight, *experts.parameters_of_all()]
    for i, t in enumerate(tensors):
        assert t is not None
        t.requires_grad_(True)
        output = experts(data.hidden, data.index, data.weight)
        (gradient,) = torch.autograd.grad(output, t, data.cotangent)
        t.requires_grad_(False)
        target = wanted[1 + i]
        assert target is not None
        assert_close(gradient, target, FP32, NAMES[i])


def test_nothing_is_saved_without_gradients() -> None:
    experts, data = make_experts(), batch()
    with torch.no_grad():
        quiet = experts(data.hidden, data.index, data.weight)
    assert not quiet.requires_grad
    assert_close(quiet, expected(experts, data)[0], FP32)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_held_elsewhere_are_skipped(weighted: bool) -> None:
    """Under expert parallelism an index of E or more belongs to another rank, whatever its weight."""
    experts, data = make_experts(location(8, 12, bias=True)), batch()
    index = data.index.clone()
    index[::2, 0], index[4, 1] = 4, 7
    weight = data.weight if weighted else data.weight.where(index < 4, 0.0)
    data = data._replace(index=index, weight=weight)
    assert_agree(run(experts, data), expected(experts, data), FP32)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("implementation", OWN)
def test_assignments_of_weight_zero_are_skipped(implementation: str) -> None:
    experts, data = make_experts(location(8, 12, bias=True), implementation), batch()
    weight = data.weight.clone()
    weight[:3, 1] = weight[4] = 0
    data = data._replace(weight=weight)
    actual = run(experts, data)
    assert_agree(actual, expected(experts, data), FP32)
    assert actual[0] is not None
    assert actual[1] is not None
    assert actual[2] is not None
    assert (actual[0][4] == 0).all()
    assert (actual[1][4] == 0).all()
    assert (actual[2][weight == 0] == 0).all(), "an assignment that is not made gets no gradient"


def test_no_assignment_at_all() -> None:
    experts, data = make_experts(), batch()
    actual = run(experts, data._replace(weight=torch.zeros_like(data.weight)))
    assert all(t is None or (t == 0).all() for t in actual)


@pytest.mark.parametrize("implementation", OWN)
def test_a_skipped_assignment_reads_no_other_token(implementation: str) -> None:
    """An overflow in one token stays in that token."""
    experts, data = make_experts(implementation=implementation), batch()
    weight = data.weight.clone()
    weight[2:, 1] = 0
    hidden = data.hidden.clone()
    # Whichever rows the kernel sorts first: all of expert 0's tokens overflow.
    loud = ((data.index == 0) & (weight != 0)).any(1)
    assert loud.any()
    assert not loud.all()
    hidden[loud] = float("inf")
    output = experts(hidden, data.index, weight)
    assert output[~loud].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_need_not_be_contiguous(implementation: str) -> None:
    experts, data = make_experts(implementation=implementation), batch()
    wanted = expected(experts, data)
    strided = Batch(*(t.t().contiguous().t() for t in data))
    assert not any(t.is_contiguous() for t in strided)
    assert_agree(run(experts, strided), wanted, FP32)
    hidden, weight = strided.hidden.detach().requires_grad_(), strided.weight.detach().requires_grad_()
    output = experts(hidden, strided.index, weight)
    found = gradients(output, strided.cotangent, [hidden, weight, *experts.parameters_of_all()])
    assert_agree([output.detach(), *found], wanted, FP32)
    expanded = data.cotangent[:1].expand_as(data.cotangent)
    data = data._replace(cotangent=expanded)
    assert_agree(run(experts, data), expected(experts, data), FP32)


def test_parameters_need_not_be_contiguous() -> None:
    experts, data = make_experts(), batch()
    wanted = expected(experts, data)
    for parameter in experts.parameters():
        parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert_agree(run(experts, data), wanted, FP32)


def test_inputs_are_left_as_they_are() -> None:
    experts, data = make_experts(location(8, 12, bias=True), multiplicative_bias=True), batch()
    before = [t.clone() for t in (*data, *(p for p in experts.parameters_of_all() if p is not None))]
    run(experts, data)
    after = [*data, *(p for p in experts.parameters_of_all() if p is not None)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_results_repeat_to_the_bit() -> None:
    experts, data = make_experts(), batch(tokens=40)
    first, second = run(experts, data), run(experts, data)
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, second, strict=True) if b is not None or a is None)


@each_kind
def test_autocast(gated: bool, bias: bool, scaled: bool) -> None:
    """Under autocast the kernel computes as the plain loop does; gradients keep the parameters' type."""
    ffn = location(8, 12, gated=gated, bias=bias)
    experts, data = make_experts(ffn, multiplicative_bias=scaled), batch()
    wanted = expected(experts, data)
    outputs = {}
    for implementation in OWN:
        experts.config._experts_implementation = implementation
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs[implementation] = run(experts, data)
        assert_agree(outputs[implementation], wanted, BF16)
        assert all(t is None or t.dtype == torch.float32 for t in outputs[implementation])
    assert_agree(outputs["st_moe"], outputs["eager"], BF16)
    assert difference(outputs["st_moe"][0], wanted[0]) > FP32, "autocast did lower the precision"


# The implementations among each other.


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_agree(implementation: str, gated: bool, bias: bool) -> None:
    experts, data = make_experts(location(8, 16, gated=gated, bias=bias), implementation), batch()
    assert_agree(run(experts, data), expected(experts, data), FP32)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("implementation", OWN)
def test_own_implementations_apply_the_multiplicative_bias(implementation: str, gated: bool) -> None:
    experts, data = make_experts(location(8, 16, gated=gated), implementation, multiplicative_bias=True), batch()
    assert_agree(run(experts, data), expected(experts, data), FP32)


@pytest.mark.parametrize("implementation", OWN)
def test_own_implementations_apply_dropout(implementation: str) -> None:
    experts, data = make_experts(implementation=implementation, expert_dropout=0.5), batch()
    assert not torch.equal(*[run(experts, data)[0] for _ in range(2)])


@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - set(OWN)))
@pytest.mark.parametrize(("field", "value"), [("multiplicative_bias", True), ("expert_dropout", 0.5)])
def test_the_hosts_implementations_are_refused_with_what_they_cannot_apply(
    implementation: str, field: str, value: Any
) -> None:
    config = STMoEConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=8, **{field: value})
    with torch.device("meta"):
        model = STMoEForCausalLM(config)
        with pytest.raises(ValueError, match=f"{field}.*got '{implementation}'"):
            model.set_experts_implementation(implementation)
        with pytest.raises(ValueError, match=f"{field}.*got '{implementation}'"):
            AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_agree_on_dropped_assignments(implementation: str) -> None:
    """Weight 0 adds nothing anywhere; the host's implementations still give such a weight its gradient."""
    experts, data = make_experts(location(8, 16, bias=True), implementation), batch()
    weight = data.weight.clone()
    weight[:3, 1] = weight[4] = 0
    data = data._replace(weight=weight)
    actual, wanted = run(experts, data), expected(experts, data)
    assert actual[2] is not None
    actual[2] = actual[2] * (weight != 0)
    assert_agree(actual, wanted, FP32)


def test_unknown_implementation_is_an_error() -> None:
    experts, data = make_experts(implementation="no_such_thing"), batch()
    with pytest.raises(KeyError, match="no_such_thing"):
        run(experts, data)


def test_parameters_and_their_first_values() -> None:
    experts = make_experts(location(8, 12, bias=True), multiplicative_bias=True, num_experts=5, initializer_range=0.3)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {
        "gate_up_proj": (5, 24, 8),
        "gate_up_proj_bias": (5, 24),
        "down_proj": (5, 8, 12),
        "down_proj_bias": (5, 8),
        "multiplicative_bias": (5, 12),
    }
    experts.reset_parameters()
    assert (experts.multiplicative_bias == 1).all()
    assert (experts.gate_up_proj_bias == 0).all()
    assert (experts.down_proj_bias == 0).all()
    assert abs(experts.gate_up_proj.std().item() / 0.3 - 1) < 0.1
    assert abs(experts.down_proj.std().item() / 0.3 - 1) < 0.1
    plain = make_experts(location(8, 12, gated=False), moe_intermediate_size=20)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    assert shapes == {"up_proj": (4, 20, 8), "down_proj": (4, 8, 20)}


def test_copying_the_transposed_operand_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large bfloat16 weights take another way to the same product."""
    gradients = []
    for large in (2**40, 0):
        monkeypatch.setattr(sys.modules["st_moe.modeling.kernels.sorted_experts"], "_LARGE_WEIGHT", large)
        torch.manual_seed(0)
        hidden = torch.randn(12, 8, dtype=torch.bfloat16)
        index = torch.randint(0, 3, (12, 2))
        weights = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in ((3, 20, 8), (3, 8, 10))]
        name = activations.activation_name(nn.SiLU())
        assert name is not None
        output = sorted_experts(hidden, index, torch.rand(12, 2), ExpertParameters(*weights), name, True)
        gradients.append(torch.autograd.grad(output.float().square().sum(), weights))
    for direct, copied in zip(*gradients, strict=True):
        assert direct.abs().max() > 0
        torch.testing.assert_close(copied, direct, rtol=2e-2, atol=2e-2 * direct.abs().max().item())
