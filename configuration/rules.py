"""Rules of the mixture's fields: each broken one is a sentence with field, rule and value."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from st_moe.configuration.routers import LOSSES, ROUTER_TYPES, RouterType

Values = Mapping[str, Any]
#: Fields, their rule in words, and whether a value keeps it.
_Rule = tuple[tuple[str, ...], str, Callable[[Any], bool]]

_RULES: tuple[_Rule, ...] = (
    (("moe_intermediate_size",), "must be positive or None", lambda v: v >= 1),
    (("router_jitter_noise", "expert_dropout"), "must be in [0, 1)", lambda v: 0 <= v < 1),
    (
        ("capacity_factor", "eval_capacity_factor"),
        "must be positive and finite, or None for dropless",
        lambda v: 0 < v < math.inf,
    ),
    (
        (
            "min_capacity",
            "capacity_group_size",
            "n_group",
            "topk_group",
            "slots_per_expert",
            "coordinate_descent_iterations",
        ),
        "must be at least 1",
        lambda v: v >= 1,
    ),
    (
        (
            *(f"{loss}_coef" for loss in LOSSES),
            "initializer_range",
            "router_gumbel_noise",
            "router_gaussian_noise",
            "bias_update_rate",
        ),
        "must be finite and not negative",
        lambda v: 0 <= v < math.inf,
    ),
    (("num_shared_experts",), "must not be negative", lambda v: v >= 0),
    (
        ("routed_scaling_factor", "coordinate_descent_epsilon"),
        "must be positive and finite",
        lambda v: 0 < v < math.inf,
    ),
    (("coordinate_descent_k_ratio",), "must be at least 1 and finite", lambda v: 1 <= v < math.inf),
    (("depth_fraction",), "must be in (0, 1]", lambda v: 0 < v <= 1),
)


def rule_faults(values: Values, defaults: Values, num_layers: int | None, causal: bool) -> list[str]:
    """Broken rules among the well-typed `values` of the mixture's fields; a missing value breaks no rule.

    Args:
        values: the fields that have the right type.
        defaults: the fields' defaults.
        num_layers: layers of the model, None if unknown.
        causal: whether the dense family is a causal language model.
    """
    layers_fault = sparse_layers_fault(values.get("sparse_layers"), num_layers) if num_layers else None
    faults = _size_faults(values, None if layers_fault or not num_layers else num_layers)
    if num_layers is not None and num_layers < 1:
        faults.append(f"num_hidden_layers: must be at least 1, got {num_layers}")
    for names, rule, holds in _RULES:
        for name in names:
            if values.get(name) is not None and not holds(values[name]):
                faults.append(f"{name}: {rule}, got {values[name]!r}")
    if values.get("shared_expert_gate") and values.get("num_shared_experts") == 0:
        faults.append("shared_expert_gate: needs num_shared_experts of 1 or more, got True without any")
    faults += [layers_fault] if layers_fault else []
    router_type = values.get("router_type")
    if router_type is None:
        return faults
    if router_type not in ROUTER_TYPES:
        nearest = difflib.get_close_matches(str(router_type), list(ROUTER_TYPES), n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        return [*faults, f"router_type: must be one of {', '.join(ROUTER_TYPES)}{hint}, got {router_type!r}"]
    return faults + _router_faults(values, defaults, ROUTER_TYPES[router_type], causal) + _router_size_faults(values)


def _each(value: Any) -> list[Any]:
    """The values of a field that takes one value, or one per sparse layer."""
    return list(value) if isinstance(value, list | tuple) else [value]


def layer_sizes(values: Values, num_sparse: int) -> list[tuple[int, int]]:
    """E and K of each of `num_sparse` sparse layers, from valid values."""
    experts, choices = (
        one * num_sparse if len(one) == 1 else one
        for one in (_each(values["num_experts"]), _each(values["num_experts_per_tok"]))
    )
    return list(zip(experts, choices, strict=True))


def _size_faults(values: Values, num_layers: int | None) -> list[str]:
    """Faults of the numbers of experts and choices."""
    faults = []
    sparse = None if num_layers is None else len(sparse_layer_indices(values.get("sparse_layers"), num_layers))
    for name in ("num_experts", "num_experts_per_tok"):
        if isinstance(values.get(name), list | tuple) and sparse not in (None, len(values[name])):
            faults.append(f"{name}: must be one value or {sparse} (one per sparse layer), got {values[name]!r}")
    experts, choices = values.get("num_experts"), values.get("num_experts_per_tok")
    if experts is not None and not all(e >= 1 for e in _each(experts)):
        return [*faults, f"num_experts: must be at least 1, got {experts!r}"]
    if choices is None or faults:
        return faults
    most = [math.inf] if experts is None else _each(experts)
    count = max(len(most), len(_each(choices)))
    pairs = zip(most * (count // len(most)), _each(choices) * (count // len(_each(choices))), strict=False)
    if not all(1 <= k <= e for e, k in pairs):
        faults.append(f"num_experts_per_tok: must be between 1 and num_experts={experts}, got {choices!r}")
        return faults
    ranks = max(max(_each(choices)) - 1, 1)
    threshold = values.get("second_expert_threshold")
    length = ranks if isinstance(threshold, list | tuple) else 1
    if threshold is not None and not (len(_each(threshold)) == length and all(0 <= t <= 1 for t in _each(threshold))):
        faults.append(
            f"second_expert_threshold: must be in [0, 1], one value or {ranks} (one per rank from the second choice "
            f"on), got {threshold!r}"
        )
    return faults


def _router_faults(values: Values, defaults: Values, router: RouterType, causal: bool) -> list[str]:
    """Fields that do not go with the router, most of which it would ignore without a word."""
    kind = values["router_type"]
    faults = []
    if causal and not router.causal and not values.get("allow_non_causal_routing"):
        faults.append(
            "router_type: must be causal for a causal language model unless allow_non_causal_routing=True, got "
            f"{kind!r}"
        )
    for name in sorted({option for row in ROUTER_TYPES.values() for option in row.options} - set(router.options)):
        if name in values and values[name] != defaults.get(name):
            readers = ", ".join(key for key, row in ROUTER_TYPES.items() if name in row.options)
            faults.append(f"{name}: is read by router_type {readers} only, not by {kind}; got {values[name]!r}")
    for name in () if router.capacity else ("capacity_factor", "eval_capacity_factor", "renormalize_after_drop"):
        if values.get(name):
            none = defaults.get(name)
            faults.append(f"{name}: must be {none} with router_type {kind!r}, got {values[name]!r}")
    for loss in LOSSES:
        coefficient = f"{loss}_coef"
        # The fields that are numbers by default stay as they are for routers without those losses.
        optional = coefficient in defaults and defaults[coefficient] is None
        if optional and loss not in router.losses and values.get(coefficient):
            having = ", ".join(key for key, row in ROUTER_TYPES.items() if loss in row.losses)
            faults.append(
                f"{coefficient}: router_type {kind!r} has no such loss ({having}), got {values[coefficient]!r}"
            )
    return faults


def _router_size_faults(values: Values) -> list[str]:
    """Rules of single routers that tie their fields to the numbers of experts and choices."""
    faults: list[str] = []
    names = ("num_experts", "num_experts_per_tok")
    if any(values.get(name) is None for name in names):
        return faults
    experts, choices = (_each(values[name]) for name in names)
    kind = values["router_type"]
    groups, kept = values.get("n_group"), values.get("topk_group")
    if kind == "sigmoid_top_k" and groups and kept and groups >= 1:
        if any(e % groups or (groups > 1 and e // groups < 2) for e in experts):
            faults.append(
                f"n_group: must divide num_experts={values['num_experts']} into groups of two or more, got {groups}"
            )
        elif kept > groups or any(k > kept * (e // groups) for e in experts for k in choices):
            faults.append(
                f"topk_group: must be between 1 and n_group={groups} and hold num_experts_per_tok="
                f"{values['num_experts_per_tok']} experts, got {kept}"
            )
    if kind == "mixture_of_depths" and set(experts) | set(choices) != {1}:
        faults.append(
            "num_experts: must be 1, with num_experts_per_tok=1, for router_type 'mixture_of_depths', got "
            f"{values['num_experts']} and {values['num_experts_per_tok']}"
        )
    first = values.get("initial_experts")
    if first is not None and not all(1 <= first <= e for e in experts):
        faults.append(f"initial_experts: must be between 1 and num_experts={values['num_experts']}, got {first}")
    if values.get("second_place_loss_coef") and min(choices) < 2:
        faults.append(
            f"second_place_loss_coef: needs num_experts_per_tok of 2 or more, got {values['num_experts_per_tok']}"
        )
    return faults


def sparse_layer_indices(sparse_layers: Sequence[int] | str | None, num_layers: int) -> list[int]:
    """Indices that a valid `sparse_layers` stands for, among `num_layers` layers."""
    if sparse_layers is None:
        return list(range(num_layers))
    if isinstance(sparse_layers, str):
        kind, *numbers = sparse_layers.split(":")
        step = int(numbers[0])
        if kind == "last":
            return list(range(num_layers - step, num_layers))
        return list(range(int(numbers[1]) if len(numbers) == 2 else step - 1, num_layers, step))
    return sorted(sparse_layers)


def sparse_layers_fault(sparse_layers: Any, num_layers: int) -> str | None:
    """What is wrong with `sparse_layers` for a model of `num_layers` layers, or None."""
    rule = f"must be None, 'every:k', 'every:k:first', 'last:k' or distinct layer indices that fit {num_layers} layers"
    if sparse_layers is None:
        return None
    if isinstance(sparse_layers, str):
        kind, *numbers = sparse_layers.split(":")
        shape = (kind, len(numbers)) in (("every", 1), ("every", 2), ("last", 1))
        valid = shape and all(n.isdecimal() for n in numbers) and 1 <= int(numbers[0]) <= num_layers
        valid = valid and int(numbers[-1]) < num_layers + (len(numbers) == 1)
    else:
        distinct = set(sparse_layers)
        valid = bool(distinct) and len(distinct) == len(sparse_layers) and distinct <= set(range(num_layers))
    return None if valid else f"sparse_layers: {rule}, got {sparse_layers!r}"
