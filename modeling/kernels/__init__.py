"""Kernels of the experts' computation."""

from st_moe.modeling.kernels.sorted_experts import sorted_experts

__all__ = ["sorted_experts"]
