"""Sparse mixtures of experts from any dense Transformers model."""

from transformers import AutoConfig

from st_moe.configuration import STMoEConfig
from st_moe.conversion import prove_identity, upcycle
from st_moe.finetune import STMoETrainer
from st_moe.modeling import STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel, locate_ffns

AutoConfig.register(STMoEConfig.model_type, STMoEConfig)

__all__ = [
    "STMoEConfig",
    "STMoEForCausalLM",
    "STMoEForSequenceClassification",
    "STMoEModel",
    "STMoETrainer",
    "locate_ffns",
    "prove_identity",
    "upcycle",
]
