"""Image classifiers of composites: the vision tower's FFNs become sparse, and the config is the tower's, flat."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    Siglip2Config,
    Siglip2ForImageClassification,
    SiglipConfig,
    SiglipModel,
)

from benchmarks.tiny_models import OWN_FIELDS, dense_model, perturb
from st_moe import STMoEConfig, STMoEForImageClassification, upcycle
from st_moe.conversion import to_dense, upcycle_checkpoint
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import TOLERANCE, relative_difference

FAMILIES = ("siglip", "clip", "metaclip_2")
LABELS = {0: "cat", 1: "dog", 2: "newt"}


def dense_of(family: str) -> PreTrainedModel:
    return dense_model(family, AutoModelForImageClassification, id2label=LABELS)


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=images()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_is_exact_with_a_flat_config(family: str) -> None:
    dense = dense_of(family)
    sparse: Any = upcycle(dense, num_experts=3, num_experts_per_tok=2)
    assert isinstance(sparse, STMoEForImageClassification)
    assert isinstance(sparse, type(dense))
    assert sparse.identity_proof.max_relative_difference <= TOLERANCE
    assert relative_difference(logits_of(sparse), logits_of(dense)) <= TOLERANCE
    config = sparse.config
    assert (config.dense_model_type, config.hidden_size) == (f"{family}_vision_model", 32)
    assert config.id2label == LABELS
    assert not hasattr(config, "text_config")
    assert all(getattr(m, "config", config) is config for m in sparse.modules())
    assert len([m for m in sparse.modules() if isinstance(m, SparseBlock)]) == 2
    perturb(sparse.base_model.sparse_blocks[0].experts)
    assert relative_difference(logits_of(sparse), logits_of(dense)) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_folders(family: str, tmp_path: Path) -> None:
    dense = dense_of(family)
    dense.save_pretrained(tmp_path / "dense")
    proof: Any = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=3, seed=2)
    assert proof.max_relative_difference <= TOLERANCE
    loaded: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "moe")
    assert loaded.config.architectures == ["STMoEForImageClassification"]
    for source in (dense, tmp_path / "dense"):
        made = upcycle(source, num_experts=3, seed=2, verify=False)
        assert type(made) is type(loaded)
        assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in made.state_dict().items())
    perturb(loaded, seed=5)
    loaded.save_pretrained(tmp_path / "again")
    again = STMoEForImageClassification.from_pretrained(tmp_path / "again")
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in loaded.state_dict().items())
    configs = [AutoConfig.from_pretrained(tmp_path / name).to_diff_dict() for name in ("moe", "again")]
    assert configs[0] == configs[1]
    assert relative_difference(logits_of(pickle.loads(pickle.dumps(again))), logits_of(loaded)) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_classifier_trains(family: str) -> None:
    torch.manual_seed(0)
    sizes = OWN_FIELDS[family]["vision_config"]
    config = STMoEConfig(dense_model_type=f"{family}_vision_model", num_experts=3, id2label=LABELS, **sizes)
    model: Any = STMoEForImageClassification(config).train()
    assert model.classifier.weight.shape == (3, 32)
    assert 0.1 < model.classifier.weight.std() < 0.25, "the family's rule: hidden_size ** -0.5"
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    output = model(pixel_values=images(), labels=torch.tensor([0, 2, 1]))
    torch.testing.assert_close(output.loss, output.lm_loss + 1e-2 * output.balance_loss + 1e-3 * output.router_z_loss)
    output.loss.backward()
    assert all(block.gate.weight.grad.abs().max() > 0 for block in model.base_model.sparse_blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_back_to_dense(family: str) -> None:
    dense = dense_of(family)
    back = to_dense(upcycle(dense, num_experts=3, verify=False), experts=1)
    assert type(back) is type(dense)
    assert torch.equal(logits_of(back), logits_of(dense))
    assert back.config.vision_config.hidden_size == 32
    assert back.config.id2label == LABELS


def test_images_in_patches_are_not_compared_on_random_ones() -> None:
    sizes = {name: value for name, value in OWN_FIELDS["siglip"]["vision_config"].items() if name != "image_size"}
    torch.manual_seed(0)
    dense = Siglip2ForImageClassification(Siglip2Config(vision_config=sizes | {"num_patches": 16})).eval()
    perturb(dense)
    with pytest.raises(ValueError, match="verify: must be False for Siglip2ForImageClassification, whose images have"):
        upcycle(dense, num_experts=3)
    sparse = upcycle(dense, num_experts=3, verify=False)
    patches = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": torch.full((2, 2), 4)}
    with torch.no_grad():
        ours, theirs = (model(pixel_values=patches, **inputs).logits for model in (sparse, dense))
    assert relative_difference(ours, theirs) <= TOLERANCE


def test_the_composite_itself_is_refused() -> None:
    config = SiglipConfig(vision_config=OWN_FIELDS["siglip"]["vision_config"])
    with pytest.raises(ValueError, match="'siglip' is a composite of several models"):
        STMoEConfig.from_dense(config)
    with torch.device("meta"):
        model = SiglipModel(config)
    with pytest.raises(ValueError, match="'siglip' is a composite of several models"):
        upcycle(model, num_experts=3)
