"""Routing: the record, every router, expert capacity, the losses, and the scope that a forward pass shares."""

from st_moe.modeling.routing.capacity import expert_capacity, keep_within_capacity
from st_moe.modeling.routing.record import Routing
from st_moe.modeling.routing.router import Router, router_class
from st_moe.modeling.routing.top_k import TopKRouter

__all__ = ["Router", "Routing", "TopKRouter", "expert_capacity", "keep_within_capacity", "router_class"]
