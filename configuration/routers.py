"""The registry of routers: what a config may say in `router_type`, and what it has to know of each router.

To add a router: one class (see `st_moe.modeling.routing.router.Router`), one line here, one test.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class RouterType(NamedTuple):
    """A row of `ROUTER_TYPES`.

    Attributes:
        path: dotted path of the router's class.
        losses: the auxiliary losses that the router has, each with the coefficient it gets where the config's field
            `<loss>_coef` is None.
        options: fields of the config that routers without them in this list do not read.
        causal: whether a token's routing depends on no later token (capacity aside).
        capacity: whether `capacity_factor` applies.
        keeps_function: whether the combine weights of a token sum to 1, as step-0 identity asks for.
    """

    path: str
    losses: Mapping[str, float] = MappingProxyType({"balance_loss": 1e-2, "router_z_loss": 1e-3})
    options: tuple[str, ...] = ()
    causal: bool = True
    capacity: bool = True
    keeps_function: bool = True


_PACKAGE = "st_moe.modeling.routing"
_CHOICE_LOSSES = {
    "balance_loss": 1e-2,
    "router_z_loss": 1e-3,
    "sequence_balance_loss": 0.0,
    "second_place_loss": 0.0,
    "importance_loss": 0.0,
}
_POLICY = ("second_expert_policy_train", "second_expert_policy_eval", "second_expert_threshold")
_NOISE = ("router_jitter_noise", "router_gumbel_noise", "router_gaussian_noise")

#: Values of `router_type`.
ROUTER_TYPES: dict[str, RouterType] = {
    "top_k": RouterType(f"{_PACKAGE}.top_k.TopKRouter", _CHOICE_LOSSES, (*_POLICY, *_NOISE)),
    "noisy_top_k": RouterType(
        f"{_PACKAGE}.noisy_top_k.NoisyTopKRouter",
        {"importance_loss": 1e-2, "load_loss": 1e-2, "router_z_loss": 1e-3},
    ),
    "expert_choice": RouterType(f"{_PACKAGE}.expert_choice.ExpertChoiceRouter", {}, causal=False, keeps_function=False),
    "top_any": RouterType(
        f"{_PACKAGE}.top_any.TopAnyRouter",
        {"diversity_loss": 1e-2, "simplicity_loss": 1e-2, "top_any_balance_loss": 0.0, "efficiency_loss": 0.0},
        ("straight_through", "fallback", "initial_experts"),
    ),
    "sigmoid_top_k": RouterType(
        f"{_PACKAGE}.sigmoid_top_k.SigmoidTopKRouter",
        {"balance_loss": 1e-2, "sequence_balance_loss": 0.0},
        ("n_group", "topk_group", "routed_scaling_factor", "bias_update_rate"),
    ),
    "coordinate_descent": RouterType(
        f"{_PACKAGE}.coordinate_descent.CoordinateDescentRouter",
        _CHOICE_LOSSES,
        (
            *_POLICY,
            *_NOISE,
            "coordinate_descent_iterations",
            "coordinate_descent_epsilon",
            "coordinate_descent_k_ratio",
        ),
    ),
    "soft": RouterType(
        f"{_PACKAGE}.soft.SoftRouter", {}, ("slots_per_expert",), causal=False, capacity=False, keeps_function=False
    ),
    "mixture_of_depths": RouterType(
        f"{_PACKAGE}.mixture_of_depths.MixtureOfDepthsRouter",
        {"depth_loss": 1e-2},
        ("depth_fraction",),
        capacity=False,
        keeps_function=False,
    ),
    "hash": RouterType(f"{_PACKAGE}.fixed.HashRouter", {}, ("hash_by",)),
    "uniform": RouterType(f"{_PACKAGE}.fixed.UniformRouter", {}),
}

#: Every auxiliary loss that some router has; each has a coefficient field `<loss>_coef`.
LOSSES: tuple[str, ...] = tuple(dict.fromkeys(name for router in ROUTER_TYPES.values() for name in router.losses))
