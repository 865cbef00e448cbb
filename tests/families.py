"""Tiny dense models of every family that the project promises, their mixtures, and a tokenizer made on the spot."""

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.measure import relative_difference  # noqa: F401 -- the tests take it from here
from benchmarks.tiny_models import (  # noqa: F401 -- the tests take them from here
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    dense_model,
    favour_experts,
    perturb,
    sharpen,
    tiny_config,
)
from st_moe import STMoEConfig, STMoEForCausalLM, upcycle

#: The families whose upcycled models are promised to compute the dense function.
FAMILIES = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "stablelm",
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "opt",
    "bloom",
    "falcon",
    "olmo2",
    "smollm3",
    "granite",
    "cohere",
    "starcoder2",
    "nemotron",
    "glm4",
)

#: Families that normalise the FFN's output, which hides its scale.
POST_NORM = ("gemma2", "gemma3_text", "glm4", "olmo2")

TOLERANCE = 1e-5


@lru_cache
def pair(family: str) -> tuple[PreTrainedModel, STMoEForCausalLM]:
    """A dense model and its mixture of 4 copies, top 2; shared between tests, so only to be read."""
    dense = dense_model(family)
    return dense, upcycle(dense, num_experts=4, num_experts_per_tok=2, verify=False)


def mixture(family: str = "llama", auto: type = STMoEForCausalLM, seed: int = 0, **fields: Any) -> Any:
    """A mixture of 4 experts that differ and are told apart by sharp routers, in evaluation mode.

    `fields` may belong to the family or to the mixture.
    """
    torch.manual_seed(seed)
    dense_names = set(CONFIG_MAPPING[family].__dataclass_fields__) | set(CONFIG_MAPPING[family].attribute_map)
    dense_names |= {"num_labels", "problem_type", "tie_word_embeddings"}
    dense = {name: value for name, value in fields.items() if name in dense_names}
    own = {name: value for name, value in fields.items() if name not in dense}
    config = STMoEConfig.from_dense(tiny_config(family, **dense), **{"num_experts": 4, **own})
    model = auto(config).eval()
    perturb(model, seed=seed + 1)
    sharpen(model)
    return model


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random ids int64 [batch, length] without the special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def checkpoint_activations(model: PreTrainedModel, **kwargs: Any) -> None:
    """Switch activation checkpointing on, under the name that the installed Transformers has for it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable(kwargs or None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient of a model by parameter name; a missing one is an error."""
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Every gradient equal, relative to its own largest entry; what rounding makes of zeros is forgiven."""
    assert actual.keys() == expected.keys()
    rounding = 1e-7 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).abs().max().item()
        assert difference <= tolerance * gradient.abs().max().item() + rounding, f"{name}: {difference:.1e}"


@lru_cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB entries, trained on one sentence, padding on the left."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog, and the dog sleeps on"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
