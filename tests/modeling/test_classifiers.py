"""Token and image classifiers: values, gradients, losses, saving, Auto classes, and the tokens that routers see."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForTokenClassification, PreTrainedModel

from benchmarks.tiny_models import dense_model, tiny_config
from st_moe import (
    STMoEConfig,
    STMoEForImageClassification,
    STMoEForSequenceClassification,
    STMoEForTokenClassification,
    STMoEModel,
    prove_identity,
    upcycle,
)
from st_moe.conversion import load_dense
from st_moe.modeling import STMoEImageClassifierOutput, STMoETokenClassifierOutput
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import TOLERANCE, assert_same_gradients, mixture, relative_difference, token_ids

PATCHES = 16
#: Tokens per image of 16 x 16 pixels in patches of 4 x 4: with a class token, registers, or neither.
IMAGE_TOKENS = {"vit": PATCHES + 1, "dinov2": PATCHES + 1, "dinov2_with_registers": PATCHES + 5, "ijepa": PATCHES}


def blocks(model: PreTrainedModel) -> list[SparseBlock]:
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


@torch.no_grad()
def change_experts(model: PreTrainedModel) -> None:
    """Move the first layer's experts: a negative control."""
    for parameter in blocks(model)[0].experts.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def images(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def logits_of(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", IMAGE_TOKENS)
def test_an_image_classifier_equals_the_dense_model(family: str) -> None:
    dense = dense_model(family, AutoModelForImageClassification, num_labels=5)
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    assert isinstance(sparse, STMoEForImageClassification)
    assert isinstance(sparse, type(dense))
    assert sparse.identity_proof.max_relative_difference <= TOLERANCE
    assert "over 2 images" in str(sparse.identity_proof)
    pixels = images()
    assert relative_difference(logits_of(sparse, pixel_values=pixels), logits_of(dense, pixel_values=pixels)) <= 1e-5
    change_experts(sparse)
    assert prove_identity(dense, sparse).max_relative_difference > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "distilbert", "deberta-v2"])
def test_a_token_classifier_equals_the_dense_model(family: str) -> None:
    dense = dense_model(family, AutoModelForTokenClassification, num_labels=5)
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    assert isinstance(sparse, STMoEForTokenClassification)
    assert sparse.identity_proof.max_relative_difference <= TOLERANCE
    ids = token_ids()
    assert logits_of(sparse, input_ids=ids).shape == (*ids.shape, 5)
    change_experts(sparse)
    assert prove_identity(dense, sparse).max_relative_difference > 100 * TOLERANCE


def test_gradients_equal_the_dense_image_classifier() -> None:
    """Copies share the dense FFN's gradient, all else gets it whole, and copies teach the router nothing."""
    dense = dense_model("vit", AutoModelForImageClassification)
    sparse = upcycle(dense, num_experts=4, verify=False)
    labels = torch.tensor([0, 1, 0])
    for model in (dense, sparse):
        model(pixel_values=images(), labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in dense.named_parameters()}
    inside = [name for name, module in sparse.named_modules() if isinstance(module, SparseBlock)]
    outside = [name for name, _ in sparse.named_parameters() if not name.startswith(tuple(inside))]
    assert len(outside) > 20
    actual = {name: sparse.get_parameter(name).grad for name in outside}
    for name, block in zip(inside, blocks(sparse), strict=True):
        actual |= {f"{name}.fc1.weight": block.experts.up_proj.grad.sum(0)}
        actual |= {f"{name}.fc2.weight": block.experts.down_proj.grad.sum(0)}
        assert block.gate.weight.grad.abs().max() <= 1e-6
    assert_same_gradients(actual, {name: expected[name] for name in actual})


@pytest.mark.parametrize("family", IMAGE_TOKENS)
def test_every_token_of_every_image_is_routed(family: str) -> None:
    model = mixture(family, auto=STMoEForImageClassification)
    seen: list[Tensor] = []
    for block in blocks(model):
        block.gate.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.token_mask))
    for callee in (model, model.base_model):
        callee(pixel_values=images(3))
        assert [mask.shape for mask in seen] == [(3, IMAGE_TOKENS[family])] * 2
        assert all(mask.all() for mask in seen)
        seen.clear()


def test_losses_of_an_image_classifier() -> None:
    model = mixture("vit", auto=STMoEForImageClassification, num_labels=3, balance_loss_coef=0.5).train()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(8):
        output = model(pixel_values=images(6), labels=labels, output_router_logits=True)
        assert isinstance(output, STMoEImageClassifierOutput)
        aux = 0.5 * output.balance_loss + 1e-3 * output.router_z_loss
        torch.testing.assert_close(output.loss, output.lm_loss + aux)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(block.gate.weight.grad.abs().max() > 0 for block in blocks(model))
        optimizer.step()
        history.append(output.lm_loss.item())
    assert history[-1] < 0.7 * history[0]
    assert [logits.shape for logits in output.router_logits] == [(6 * IMAGE_TOKENS["vit"], 4)] * 2
    torch.testing.assert_close(output.expert_load.sum(-1), torch.ones(2))
    evaluated = model.eval()(pixel_values=images(6), labels=labels)
    torch.testing.assert_close(evaluated.loss, F.cross_entropy(evaluated.logits.float(), labels))


def test_losses_of_a_token_classifier() -> None:
    model = mixture("bert", auto=STMoEForTokenClassification, num_labels=3).train()
    ids = token_ids(4, 9)
    labels = ids % 3
    labels[:, 0] = -100
    output = model(ids, labels=labels)
    assert isinstance(output, STMoETokenClassifierOutput)
    aux = 1e-2 * output.balance_loss + 1e-3 * output.router_z_loss
    torch.testing.assert_close(output.loss, output.lm_loss + aux)
    torch.testing.assert_close(output.lm_loss, F.cross_entropy(output.logits.float().transpose(1, 2), labels))
    output.loss.backward()
    assert all(block.gate.weight.grad.abs().max() > 0 for block in blocks(model))


@pytest.mark.parametrize(
    ("family", "public", "auto"),
    [
        ("vit", STMoEForImageClassification, AutoModelForImageClassification),
        ("bert", STMoEForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_saved_classifiers_load_bit_by_bit(family: str, public: type, auto: Any, tmp_path: Path) -> None:
    model = mixture(family, auto=public, num_labels=5)
    model.save_pretrained(tmp_path)
    for loaded in (auto.from_pretrained(tmp_path), public.from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert loaded.config.architectures == [public.__name__]
        expected, actual = model.state_dict(), loaded.state_dict()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    with torch.device("meta"):
        assert type(auto.from_config(model.config)) is type(model)


@pytest.mark.parametrize(
    ("family", "auto"),
    [("vit", AutoModelForImageClassification), ("bert", AutoModelForTokenClassification)],
)
def test_dense_classifiers_load_with_their_heads(family: str, auto: Any, tmp_path: Path) -> None:
    dense = dense_model(family, auto, num_labels=5)
    dense.save_pretrained(tmp_path)
    assert type(load_dense(tmp_path)) is type(dense)
    assert upcycle(tmp_path, num_experts=2).identity_proof.max_relative_difference <= TOLERANCE


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
@pytest.mark.parametrize(
    ("family", "public"),
    [
        ("vit", STMoEForImageClassification),
        ("bert", STMoEForTokenClassification),
        ("bert", STMoEForSequenceClassification),
    ],
)
def test_encoders_take_routers_that_see_all_tokens(router: str, family: str, public: type) -> None:
    fields = {"num_experts_per_tok": 1} if router == "soft" else {}
    model = mixture(family, auto=public, router_type=router, **fields)
    inputs = {"pixel_values": images(2)} if family == "vit" else {"input_ids": token_ids()}
    together = logits_of(model, **inputs)
    assert together.isfinite().all()
    # The scope of such a router is one sequence, or one image.
    alone = torch.cat([logits_of(model, **{name: value[i : i + 1] for name, value in inputs.items()}) for i in (0, 1)])
    assert relative_difference(alone, together) <= TOLERANCE


def test_the_same_routers_are_refused_for_a_decoder() -> None:
    with pytest.raises(ValueError, match="router_type: must be causal"):
        STMoEConfig(dense_model_type="llama", router_type="expert_choice")


def test_a_vision_tower_alone_is_a_base_model() -> None:
    with torch.device("meta"):
        config = STMoEConfig.from_dense(tiny_config("clip_vision_model"))
        model = STMoEModel(config)
    assert len(blocks(model)) == 2
    # Other vision towers have no classifier, not even as a part of a composite.
    with torch.device("meta"):
        config = STMoEConfig.from_dense(tiny_config("chinese_clip_vision_model"))
        assert len(blocks(STMoEModel(config))) == 2
    with pytest.raises(
        ValueError, match="'chinese_clip_vision_model' has no dense class for STMoEForImageClassification"
    ):
        STMoEForImageClassification(config)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3, 16), torch.zeros(2, 3, 16, 16, dtype=torch.int64), "a photo"])
def test_pixel_values_of_the_wrong_shape_are_refused(inputs: Any) -> None:
    dense = dense_model("vit", AutoModelForImageClassification)
    with pytest.raises(ValueError, match="inputs: pixel values must be floating point \\[B, C, height, width\\], got"):
        prove_identity(dense, dense, inputs)
