"""What the models return.

Shape letters: B sequences, S tokens per sequence, T = B * S, V vocabulary, L sparse layers, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class STMoEModelOutput(ModelOutput):
    """Output of `STMoEModel`.

    Attributes:
        last_hidden_state: [B, S, H].
        past_key_values: the dense family's cache.
        hidden_states, attentions, cross_attentions: as the dense family returns them.
        router_logits: float32 [T, E] per run of a sparse layer, when asked for with `output_router_logits`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class _WithRouting(ModelOutput):
    """What a head's output says of the routers; losses are float32 scalars, means over the sparse layers.

    Attributes:
        loss: in training lm_loss plus the auxiliary part, in evaluation lm_loss alone; None without labels.
        lm_loss: the dense family's own loss; None without labels.
        balance_loss: 1 when balanced, E when collapsed onto one expert (first-choice count); None without such a loss.
        router_z_loss: mean squared logsumexp of the router logits; None without such a loss.
        aux_loss: the auxiliary losses times their coefficients, summed.
        aux_losses: each auxiliary loss by name, without its coefficient.
        logits: [B, S, V]; of a classifier [B, labels], or of tokens [B, S, labels].
        router_logits: float32 [T, E] per run of a sparse layer, when asked for with `output_router_logits`.
        expert_load: float32 [L, E], share of the assignments per expert; rows sum to 1. Where layers differ in their
            number of experts, E is the largest and the rest is 0.
        router_entropy: float32 [L], entropy of the router's probabilities as a fraction of ln E.
        dropped_fraction: float32 [L], share of the assignments that capacity refused.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    balance_loss: torch.FloatTensor | None = None
    router_z_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    aux_losses: dict[str, torch.FloatTensor] | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_load: torch.FloatTensor | None = None
    router_entropy: torch.FloatTensor | None = None
    dropped_fraction: torch.FloatTensor | None = None


@dataclass
class STMoECausalLMOutput(_WithRouting):
    """Output of `STMoEForCausalLM`."""

    __doc__ += _WithRouting.__doc__ or ""


@dataclass
class STMoESequenceClassifierOutput(_WithRouting):
    """Output of `STMoEForSequenceClassification`; `lm_loss` is the classification loss."""

    __doc__ += _WithRouting.__doc__ or ""


@dataclass
class STMoETokenClassifierOutput(_WithRouting):
    """Output of `STMoEForTokenClassification`; `lm_loss` is the classification loss."""

    __doc__ += _WithRouting.__doc__ or ""


@dataclass
class STMoEImageClassifierOutput(_WithRouting):
    """Output of `STMoEForImageClassification`; `lm_loss` is the classification loss."""

    __doc__ += _WithRouting.__doc__ or ""
