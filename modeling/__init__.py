"""Modeling room: routers, experts, the sparse block, losses, and the model classes of every dense family."""

from st_moe.modeling.families import Family, family_of
from st_moe.modeling.ffn import LAYOUTS, FFNLayout, FFNLocation, locate_ffns
from st_moe.modeling.modeling_st_moe import (
    STMoEForCausalLM,
    STMoEForImageClassification,
    STMoEForSequenceClassification,
    STMoEForTokenClassification,
    STMoEModel,
)
from st_moe.modeling.outputs import (
    STMoECausalLMOutput,
    STMoEImageClassifierOutput,
    STMoEModelOutput,
    STMoESequenceClassifierOutput,
    STMoETokenClassifierOutput,
)
from st_moe.modeling.routing import Router, Routing, TopKRouter, router_class

__all__ = [
    "LAYOUTS",
    "FFNLayout",
    "FFNLocation",
    "Family",
    "Router",
    "Routing",
    "STMoECausalLMOutput",
    "STMoEForCausalLM",
    "STMoEForImageClassification",
    "STMoEForSequenceClassification",
    "STMoEForTokenClassification",
    "STMoEImageClassifierOutput",
    "STMoEModel",
    "STMoEModelOutput",
    "STMoESequenceClassifierOutput",
    "STMoETokenClassifierOutput",
    "TopKRouter",
    "family_of",
    "locate_ffns",
    "router_class",
]
