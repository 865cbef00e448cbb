"""Conversion room: recipes, upcycling in memory and on disk, and the proof that step 0 keeps the function.

Names are imported when they are first used: a streaming conversion does without the model classes and their memory.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_moe.conversion.checkpoint import check_checkpoint
    from st_moe.conversion.folder import upcycle_checkpoint
    from st_moe.conversion.native import export_native, import_native
    from st_moe.conversion.native_dense import export_dense, to_dense
    from st_moe.conversion.native_per_expert import export_per_expert, import_checkpoint, read_per_expert
    from st_moe.conversion.proof import IdentityProof, prove_identity
    from st_moe.conversion.recipes import RECIPES, ExpertTensors, FFNTensors, LayerTensors, Pieces
    from st_moe.conversion.resize import grow_experts, remove_experts, set_num_experts_per_tok
    from st_moe.conversion.router_init import ROUTER_INITS, initialise_routers, router_inputs
    from st_moe.conversion.upcycle import load_dense, upcycle

_MODULES = {
    "RECIPES": "recipes",
    "ROUTER_INITS": "router_init",
    "ExpertTensors": "recipes",
    "FFNTensors": "recipes",
    "IdentityProof": "proof",
    "LayerTensors": "recipes",
    "Pieces": "recipes",
    "check_checkpoint": "checkpoint",
    "export_dense": "native_dense",
    "export_native": "native",
    "export_per_expert": "native_per_expert",
    "grow_experts": "resize",
    "import_checkpoint": "native_per_expert",
    "import_native": "native",
    "initialise_routers": "router_init",
    "load_dense": "upcycle",
    "prove_identity": "proof",
    "read_per_expert": "native_per_expert",
    "remove_experts": "resize",
    "router_inputs": "router_init",
    "set_num_experts_per_tok": "resize",
    "to_dense": "native_dense",
    "upcycle": "upcycle",
    "upcycle_checkpoint": "folder",
}

__all__ = [
    "RECIPES",
    "ROUTER_INITS",
    "ExpertTensors",
    "FFNTensors",
    "IdentityProof",
    "LayerTensors",
    "Pieces",
    "check_checkpoint",
    "export_dense",
    "export_native",
    "export_per_expert",
    "grow_experts",
    "import_checkpoint",
    "import_native",
    "initialise_routers",
    "load_dense",
    "prove_identity",
    "read_per_expert",
    "remove_experts",
    "router_inputs",
    "set_num_experts_per_tok",
    "to_dense",
    "upcycle",
    "upcycle_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Room(ModuleType):
    """This module's type: the import of the module `upcycle` must not hide the function of the same name."""

    @property
    def upcycle(self) -> Any:
        """The function."""
        return __getattr__("upcycle")

    @upcycle.setter
    def upcycle(self, module: ModuleType) -> None:
        """Importing a module also sets it on its package: left undone."""


sys.modules[__name__].__class__ = _Room
