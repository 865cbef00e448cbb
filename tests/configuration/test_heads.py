"""Auto classes by config: the head that it names, or the usual one of its family."""

from typing import Any

import pytest
import transformers
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, SiglipVisionConfig, T5Config, ViTConfig

from st_moe import STMoEConfig
from st_moe.configuration import auto_class_of


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(), "AutoModelForCausalLM"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "AutoModelForSequenceClassification"),
        (LlamaConfig(architectures=["STMoEForTokenClassification"]), "AutoModelForTokenClassification"),
        (LlamaConfig(architectures=["LlamaModel"]), "AutoModelForCausalLM"),
        (BertConfig(), "AutoModelForCausalLM"),
        (ViTConfig(), "AutoModelForImageClassification"),
        (ViTConfig(architectures=["ViTForImageClassification"]), "AutoModelForImageClassification"),
        (SiglipVisionConfig(), "AutoModel"),
        (T5Config(), "AutoModel"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.model_type} {value.architectures}",
)
def test_auto_class_of_dense_configs(config: PreTrainedConfig, name: str) -> None:
    assert auto_class_of(config) is getattr(transformers, name)


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "AutoModelForCausalLM"), ("vit", "AutoModelForImageClassification")]
)
def test_auto_class_of_mixtures(family: str, name: str) -> None:
    fields: Any = {"dense_model_type": family}
    assert auto_class_of(STMoEConfig(**fields)) is getattr(transformers, name)
