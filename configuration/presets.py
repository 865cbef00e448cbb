"""Mixture fields of published recipes: `upcycle(dense, **PRESET)`, `STMoEConfig.from_dense(config, **PRESET)`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Of 4 slots the first 2 are in use at first; layers 0, 2, 4, ... are sparse; all four loss terms of the published code.
# What its three models share: they differ in the dense model, and in how many batches they accumulate.
_DYNMOE: Mapping[str, Any] = MappingProxyType(
    {
        "router_type": "top_any",
        "num_experts": 4,
        "initial_experts": 2,
        "sparse_layers": "every:2:0",
        "diversity_loss_coef": 1e-2,
        "simplicity_loss_coef": 1e-2,
        "top_any_balance_loss_coef": 1e-2,
        "efficiency_loss_coef": 1e-2,
    }
)

#: DynMoE on StableLM-2 1.6B (Guo et al. 2024), for dense models of the family `stablelm`.
DYNMOE_STABLELM = _DYNMOE
#: DynMoE on Qwen 1.8B, for the family `qwen2`, which holds that model today.
DYNMOE_QWEN2 = _DYNMOE
#: DynMoE on Phi-2, for the family `phi`.
DYNMOE_PHI2 = _DYNMOE
