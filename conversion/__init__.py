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
    from st_moe.conversion.proof import IdentityProof, prove_identity
    from st_moe.conversion.recipes import RECIPES, FFNTensors, LayerTensors
    from st_moe.conversion.upcycle import load_dense, upcycle

_MODULES = {
    "RECIPES": "recipes",
    "FFNTensors": "recipes",
    "IdentityProof": "proof",
    "LayerTensors": "recipes",
    "check_checkpoint": "checkpoint",
    "load_dense": "upcycle",
    "prove_identity": "proof",
    "upcycle": "upcycle",
    "upcycle_checkpoint": "folder",
}

__all__ = [
    "RECIPES",
    "FFNTensors",
    "IdentityProof",
    "LayerTensors",
    "check_checkpoint",
    "load_dense",
    "prove_identity",
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
