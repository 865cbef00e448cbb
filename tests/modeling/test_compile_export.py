"""`torch.compile` without graph breaks and `torch.export`: eager mode's values, and operators that keep their word."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from st_moe.modeling.kernels import activations
from st_moe.modeling.routing.scope import active_scope
from tests.families import (
    assert_same_gradients,
    checkpoint_activations,
    gradients,
    mixture,
    relative_difference,
    token_ids,
)

old_fallback = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older versions of the host cannot trace the backward of their own grouped_mm fallback",
)
FAST = {"backend": "aot_eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test compiled counts towards no other's limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_step(compiled: Any, model: nn.Module, *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> None:
    """A forward and backward pass, compiled and not: every float of the output and every gradient."""
    model.zero_grad()
    expected = model(*args, **kwargs)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    actual = compiled(*args, **kwargs)
    actual.loss.backward()
    assert set(actual) == set(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)
    assert_same_gradients(gradients(model), expected_gradients)
    assert active_scope() is None


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["st_moe", pytest.param("grouped_mm", marks=old_fallback), "batched_mm"])
def test_compiled_step_equals_eager(name: str, train: bool) -> None:
    model = mixture(num_hidden_layers=1).train(train)
    model.set_experts_implementation(name)
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    assert_same_step(torch.compile(model, **FAST), model, ids, attention_mask=mask, labels=ids)


def test_compiled_step_with_capacity_policies_and_router_logits() -> None:
    model = mixture(
        num_hidden_layers=1,
        capacity_factor=0.5,
        min_capacity=1,
        second_expert_policy_train="threshold",
        multiplicative_bias=True,
        num_shared_experts=1,
    ).train()
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    compiled = torch.compile(model, **FAST)
    assert_same_step(compiled, model, ids, attention_mask=mask, labels=ids, num_items_in_batch=torch.tensor(30))
    assert model(ids, attention_mask=mask, labels=ids).dropped_fraction.min() > 0


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_compiled_forward_of_other_layouts(family: str) -> None:
    model = mixture(family, num_hidden_layers=1)
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids, labels=ids)
        actual = torch.compile(model, **FAST)(ids, labels=ids)
    assert relative_difference(actual.logits, expected.logits) <= 1e-5
    torch.testing.assert_close(actual.loss, expected.loss)
    assert torch.equal(actual.expert_load, expected.expert_load)


def test_compiled_base_model_returns_router_logits() -> None:
    """Tools that bring their own head compile the base model alone."""
    model = mixture(num_hidden_layers=1).model.train()
    ids = token_ids()
    expected = model(ids, output_router_logits=True)
    actual = torch.compile(model, **FAST)(ids, output_router_logits=True)
    assert relative_difference(actual.last_hidden_state, expected.last_hidden_state) <= 1e-5
    assert relative_difference(actual.router_logits[0], expected.router_logits[0]) <= 1e-5
    actual.router_logits[0].square().mean().backward()
    assert model.layers[0].mlp.gate.weight.grad.abs().max() > 0


def test_compiled_model_takes_other_lengths() -> None:
    model = mixture(num_hidden_layers=1).train()
    compiled = torch.compile(model, dynamic=True, **FAST)
    for batch, length in ((2, 8), (3, 11)):
        ids = token_ids(batch, length)
        assert_same_step(compiled, model, ids, labels=ids)


def test_eager_mode_is_sound_after_compiled_runs() -> None:
    """State that only compiled runs use must not shadow the state of eager ones."""
    model = mixture(num_hidden_layers=1)
    ids, others = token_ids(2, 8), token_ids(2, 10, seed=4)
    expected = model(others, labels=others)
    compiled = torch.compile(model, **FAST)
    for _ in range(2):
        compiled(ids, labels=ids)
        actual = model(others, labels=others)
        assert torch.equal(actual.expert_load, expected.expert_load)
        assert torch.equal(actual.loss, expected.loss)
        assert active_scope() is None


def test_graph_breaks_lose_no_routing() -> None:
    """The plain loop over experts breaks the graph in every layer; what it leaves must still add up."""
    model = mixture(num_hidden_layers=1).train()
    model.set_experts_implementation("eager")
    ids = token_ids(2, 8)
    assert_same_step(torch.compile(model, backend="aot_eager"), model, ids, labels=ids)


def test_compiled_training_with_gradient_checkpointing() -> None:
    model = mixture(num_hidden_layers=1).train()
    checkpoint_activations(model)
    ids = token_ids(2, 8)
    assert_same_step(torch.compile(model, backend="aot_eager"), model, ids, labels=ids, use_cache=False)


@pytest.mark.slow
def test_compiled_step_with_inductor() -> None:
    model = mixture(num_hidden_layers=1).train()
    ids = token_ids(2, 8)
    assert_same_step(torch.compile(model, fullgraph=True), model, ids, labels=ids, tolerance=1e-4)


# ---- export ----


@pytest.mark.parametrize("name", ["st_moe", "batched_mm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exported_program_gives_the_same_logits(name: str, family: str) -> None:
    model = mixture(family)
    model.set_experts_implementation(name)
    ids = token_ids()
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    for seed in range(3):
        ids = token_ids(seed=seed)
        with torch.no_grad():
            expected, actual = (m(input_ids=ids, use_cache=False).logits for m in (model, program.module()))
        assert relative_difference(actual, expected) <= 1e-5
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("st_moe.sorted_experts" in operator for operator in operators) is (name == "st_moe")
    with torch.no_grad():
        model.base_model.get_submodule("layers.0" if family == "llama" else "h.0").mlp.experts.down_proj.mul_(2)
        assert relative_difference(model(ids).logits, expected) > 1e-3
    assert active_scope() is None


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_exported_program_takes_other_lengths_and_a_file(grad: bool, tmp_path: Path) -> None:
    model = mixture()

    class LogitsAlone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    shapes = {"input_ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}}
    with torch.set_grad_enabled(grad):
        program = torch.export.export(LogitsAlone(), (token_ids(3, 7),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in ((3, 7), (2, 12), (5, 40)):
        ids = token_ids(batch, length)
        with torch.no_grad():
            assert relative_difference(loaded(ids), model(ids).logits) <= 1e-5


# ---- the operators ----


def operator_arguments(
    gated: bool = True,
    bias: bool = False,
    scale: bool = False,
    keep: bool = False,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> tuple[list[Any], str]:
    """Tensors of `st_moe::sorted_experts`: T 7, H 4, I 5, E 3, K 2, with a dropped assignment and an unused expert."""
    T, H, E, K, width = 7, 4, 3, 2, 5
    P = 2 if gated else 1
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).requires_grad_(requires_grad)

    weight = torch.rand(T, K, generator=generator).to(dtype) + 0.1
    weight[2, 1] = 0
    index = torch.randint(0, E - 1, (T, K), generator=generator)
    tensors = [draw(T, H), index, weight.requires_grad_(requires_grad), draw(E, P * width, H), draw(E, H, width)]
    tensors += [draw(E, P * width), draw(E, H)] if bias else [None, None]
    tensors += [draw(E, width) if scale else None]
    tensors += [(torch.rand(T * K, width, generator=generator) > 0.5).to(dtype) if keep else None]
    name = activations.activation_name(nn.SiLU() if activation == "silu" else nn.ReLU())
    assert name is not None
    return tensors, name


ARGUMENTS = [
    {},
    {"gated": False, "activation": "relu"},
    {"bias": True, "scale": True},
    {"keep": True, "bias": True, "scale": True},
    {"gated": False, "bias": True, "keep": True},
    {"dtype": torch.float32},
    {"requires_grad": False},
]


@pytest.mark.parametrize("options", ARGUMENTS, ids=str)
def test_forward_operator_keeps_its_word(options: dict[str, Any]) -> None:
    tensors, name = operator_arguments(**options)
    gated = options.get("gated", True)
    save = options.get("requires_grad", True)
    torch.library.opcheck(torch.ops.st_moe.sorted_experts.default, (*tensors, name, gated, save))


@pytest.mark.parametrize("needs", [[True] * 7, [True, False] * 3 + [True], [False, True] * 3 + [False], [False] * 7])
@pytest.mark.parametrize("options", [o for o in ARGUMENTS if o.get("requires_grad", True)], ids=str)
def test_backward_operator_keeps_its_word(options: dict[str, Any], needs: list[bool]) -> None:
    tensors, name = operator_arguments(**{**options, "requires_grad": False})
    gated = options.get("gated", True)
    output, projected = torch.ops.st_moe.sorted_experts(*tensors, name, gated, True)
    present = [tensors[i] is not None for i in (0, 2, 3, 4, 5, 6, 7)]
    wanted = [need and here for need, here in zip(needs, present, strict=True)]
    arguments = (torch.ones_like(output), *tensors, projected, name, gated, wanted)
    torch.library.opcheck(
        torch.ops.st_moe.sorted_experts_backward.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("options", ARGUMENTS[:5], ids=str)
def test_gradients_against_finite_differences(options: dict[str, Any]) -> None:
    tensors, name = operator_arguments(**options)
    given = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad]
    # An assignment of weight 0 is skipped: its derivative is defined as 0, which differences do not see.
    weight = tensors[2].detach().clone()
    weight[2, 1] = 0.3
    tensors[2] = weight.requires_grad_()

    def run(*values: Tensor) -> Tensor:
        arguments = list(tensors)
        for place, value in zip(given, values, strict=True):
            arguments[place] = value
        return torch.ops.st_moe.sorted_experts(*arguments, name, options.get("gated", True), True)[0]

    assert torch.autograd.gradcheck(run, tuple(tensors[i] for i in given))
