"""Configuration room: the mixture's fields on the dense family's config, every rule checked at construction."""

from st_moe.configuration.configuration_st_moe import (
    FFN_ATTRIBUTES,
    MIXTURE_FIELDS,
    ROUTER_TYPES,
    STMoEConfig,
    dense_model_types,
    family_config,
    on_new_family,
)

__all__ = [
    "FFN_ATTRIBUTES",
    "MIXTURE_FIELDS",
    "ROUTER_TYPES",
    "STMoEConfig",
    "dense_model_types",
    "family_config",
    "on_new_family",
]
