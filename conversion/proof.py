"""Proof of step-0 identity: both models run on the same tokens, and their logits are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from st_moe.configuration import dense_config_of

#: Largest relative logit difference that rounding explains, per dtype of the weights.
#: Routers compute in float32 whatever the weights are, so float64 gets no finer than that.
TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2}
_TOLERANCE_BFLOAT16 = 1e-1


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding explains when weights are of this dtype."""
    return TOLERANCES.get(dtype, _TOLERANCE_BFLOAT16)


@dataclass(frozen=True)
class IdentityProof:
    """How far a mixture's outputs are from its dense parent's.

    Attributes:
        max_relative_difference: largest |sparse - dense| logit difference, divided by the largest |dense| logit.
        dense_loss, sparse_loss: mean next-token cross-entropy in nats; of a classifier, NaN.
        num_tokens: tokens compared; of a model of images, images.
        tolerance: what rounding explains in the models' dtype.
        unit: what was counted, `"tokens"` or `"images"`.
    """

    max_relative_difference: float
    dense_loss: float
    sparse_loss: float
    num_tokens: int
    tolerance: float
    unit: str = "tokens"

    @property
    def holds(self) -> bool:
        """Whether the difference is within rounding."""
        return self.max_relative_difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal up to rounding" if self.holds else "NOT equal"
        return (
            f"step 0: {verdict}; max relative logit difference {self.max_relative_difference:.1e} over "
            f"{self.num_tokens} {self.unit}; loss {self.dense_loss:.4f} -> {self.sparse_loss:.4f}"
        )


def prove_identity(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    inputs: str | Sequence[str] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> IdentityProof:
    """Compare a mixture with its dense parent on the same tokens, both in evaluation mode.

    Sequence classifiers without a pad token run one sequence at a time. Base models are compared by their last hidden
    states.

    Args:
        dense: the dense model.
        sparse: the mixture.
        inputs: text or texts (with `tokenizer`), or token ids int64 [B, S]; None takes 2 x 32 random ids.
            For models of images, pixel values [B, C, height, width]; None takes 2 random images.
        tokenizer: needed for text.

    Raises:
        ValueError: when text comes without a tokenizer, or ids or pixel values have the wrong shape.
    """
    images = dense.main_input_name == "pixel_values"
    ids, mask = _images(dense, inputs) if images else tokens_of(dense, inputs, tokenizer)
    with evaluating(dense), evaluating(sparse), torch.no_grad():
        ours, theirs = (_logits(model, ids, mask) for model in (sparse, dense))
    if images or theirs.ndim != 3:
        ours_loss = theirs_loss = float("nan")
    else:
        predicts = _predicts_tokens(dense)
        ours_loss, theirs_loss = (
            _next_token_loss(logits, ids, mask) if predicts else float("nan") for logits in (ours, theirs)
        )
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    dtype = next(dense.parameters()).dtype
    return IdentityProof(
        max_relative_difference=difference.item(),
        dense_loss=theirs_loss,
        sparse_loss=ours_loss,
        num_tokens=int(mask.sum()),
        tolerance=tolerance_of(dtype),
        unit="images" if images else "tokens",
    )


def _predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether a model's [B, S, ...] outputs are logits of the next token, not of labels, nor hidden states."""
    headless = model.base_model is model and model.get_output_embeddings() is None
    return not (type(model).__name__.endswith("ForTokenClassification") or headless)


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits in float32 on the CPU: [B, S, vocabulary], of a classifier [B, labels]; of a base model [B, S, H]."""
    if model.main_input_name == "pixel_values":
        output = model(pixel_values=ids.to(model.device, model.dtype))
        return output[0].float().cpu()
    batches = [(ids, mask)]
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    if classifier and model.config.get_text_config().pad_token_id is None:
        # Transformers then cannot tell where a sequence ends, and takes only one at a time, without padding.
        batches = [(row[None, real], real[None, real].to(mask)) for row, real in zip(ids, mask.bool(), strict=True)]
    outputs = [model(input_ids=i.to(model.device), attention_mask=m.to(model.device)) for i, m in batches]
    return torch.cat([output[0] for output in outputs]).float().cpu()


def _images(model: PreTrainedModel, inputs: Any) -> tuple[Tensor, Tensor]:
    """Pixel values [B, C, height, width], and ones [B] that count them."""
    if inputs is None:
        config = dense_config_of(model.config, type(model).__name__)
        size = getattr(config, "image_size", None)
        if size is None:
            raise ValueError(
                f"verify: must be False for {type(model).__name__}, whose images have no one size and come in patches"
            )
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, config.num_channels, height, width)
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if not (isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point()):
        shown = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs: pixel values must be floating point [B, C, height, width], got {shown}")
    return inputs, torch.ones(len(inputs), dtype=torch.int64)


def tokens_of(
    model: PreTrainedModel, inputs: str | Sequence[str] | Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, S] on the CPU."""
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.get_text_config().vocab_size, (2, 32), generator=generator)
        return ids, torch.ones_like(ids)
    if isinstance(inputs, Tensor):
        if inputs.ndim != 2 or inputs.is_floating_point() or inputs.numel() == 0:
            raise ValueError(f"inputs: token ids must be integers [B, S], got {inputs.dtype} {tuple(inputs.shape)}")
        vocab_size = model.config.get_text_config().vocab_size
        if not 0 <= int(inputs.min()) <= int(inputs.max()) < vocab_size:
            raise ValueError(
                f"inputs: token ids must be in [0, {vocab_size}), got {int(inputs.min())} to {int(inputs.max())}"
            )
        return inputs.cpu(), torch.ones_like(inputs.cpu())
    if tokenizer is None:
        raise ValueError("tokenizer: must be given when inputs are text, got None")
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    if not texts or not all(texts):
        raise ValueError(f"inputs: texts must not be empty, got {texts!r}")
    if tokenizer.pad_token is None and len(texts) > 1:
        raise ValueError("tokenizer: needs a pad token to compare several texts, got pad_token=None")
    encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    return encoded["input_ids"], encoded["attention_mask"]


def _next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Mean cross-entropy of the next real token, in nats."""
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    return nn.functional.cross_entropy(logits[:, :-1][real], ids[:, 1:][real]).item()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
