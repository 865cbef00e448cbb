"""Elementwise activations of experts with their derivatives, addressable by name.

A custom operator takes strings, not callables, and autograd does not run inside one. To add an activation: one row in
`DERIVATIVES`. An activation without a row still works, through the experts' slower path under autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import activations as host
from transformers.models.bloom.modeling_bloom import BloomGelu

aten = torch.ops.aten


def _relu_squared_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 2 * x.relu()


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return grad * gate * (1 + 1.702 * x * (1 - gate))


#: Activation classes, and the function (grad, x) -> gradient of x.
DERIVATIVES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Tensor, Tensor], Tensor]], ...] = (
    ((nn.SiLU, host.SiLUActivation), aten.silu_backward),
    ((host.GELUActivation,), aten.gelu_backward),
    (
        (host.GELUTanh, host.NewGELUActivation, host.FastGELUActivation, BloomGelu),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    ((nn.ReLU,), lambda grad, x: aten.threshold_backward(grad, x, 0)),
    ((host.ReLUSquaredActivation,), _relu_squared_backward),
    ((host.QuickGELUActivation,), _quick_gelu_backward),
)

_NAMED: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {}


def activation_name(activation: nn.Module) -> str | None:
    """Name under which the functions below find an activation; None when `DERIVATIVES` has no row for it."""
    for classes, derivative in DERIVATIVES:
        if type(activation) in classes:
            name = f"{type(activation).__module__}.{type(activation).__qualname__}"
            _NAMED.setdefault(name, (activation, derivative))
            return name
    return None


def apply(name: str, x: Tensor) -> Tensor:
    """The named activation of x."""
    return _NAMED[name][0](x)


def backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, given the gradient of the named activation of x."""
    return _NAMED[name][1](grad, x)
