"""What is due after each optimizer step, in whatever training loop: one hook on all of torch's optimizers."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

# By identity, in the order of their registration: ranks that wait for each other must agree on it.
_models: WeakValueDictionary[int, Any] = WeakValueDictionary()


def update_after_steps(model: Any) -> None:
    """Call `model.update_router_bias()` after each step of an optimizer that has a parameter of the model.

    The model is not kept alive. Optimizers that do not derive from torch's, or that step on tensors of their own, call
    no hook: their training loop has to make the call.
    """
    _models[id(model)] = model
    _install()


@cache
def _install() -> None:
    """Register the hook, once."""
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in list(_models.values()):
        if any(id(parameter) in stepped for parameter in model.parameters()):
            model.update_router_bias()
