"""Sparse mixtures of experts from any dense Transformers model.

Importing the package registers the model family with Transformers' Auto classes. Everything but the config is imported
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from st_moe.configuration import DYNMOE_PHI2, DYNMOE_QWEN2, DYNMOE_STABLELM, STMoEConfig, on_new_family

if TYPE_CHECKING:
    from st_moe.conversion import prove_identity
    from st_moe.conversion.upcycle import upcycle
    from st_moe.finetune import AdaptiveExperts, STMoETrainer
    from st_moe.modeling import (
        STMoEForCausalLM,
        STMoEForImageClassification,
        STMoEForSequenceClassification,
        STMoEForTokenClassification,
        STMoEModel,
        locate_ffns,
    )

_ROOMS = {
    "AdaptiveExperts": "st_moe.finetune",
    "STMoEForCausalLM": "st_moe.modeling",
    "STMoEForImageClassification": "st_moe.modeling",
    "STMoEForSequenceClassification": "st_moe.modeling",
    "STMoEForTokenClassification": "st_moe.modeling",
    "STMoEModel": "st_moe.modeling",
    "STMoETrainer": "st_moe.finetune",
    "locate_ffns": "st_moe.modeling",
    "prove_identity": "st_moe.conversion",
    "upcycle": "st_moe.conversion",
}

__all__ = [
    "DYNMOE_PHI2",
    "DYNMOE_QWEN2",
    "DYNMOE_STABLELM",
    "AdaptiveExperts",
    "STMoEConfig",
    "STMoEForCausalLM",
    "STMoEForImageClassification",
    "STMoEForSequenceClassification",
    "STMoEForTokenClassification",
    "STMoEModel",
    "STMoETrainer",
    "locate_ffns",
    "prove_identity",
    "upcycle",
]


def _import_modeling(config_class: type[STMoEConfig]) -> None:
    importlib.import_module("st_moe.modeling")


AutoConfig.register(STMoEConfig.model_type, STMoEConfig)
# The model classes of a family register with the Auto classes when the modeling room makes them; a config comes first.
on_new_family(_import_modeling)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return __all__
