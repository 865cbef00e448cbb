"""Activation checkpointing changes memory, nothing else: losses, gradients, statistics, and what each layer sees."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from st_moe import STMoEForSequenceClassification
from st_moe.modeling import modeling_st_moe
from st_moe.modeling.routing import TopKRouter
from st_moe.modeling.routing.scope import RoutingScope, active_scope
from tests.families import (
    FAMILIES,
    LAYERS,
    assert_same_gradients,
    checkpoint_activations,
    gradients,
    mixture,
    token_ids,
)

# With these the token mask decides what is dropped: a recomputation that has lost it computes something else.
TIGHT = {"capacity_factor": 0.5, "min_capacity": 1, "balance_loss_coef": 0.5, "router_z_loss_coef": 0.1}
ENABLERS = [
    name
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
]


def batch(seed: int = 0, padded: int = 6, length: int = 14) -> dict[str, Tensor]:
    """Two sequences, the first padded on the left."""
    ids = token_ids(2, length, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def twins(family: str = "llama", **fields: Any) -> tuple[nn.Module, nn.Module]:
    """The same training model without and with checkpointing; the family's own dropout is off."""
    known = CONFIG_MAPPING[family].__dataclass_fields__
    dropout = {name: 0.0 for name in known if name.endswith(("dropout", "_pdrop")) and name != "expert_dropout"}
    plain, checkpointed = (mixture(family, **{**TIGHT, **dropout, **fields}).train() for _ in range(2))
    checkpoint_activations(checkpointed)
    return plain, checkpointed


def router_calls(model: nn.Module) -> list[Tensor]:
    """A list that fills with the token mask of every call of a router."""
    masks: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(lambda _module, arguments: masks.append(arguments[1]))
    return masks


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_statistics_and_gradients_are_unchanged(family: str) -> None:
    plain, checkpointed = twins(family)
    inputs = batch()
    expected, actual = plain(**inputs, use_cache=False), checkpointed(**inputs, use_cache=False)
    assert expected.dropped_fraction.min() > 0
    for name in (
        "loss",
        "lm_loss",
        "balance_loss",
        "router_z_loss",
        "expert_load",
        "router_entropy",
        "dropped_fraction",
    ):
        assert torch.equal(actual[name], expected[name]), name
    calls = router_calls(checkpointed)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-6)
    # The backward pass ran every sparse layer again, each with the mask of its forward pass.
    assert len(calls) == LAYERS
    assert all(torch.equal(mask, inputs["attention_mask"].bool()) for mask in calls)
    assert active_scope() is None


def test_every_layer_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scopes: list[RoutingScope] = []

    class Watched(RoutingScope):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            scopes.append(self)

    _, model = twins()
    monkeypatch.setattr(modeling_st_moe, "RoutingScope", Watched)
    output = model(**batch(), use_cache=False)
    before = [len(scope.records) for scope in scopes]
    assert sum(before) == LAYERS
    output.loss.backward()
    assert [len(scope.records) for scope in scopes] == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_interleaved_batches_keep_their_own_masks(order: tuple[int, int]) -> None:
    plain, checkpointed = twins()
    batches = [batch(seed=1, padded=3), batch(seed=2, padded=9)]
    for inputs in batches:
        plain(**inputs, use_cache=False).loss.backward()
    outputs = [checkpointed(**inputs, use_cache=False) for inputs in batches]
    for number in order:
        outputs[number].loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-5)


def test_a_forward_pass_in_between_disturbs_nothing() -> None:
    plain, checkpointed = twins()
    expected = plain(**batch(seed=1), use_cache=False)
    expected.loss.backward()
    actual = checkpointed(**batch(seed=1), use_cache=False)
    with torch.no_grad():
        checkpointed(**batch(seed=3, length=5, padded=2), use_cache=False)
    actual.loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-6)


def test_a_backward_pass_inside_of_another_forward_pass() -> None:
    """A recomputation that finds another forward pass under way leaves no trace in it."""
    plain, checkpointed = twins()
    expected = plain(**batch(seed=2), use_cache=False)
    first = checkpointed(**batch(seed=1), use_cache=False)
    hook = checkpointed.model.layers[0].register_forward_hook(lambda *_: first.loss.backward())
    second = checkpointed(**batch(seed=2), use_cache=False)
    hook.remove()
    assert torch.equal(second.expert_load, expected.expert_load)
    assert torch.equal(second.loss, expected.loss)
    plain.zero_grad()
    plain(**batch(seed=1), use_cache=False).loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-5)


def test_going_backward_twice_gives_the_gradient_twice() -> None:
    plain, checkpointed = twins()
    for model in (plain, checkpointed):
        loss = model(**batch(), use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-6)


def test_random_choices_are_repeated() -> None:
    """Jitter, random second experts and dropout are drawn once per step, not once more in the recomputation."""
    fields = {"router_jitter_noise": 0.3, "second_expert_policy_train": "random", "expert_dropout": 0.3}
    plain, checkpointed = (mixture(**{**TIGHT, **fields}).train() for _ in range(2))
    checkpoint_activations(checkpointed)
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        model(**batch(), use_cache=False).loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-6)
    torch.manual_seed(6)
    plain.zero_grad()
    plain(**batch(), use_cache=False).loss.backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-2)


def test_router_logits_keep_their_gradient() -> None:
    found = []
    for model in twins():
        output = model.model(**{k: v for k, v in batch().items() if k != "labels"}, output_router_logits=True)
        torch.cat(output.router_logits).square().mean().backward()
        found.append([m.weight.grad for m in model.modules() if isinstance(m, TopKRouter)])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)
        assert plain.abs().max() > 0


def test_a_classifier_is_unchanged_too() -> None:
    found = []
    for checkpointed in (False, True):
        model = mixture(auto=STMoEForSequenceClassification, **TIGHT).train()
        if checkpointed:
            checkpoint_activations(model)
        inputs = batch()
        output = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=torch.tensor([0, 1]))
        output.loss.backward()
        found.append((output.loss, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1], tolerance=1e-6)


def test_checkpointing_switches_off_again() -> None:
    _, model = twins()
    calls = router_calls(model)
    for switch in ("gradient_checkpointing_disable", "activation_checkpointing_disable"):
        if not hasattr(model, switch):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(model, switch)()
        calls.clear()
        model(**batch(), use_cache=False).loss.backward()
        assert len(calls) == LAYERS
        checkpoint_activations(model)
        calls.clear()
        model(**batch(), use_cache=False).loss.backward()
        assert len(calls) == 2 * LAYERS


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("enable", ENABLERS)
@pytest.mark.parametrize("kind", ["head", "base", "classifier"])
def test_reentrant_checkpointing_is_refused(enable: str, kind: str) -> None:
    model = mixture(auto=STMoEForSequenceClassification) if kind == "classifier" else mixture()
    model = model.model if kind == "base" else model
    with pytest.raises(ValueError, match="use_reentrant must be False, got True"):
        getattr(model, enable)({"use_reentrant": True})
    assert not model.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("enable", ENABLERS)
@pytest.mark.parametrize("options", [{}, {"preserve_rng_state": True}], ids=str)
def test_checkpointing_is_never_reentrant_by_default(enable: str, options: dict[str, Any]) -> None:
    """torch's own default was reentrant for long, and would silence the routers' losses."""
    plain, checkpointed = mixture(**TIGHT).train(), mixture(**TIGHT).train()
    getattr(checkpointed, enable)(options)
    for model in (plain, checkpointed):
        model(**batch(), use_cache=False).loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-6)


@pytest.mark.skipif("activation_checkpointing_enable" not in ENABLERS, reason="needs a newer Transformers")
def test_checkpointing_every_other_layer() -> None:
    plain, checkpointed = mixture(**TIGHT).train(), mixture(**TIGHT).train()
    checkpointed.activation_checkpointing_enable(every_n_layers=2)
    calls = router_calls(checkpointed)
    for model in (plain, checkpointed):
        model(**batch(), use_cache=False).loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance=1e-6)
    assert len(calls) == LAYERS + 1
