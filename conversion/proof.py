"""Proof of step-0 identity: both models run on the same tokens, and their logits are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from st_moe.configuration import dense_config_of

if TYPE_CHECKING:
    # A proof is also a result, which has to be read where there are no model classes.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Largest relative logit difference that rounding explains, per dtype of the weights.
#: Routers compute in float32 whatever the weights are, so float64 gets no finer than that.
TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2}
_TOLERANCE_BFLOAT16 = 1e-1

#: What models with a tokenizer are compared on, unless a text is given.
PROOF_TEXT = (
    "The ferry left the harbour a little after six, when the lamps along the quay were still lit. Forty people stood "
    "at the rail and watched the town grow small. 'We should be across by nine,' the captain said, 'if the wind stays "
    "where it is.' It did not. By eight the sea was grey and steep, and the engineer had closed two of the three "
    "hatches. To compute the distance from speed and time, multiply them: at 12 knots for 2.5 hours a ship covers 30 "
    "nautical miles, about 56 kilometres. In Python that is `distance = speed * hours`; nothing has to be imported."
)
_MOST_TOKENS, _MOST_TOKENS_GIVEN = 128, 512
_LEAST_WORDS = 16


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
        loss = "" if math.isnan(self.dense_loss) else f"; loss {self.dense_loss:.4f} -> {self.sparse_loss:.4f}"
        return (
            f"step 0: {verdict}; max relative logit difference {self.max_relative_difference:.1e} over "
            f"{self.num_tokens} {self.unit}{loss}"
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

    Either model may be offloaded by accelerate, to the disk too.

    Raises:
        ValueError: when text comes without a tokenizer, or ids or pixel values have the wrong shape.
    """
    ids, mask = inputs_of(dense, inputs, tokenizer)
    return compared(outputs_of(dense, ids, mask), outputs_of(sparse, ids, mask), ids, mask)


class Outputs(NamedTuple):
    """What a model makes of a proof's inputs.

    Attributes:
        logits: on the CPU in the model's dtype, [B, S, vocabulary], of a classifier [B, labels], of a base model
            [B, S, H].
        predicts_tokens: whether they are those of the next token.
        dtype: of the weights.
    """

    logits: Tensor
    predicts_tokens: bool
    dtype: torch.dtype


def inputs_of(
    model: PreTrainedModel, inputs: str | Sequence[str] | Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Tensor, Tensor]:
    """Inputs and mask of a proof: token ids and attention mask [B, S], or pixel values [B, C, height, width], ones [B].

    Args:
        inputs, tokenizer: as for `prove_identity`.
    """
    images = model.main_input_name == "pixel_values"
    return _images(model, inputs) if images else tokens_of(model, inputs, tokenizer)


def outputs_of(model: PreTrainedModel, inputs: Tensor, mask: Tensor) -> Outputs:
    """Run one model on the inputs of a proof, in evaluation mode."""
    with evaluating(model), torch.no_grad():
        logits = _logits(model, inputs, mask)
    return Outputs(logits, logits.ndim == 3 and _predicts_tokens(model), next(model.parameters()).dtype)


def compared(dense: Outputs, sparse: Outputs, inputs: Tensor, mask: Tensor) -> IdentityProof:
    """The proof that two models' outputs on the same inputs are."""
    images = inputs.is_floating_point()
    theirs_loss = ours_loss = float("nan")
    if dense.predicts_tokens:
        theirs_loss, ours_loss = (_next_token_loss(model.logits, inputs, mask) for model in (dense, sparse))
    chosen = mask.bool() if dense.logits.ndim == 3 and not images else torch.ones(len(inputs), dtype=torch.bool)
    extremes = [
        torch.stack([(ours.float() - theirs.float()).abs().max(), theirs.float().abs().max()])
        for theirs, ours in _pieces(chosen, dense.logits, sparse.logits)
    ]
    # The maximum of a tensor, unlike that of a list, is NaN if anything is.
    difference, scale = torch.stack(extremes).amax(0)
    if scale == 0:
        raise ValueError(
            "inputs: the dense model's outputs are all zero, which proves nothing; give other inputs or verify=False"
        )
    return IdentityProof(
        max_relative_difference=(difference / scale).item(),
        dense_loss=theirs_loss,
        sparse_loss=ours_loss,
        num_tokens=int(mask.sum()),
        tolerance=tolerance_of(dense.dtype),
        unit="images" if images else "tokens",
    )


def _predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether a model's [B, S, ...] outputs are logits of the next token, not of labels, nor hidden states."""
    headless = model.base_model is model and model.get_output_embeddings() is None
    return not (type(model).__name__.endswith("ForTokenClassification") or headless)


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """`Outputs.logits`."""
    device = input_device(model)
    if model.main_input_name == "pixel_values":
        output = model(pixel_values=ids.to(device, model.dtype))
        return output[0].cpu()
    batches = [(ids, mask)]
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    if classifier and model.config.get_text_config().pad_token_id is None:
        # Transformers then cannot tell where a sequence ends, and takes only one at a time, without padding.
        batches = [(row[None, real], real[None, real].to(mask)) for row, real in zip(ids, mask.bool(), strict=True)]
    # A cache of keys and values would only take memory.
    options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    outputs = [model(input_ids=i.to(device), attention_mask=m.to(device), **options) for i, m in batches]
    return torch.cat([output[0] for output in outputs]).cpu()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs: of one that is offloaded, hooks bring them to where they are needed."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def proof_tokens(source: str | Path, model: PreTrainedModel, text: str | None = None) -> Tensor | None:
    """Tokens to compare a checkpoint's models on, int64 [1, S]: no more than the model has positions.

    Args:
        source: folder or name of the checkpoint, whose tokenizer is taken.
        model: its model.
        text: its first 512 tokens are taken; None takes the first 128 of `PROOF_TEXT`, or gives None if that is not to
            be had in the model's tokens.

    Raises:
        ValueError: when there is a text but no tokenizer for it, or it gives less than two tokens, or unknown ones.
    """
    if model.main_input_name != "input_ids" and text is None:
        return None
    tokenizer = _tokenizer_of(source)
    if tokenizer is None:
        if text is not None:
            raise ValueError(
                f"proof_text: needs a tokenizer, and {source} has none; leave it out to take random tokens"
            )
        return None
    config = model.config.get_text_config()
    most = _MOST_TOKENS if text is None else _MOST_TOKENS_GIVEN
    positions = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    most = min(most, *(count or most for count in positions))
    ids = tokenizer(PROOF_TEXT if text is None else text, return_tensors="pt")["input_ids"][:, :most].long()
    if ids.shape[1] > 1 and int(ids.max()) < config.vocab_size:
        return ids
    if text is not None:
        raise ValueError(f"proof_text: must be two or more tokens below {config.vocab_size}, got {ids.tolist()}")
    return None


def _tokenizer_of(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, if there is one that knows words."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError):
        return None
    # Where its files are missing, the host makes an empty tokenizer of some families, without a word.
    return tokenizer if len(set(tokenizer(PROOF_TEXT)["input_ids"])) >= _LEAST_WORDS else None


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
    real = torch.zeros_like(mask, dtype=torch.bool)
    real[:, :-1] = (mask[:, 1:] * mask[:, :-1]).bool()
    losses = [
        nn.functional.cross_entropy(piece.float(), following, reduction="none")
        for piece, following in _pieces(real, logits, ids.roll(-1, 1))
    ]
    return torch.cat(losses).mean().item()


def _pieces(chosen: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What is chosen of tensors with the same first axes, a few tokens at a time: float32 logits are large.

    Args:
        chosen: bool [B, S] or [B].
        tensors: [*chosen.shape, ...].
    """
    flat = [tensor.flatten(0, chosen.ndim - 1) for tensor in tensors]
    for rows in chosen.flatten().nonzero().flatten().split(16):
        yield tuple(tensor[rows] for tensor in flat)


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
