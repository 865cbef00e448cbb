"""Conversion room: recipes, upcycling in memory and on disk, and the proof that step 0 keeps the function."""

from st_moe.conversion.checkpoint import check_checkpoint
from st_moe.conversion.folder import upcycle_checkpoint
from st_moe.conversion.proof import IdentityProof, prove_identity
from st_moe.conversion.recipes import RECIPES, FFNTensors, LayerTensors
from st_moe.conversion.upcycle import load_dense, upcycle

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
