"""Experts by sorting: assignments grouped by expert, one matrix product per expert, backward written by hand.

Autograd over `weight[e]` would allocate and add a full-size gradient per expert; here each expert's gradient is written
once. The operator is opaque to `torch.compile` and `torch.export`, so its data-dependent loop does not break a graph.

Shape letters: T tokens, H hidden size, I expert width, E experts, K choices per token, A = T * K assignments, n rows of
one expert, P = 2 for gated experts (gate first, then up) and 1 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from st_moe.modeling.kernels import activations

#: Namespace of the operators. Beside the package's own, a process may hold copies of this module, from bundles, each
#: with another namespace: a second operator of the same name would take the first one's place.
NAMESPACE = "st_moe" if __name__.startswith("st_moe.") else f"st_moe_{crc32(__name__.encode()):08x}"
_OPERATORS = getattr(torch.ops, NAMESPACE)

# Elements of one expert's matrix.
_LARGE_WEIGHT = 2**21


class ExpertParameters(NamedTuple):
    """Parameters of all experts of a layer, or their gradients.

    Attributes:
        w_in: [E, P * I, H].
        w_out: [E, H, I].
        b_in: [E, P * I] or None.
        b_out: [E, H] or None.
        scale: [E, I], multiplicative bias of the hidden activation, or None.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    scale: Tensor | None = None

    def map(self, function: Callable[[Tensor], Any]) -> ExpertParameters:
        """The function applied to every parameter there is."""
        b_in, b_out, scale = (None if p is None else function(p) for p in self[2:])
        return ExpertParameters(function(self.w_in), function(self.w_out), b_in, b_out, scale)

    def of(self, expert: int) -> ExpertParameters:
        """Parameters of one expert; never called under autograd."""
        return self.map(lambda parameter: parameter[expert])


class _Runs(NamedTuple):
    """Assignments sorted by expert: `order` int64 [A], `token` int64 [A], E + 1 `offsets` into both."""

    order: Tensor
    token: Tensor
    offsets: list[int]

    def __iter__(self) -> Iterator[tuple[int, slice]]:  # type: ignore[override]
        return ((e, slice(a, b)) for e, (a, b) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)))

    @property
    def used(self) -> int:
        return self.offsets[-1]


def _sort_by_expert(index: Tensor, weight: Tensor, num_experts: int) -> _Runs:
    """Group assignments by expert.

    Those with weight 0, and those of experts held elsewhere (index >= E under expert parallelism), belong to no run.
    """
    queue = torch.where(weight == 0, num_experts, index).flatten().clamp(max=num_experts)
    order = torch.argsort(queue, stable=True)
    counts = torch.bincount(queue, minlength=num_experts + 1)[:num_experts]
    token = order.div(index.shape[1], rounding_mode="floor")
    return _Runs(order, token, [0, *counts.cumsum(0).tolist()])


def _empty_rows(runs: _Runs, like: Tensor) -> Tensor:
    """Room for one row per assignment in a run, and a last row of zeros for all others: [used + 1, H]."""
    rows = like.new_empty(runs.used + 1, like.shape[1])
    rows[-1].zero_()
    return rows


def _combine(rows: Tensor, runs: _Runs, weight: Tensor | None, shape: torch.Size) -> Tensor:
    """Sum of each token's rows, times its weights if given: [used + 1, H], [T, K] -> [T, H]."""
    place = torch.empty_like(runs.order)
    place[runs.order] = torch.arange(len(place), device=place.device)
    # Assignments outside of the runs read the zeros: not another token's row, whose infinity would spread as 0 * inf.
    place = place.clamp(max=runs.used).view(shape)
    return F.embedding_bag(
        place, rows, mode="sum", per_sample_weights=None if weight is None else weight.to(rows.dtype)
    )


def _linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T + b, without a temporary."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _transposed_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left^T right, for a weight's gradient."""
    # For large weights on a CPU, the bfloat16 product with a transposed left operand costs more than copying it first
    # (`python -m benchmarks.layer --case small_1024`).
    copy = left.device.type == "cpu" and left.dtype == torch.bfloat16 and out.numel() > _LARGE_WEIGHT
    torch.mm(left.t().contiguous() if copy else left.t(), right, out=out)


def _expert_forward(
    x: Tensor, p: ExpertParameters, kept: Tensor | None, activation: str, gated: bool, pre: Tensor, out: Tensor
) -> None:
    """One expert: x [n, H] -> pre [n, P * I] and out [n, H], both written in place."""
    _linear_out(x, p.w_in, p.b_in, out=pre)
    if gated:
        gate, up = pre.chunk(2, dim=-1)
        hidden = activations.apply(activation, gate) * up
    else:
        hidden = activations.apply(activation, pre)
    for factor in (p.scale, kept):
        if factor is not None:
            hidden = hidden * factor
    _linear_out(hidden, p.w_out, p.b_out, out=out)


def _expert_backward(
    grad: Tensor,
    x: Tensor | None,
    row_weight: Tensor,
    p: ExpertParameters,
    kept: Tensor | None,
    pre: Tensor,
    activation: str,
    gated: bool,
    d: ExpertParameters,
) -> tuple[Tensor, Tensor]:
    """One expert's gradients: those of its parameters into `d`; returns d_pre [n, P * I] and d_weight [n].

    Args:
        grad: [n, H], gradient of the layer's output at the expert's rows; overwritten.
        x: [n, H], the expert's input; None if `d.w_in` is not asked for.
        row_weight: [n, 1], combine weights.
        pre: [n, P * I], saved by the forward.
        d: where to write; an empty tensor is not asked for.
    """
    gate, up = pre.chunk(2, dim=-1) if gated else (pre, None)
    act = activations.apply(activation, gate)
    product = act if up is None else act * up
    factors = [factor for factor in (p.scale, kept) if factor is not None]
    hidden = product
    for factor in factors:
        hidden = hidden * factor
    # The gradient of `hidden` for weight 1 gives the weight's own gradient, so no expert output need be kept.
    d_hidden = grad @ p.w_out
    d_weight = (d_hidden * hidden).sum(-1, dtype=row_weight.dtype)
    if p.b_out is not None:
        d_weight += grad @ p.b_out
    d_hidden *= row_weight
    grad *= row_weight
    if d.w_out.numel():
        _transposed_product(grad, hidden, out=d.w_out)
    if d.b_out is not None and d.b_out.numel():
        torch.sum(grad, 0, out=d.b_out)
    if d.scale is not None and d.scale.numel():
        d_scale = d_hidden * product if kept is None else d_hidden * product * kept
        torch.sum(d_scale, 0, out=d.scale)
    for factor in factors:
        d_hidden = d_hidden * factor
    if up is None:
        d_pre = activations.backward(activation, d_hidden, gate)
    else:
        d_pre = torch.empty_like(pre)
        d_gate, d_up = d_pre.chunk(2, dim=-1)
        torch.mul(d_hidden, act, out=d_up)
        d_gate.copy_(activations.backward(activation, d_hidden * up, gate))
    if x is not None:
        _transposed_product(d_pre, x, out=d.w_in)
    if d.b_in is not None and d.b_in.numel():
        torch.sum(d_pre, 0, out=d.b_in)
    return d_pre, d_weight


@torch.library.custom_op(f"{NAMESPACE}::sorted_experts", mutates_args=())
def _forward(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    activation: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the experts' outputs [T, H] and, if `save`, the projected rows [A, P * I] for the backward."""
    runs = _sort_by_expert(index, weight, len(w_in))
    parameters = ExpertParameters(w_in, w_out, b_in, b_out, scale)
    projected = hidden.new_empty(index.numel() if save else 0, w_in.shape[1])
    projected[runs.used :].zero_()
    rows = _empty_rows(runs, hidden)
    for e, run in runs:
        if run.start == run.stop:
            continue
        pre = projected[run] if save else hidden.new_empty(run.stop - run.start, w_in.shape[1])
        kept = None if keep is None else keep[runs.order[run]]
        x = hidden.index_select(0, runs.token[run])
        _expert_forward(x, parameters.of(e), kept, activation, gated, pre=pre, out=rows[run])
    return _combine(rows, runs, weight, index.shape), projected


@_forward.register_fake
def _(
    hidden: Tensor, index: Tensor, weight: Tensor, w_in: Tensor, *args: Any, save: bool | None = None
) -> tuple[Tensor, Tensor]:
    save = args[-1] if save is None else save
    return torch.empty_like(hidden), hidden.new_empty(index.numel() if save else 0, w_in.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::sorted_experts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    projected: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of hidden, weight, w_in, w_out, b_in, b_out, scale, in this order; empty where `needs` says no."""
    runs = _sort_by_expert(index, weight, len(w_in))
    parameters = ExpertParameters(w_in, w_out, b_in, b_out, scale)
    gradients = ExpertParameters(
        *(
            hidden.new_empty(len(w_in), 0) if p is None or not need else torch.empty_like(p)
            for p, need in zip(parameters, needs[2:], strict=True)
        )
    )
    by_row = weight.flatten()[runs.order, None]
    d_rows = _empty_rows(runs, grad)
    d_weight = weight.new_zeros(index.numel())
    for e, run in runs:
        if run.start == run.stop:
            gradients.of(e).map(Tensor.zero_)
            continue
        x = hidden.index_select(0, runs.token[run]) if needs[2] else None
        g = grad.index_select(0, runs.token[run])
        kept = None if keep is None else keep[runs.order[run]]
        d_pre, d_weight[runs.order[run]] = _expert_backward(
            g, x, by_row[run], parameters.of(e), kept, projected[run], activation, gated, gradients.of(e)
        )
        if needs[0]:
            torch.mm(d_pre, w_in[e], out=d_rows[run])
    d_hidden = _combine(d_rows, runs, None, index.shape) if needs[0] else hidden.new_empty(0)
    return [d_hidden, d_weight.view_as(weight), *gradients]  # type: ignore[list-item]


@_backward.register_fake
def _(grad: Tensor, hidden: Tensor, index: Tensor, weight: Tensor, *args: Any) -> list[Tensor]:
    parameters, needs = args[:5], args[-1]
    d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    gradients = [
        hidden.new_empty(len(parameters[0]), 0) if p is None or not need else torch.empty_like(p)
        for p, need in zip(parameters, needs[2:], strict=True)
    ]
    return [d_hidden, torch.empty_like(weight), *gradients]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, index, weight, w_in, w_out, b_in, b_out, scale, keep, projected = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6, 7)]
    if grad is None:
        return (None,) * 12
    gradients = _OPERATORS.sorted_experts_backward(
        grad, hidden, index, weight, w_in, w_out, b_in, b_out, scale, keep, projected, ctx.activation, ctx.gated, wanted
    )
    d_hidden, d_weight, *rest = (g if need else None for g, need in zip(gradients, wanted, strict=True))
    return (d_hidden, None, d_weight, *rest, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def sorted_experts(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    parameters: ExpertParameters,
    activation: str,
    gated: bool,
    keep: Tensor | None = None,
) -> Tensor:
    """Weighted sum over each token's experts: y_t = sum_k weight[t, k] * expert_{index[t, k]}(hidden_t).

    Args:
        hidden: [T, H].
        index: int64 [T, K]; an index of E or more is an expert held elsewhere and is skipped.
        weight: [T, K]; an assignment of weight 0 is skipped, and gets no gradient.
        parameters: all in the dtype of `hidden`.
        activation: from `activations.activation_name`.
        gated: whether the first half of w_in is a gate.
        keep: [A, I], factors of the hidden activation (dropout), in the order of the assignments; no gradient.

    Returns:
        [T, H]. Differentiable once in hidden, weight and the parameters.
    """
    tensors = (hidden, weight, *parameters)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    output, _ = _OPERATORS.sorted_experts(hidden, index, weight, *parameters, keep, activation, gated, save)
    return output
