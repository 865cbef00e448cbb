"""Modeling room: routers, experts, the sparse block, losses, and the model classes of every dense family."""

from st_moe.modeling.families import Family, family_of
from st_moe.modeling.ffn import LAYOUTS, FFNLayout, FFNLocation, locate_ffns
from st_moe.modeling.modeling_st_moe import STMoEForCausalLM, STMoEForSequenceClassification, STMoEModel
from st_moe.modeling.outputs import STMoECausalLMOutput, STMoEModelOutput, STMoESequenceClassifierOutput
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
    "STMoEForSequenceClassification",
    "STMoEModel",
    "STMoEModelOutput",
    "STMoESequenceClassifierOutput",
    "TopKRouter",
    "family_of",
    "locate_ffns",
    "router_class",
]
