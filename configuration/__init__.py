"""Configuration room: the mixture's fields on the dense family's config, every rule checked at construction."""

from st_moe.configuration.configuration_st_moe import (
    FFN_ATTRIBUTES,
    MIXTURE_FIELDS,
    REFUSED_FAMILIES,
    STMoEConfig,
    dense_config_of,
    dense_model_types,
    family_config,
    num_ffn_layers,
    on_new_family,
)
from st_moe.configuration.heads import auto_class_of
from st_moe.configuration.own_code import check_own_code
from st_moe.configuration.presets import DYNMOE_PHI2, DYNMOE_QWEN2, DYNMOE_STABLELM
from st_moe.configuration.routers import LOSSES, ROUTER_TYPES, RouterType

__all__ = [
    "DYNMOE_PHI2",
    "DYNMOE_QWEN2",
    "DYNMOE_STABLELM",
    "FFN_ATTRIBUTES",
    "LOSSES",
    "MIXTURE_FIELDS",
    "REFUSED_FAMILIES",
    "ROUTER_TYPES",
    "RouterType",
    "STMoEConfig",
    "auto_class_of",
    "check_own_code",
    "dense_config_of",
    "dense_model_types",
    "family_config",
    "num_ffn_layers",
    "on_new_family",
]
