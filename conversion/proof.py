"""Proof of step-0 identity: both models run on the same tokens, and their logits are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Largest relative logit difference that rounding explains, per dtype of the weights.
#: Routers compute in float32 whatever the weights are, so float64 gets no finer than that.
TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2}
_TOLERANCE_BFLOAT16 = 1e-1


@dataclass(frozen=True)
class IdentityProof:
    """How far a mixture's outputs are from its dense parent's.

    Attributes:
        max_relative_difference: largest |sparse - dense| logit difference, divided by the largest |dense| logit.
        dense_loss, sparse_loss: mean next-token cross-entropy in nats; of a classifier, NaN.
        num_tokens: tokens compared.
        tolerance: what rounding explains in the models' dtype.
    """

    max_relative_difference: float
    dense_loss: float
    sparse_loss: float
    num_tokens: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within rounding."""
        return self.max_relative_difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal up to rounding" if self.holds else "NOT equal"
        return (
            f"step 0: {verdict}; max relative logit difference {self.max_relative_difference:.1e} over "
            f"{self.num_tokens} tokens; loss {self.dense_loss:.4f} -> {self.sparse_loss:.4f}"
        )


def prove_identity(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    inputs: str | Sequence[str] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> IdentityProof:
    """Compare a mixture with its dense parent on the same tokens, both in evaluation mode.

    Sequence classifiers without a pad token run one sequence at a time.

    Args:
        dense: the dense model.
        sparse: the mixture.
        inputs: text or texts (with `tokenizer`), or token ids int64 [B, S]; None takes 2 x 32 random ids.
        tokenizer: needed for text.

    Raises:
        ValueError: when text comes without a tokenizer, or ids have the wrong shape.
    """
    ids, mask = _tokens(dense, inputs, tokenizer)
    with _evaluating(dense), _evaluating(sparse), torch.no_grad():
        ours, theirs = (_logits(model, ids, mask) for model in (sparse, dense))
    if theirs.ndim == 3:
        ours_loss, theirs_loss = (_next_token_loss(logits, ids, mask) for logits in (ours, theirs))
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    else:
        ours_loss = theirs_loss = float("nan")
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    dtype = next(dense.parameters()).dtype
    return IdentityProof(
        max_relative_difference=difference.item(),
        dense_loss=theirs_loss,
        sparse_loss=ours_loss,
        num_tokens=int(mask.sum()),
        tolerance=TOLERANCES.get(dtype, _TOLERANCE_BFLOAT16),
    )


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits in float32 on the CPU: [B, S, vocabulary], or of a classifier [B, labels]."""
    batches = [(ids, mask)]
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    if classifier and model.config.get_text_config().pad_token_id is None:
        # Transformers then cannot tell where a sequence ends, and takes only one at a time, without padding.
        batches = [(row[None, real], real[None, real].to(mask)) for row, real in zip(ids, mask.bool(), strict=True)]
    logits = [model(input_ids=i.to(model.device), attention_mask=m.to(model.device)).logits for i, m in batches]
    return torch.cat(logits).float().cpu()


def _tokens(
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
