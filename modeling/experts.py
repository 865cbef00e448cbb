"""Experts: the feed-forward networks of a sparse layer, held as 3-D tensors or as modules.

Both kinds are called `experts(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`, the host's
call, so its experts implementations, expert parallelism and tools that know it work on either.

Shape letters: T tokens, H hidden size, I expert width, E experts, K choices per token, P = 2 if gated else 1.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation
from transformers.utils import logging

from st_moe.configuration import STMoEConfig
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.kernels import activations
from st_moe.modeling.kernels.sorted_experts import ExpertParameters, sorted_experts

logger = logging.get_logger(__name__)

#: Name of this project's experts implementation in the host's registry, and the default.
EXPERTS_IMPLEMENTATION = "st_moe"

# Up to this many assignments a forward pass is bound by reading weights and by overhead, not by products.
_FEW_ASSIGNMENTS = 64


class STMoEExperts(nn.Module):
    """Experts in the host's 3-D layout; made by `tensor_experts`.

    Parameters: `gate_up_proj` [E, 2I, H] (gate first) if gated, else `up_proj` [E, I, H]; `down_proj` [E, H, I]; with
    biases `gate_up_proj_bias` / `up_proj_bias` [E, P * I] and `down_proj_bias` [E, H]; with `multiplicative_bias`,
    `multiplicative_bias` [E, I], ones at first (Zoph et al. 2022, appendix C).

    Args:
        config: the mixture's fields.
        ffn: the dense FFN that the experts stand in for.
        num_experts: E.
    """

    def __init__(self, config: STMoEConfig, ffn: FFNLocation, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = ffn.hidden_size
        self.intermediate_size = config.moe_intermediate_size or ffn.intermediate_size
        self.initializer_range = config.initializer_range
        self.act_fn = copy.deepcopy(ffn.activation)
        self.activation_name = activations.activation_name(self.act_fn)
        self.dropout = nn.Dropout(config.expert_dropout)
        self.in_name = "gate_up_proj" if ffn.gated else "up_proj"
        width = (2 if ffn.gated else 1) * self.intermediate_size
        self.register_parameter(self.in_name, self._empty(width, self.hidden_size))
        self.down_proj = self._empty(self.hidden_size, self.intermediate_size)
        if ffn.bias:
            self.register_parameter(f"{self.in_name}_bias", self._empty(width))
            self.down_proj_bias = self._empty(self.hidden_size)
        if config.multiplicative_bias:
            self.multiplicative_bias = self._empty(self.intermediate_size)
        else:
            self.register_parameter("multiplicative_bias", None)
        self.reset_parameters()

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.num_experts, *shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise weights from N(0, initializer_range), biases with zeros, multiplicative biases with ones."""
        for name, parameter in self.named_parameters(recurse=False):
            if name == "multiplicative_bias":
                init.ones_(parameter)
            elif name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.initializer_range)

    def parameters_of_all(self) -> ExpertParameters:
        """The stacked parameters as the kernels take them."""
        b_in, b_out = (getattr(self, f"{name}_bias", None) for name in (self.in_name, "down_proj"))
        return ExpertParameters(getattr(self, self.in_name), self.down_proj, b_in, b_out, self.multiplicative_bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Plain loop over experts, the reference of the fast implementations (`experts_implementation="eager"`).

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, K].
            top_k_weights: [T, K].

        Returns:
            [T, H], the weighted sum over each token's experts.
        """
        # unbind once: its backward is one stack, where indexing would add a full-size gradient per expert.
        stacked = self.parameters_of_all().map(lambda parameter: parameter.unbind(0))
        output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for expert in range(self.num_experts):
            w_in, w_out, b_in, b_out, scale = stacked.of(expert)
            token, rank = torch.where((top_k_index == expert) & (top_k_weights != 0))
            hidden = nn.functional.linear(hidden_states[token], w_in, b_in)
            hidden = self._apply_gate(hidden) if self.in_name == "gate_up_proj" else self.act_fn(hidden)
            hidden = hidden if scale is None else hidden * scale
            rows = nn.functional.linear(self.dropout(hidden), w_out, b_out)
            output = output.index_add(0, token, (rows * top_k_weights[token, rank, None]).to(output.dtype))
        return output.to(hidden_states.dtype)

    def _apply_gate(self, projected: Tensor) -> Tensor:
        """act(gate) * up, [n, 2I] -> [n, I]; the host's implementations call it too."""
        gate, up = projected.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def sorted_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`sorted_experts_forward` of the copy of this module that the experts come from; shapes as in `forward`."""
        return sorted_experts_forward(self, hidden_states, top_k_index, top_k_weights)


# The host's dispatch fixes gate and bias per class.


@use_experts_implementation
class GatedExperts(STMoEExperts):
    """Gated experts without biases (Llama, Qwen, Gemma, ...)."""


@use_experts_implementation(has_bias=True)
class GatedBiasedExperts(STMoEExperts):
    """Gated experts with biases (Llama with `mlp_bias`)."""


@use_experts_implementation(has_gate=False)
class UngatedExperts(STMoEExperts):
    """Ungated experts without biases (Nemotron, ...)."""


@use_experts_implementation(has_gate=False, has_bias=True)
class UngatedBiasedExperts(STMoEExperts):
    """Ungated experts with biases (GPT-2, OPT, Phi, ...)."""


_EXPERTS_CLASSES: dict[tuple[bool, bool], type[STMoEExperts]] = {
    (True, False): GatedExperts,
    (True, True): GatedBiasedExperts,
    (False, False): UngatedExperts,
    (False, True): UngatedBiasedExperts,
}


def tensor_experts(config: STMoEConfig, ffn: FFNLocation, num_experts: int) -> STMoEExperts:
    """Experts as 3-D tensors, for a dense FFN whose storage is `"tensors"`."""
    return _EXPERTS_CLASSES[ffn.gated, ffn.bias](config, ffn, num_experts)


class ModuleExperts(nn.ModuleList):
    """Experts as E modules, for FFNs that 3-D tensors cannot hold (inner norm, learnable activation, multipliers).

    Args:
        config: the mixture's fields.
        ffn: the dense FFN; every expert is a copy of its module.
        num_experts: E.
    """

    def __init__(self, config: STMoEConfig, ffn: FFNLocation, num_experts: int) -> None:
        unsupported = {
            "moe_intermediate_size": config.moe_intermediate_size is not None,
            "multiplicative_bias": config.multiplicative_bias,
            "expert_dropout": config.expert_dropout > 0,
        }
        faults = [f"{name}={getattr(config, name)}" for name, used in unsupported.items() if used]
        if faults:
            raise ValueError(
                f"{', '.join(faults)}: cannot be applied to {type(ffn.module).__name__} ({ffn.reason}), whose experts "
                "are held as whole modules; leave these fields at their defaults for this family"
            )
        super().__init__(copy.deepcopy(ffn.module) for _ in range(num_experts))
        self.num_experts = num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts; shapes as in `STMoEExperts.forward`."""
        output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for number, expert in enumerate(self):
            token, rank = torch.where((top_k_index == number) & (top_k_weights != 0))
            # An expert without tokens still runs, on no rows, so that every parameter gets a gradient on every rank.
            rows = expert(hidden_states[token])
            output = output.index_add(0, token, (rows * top_k_weights[token, rank, None]).to(output.dtype))
        return output.to(hidden_states.dtype)


def sorted_experts_forward(
    self: STMoEExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`experts_implementation="st_moe"`: tokens sorted by expert, one matrix product per expert, handwritten backward.

    Shapes as in `STMoEExperts.forward`. Falls back to the plain loop, with a warning, for activations without a row in
    `st_moe.modeling.kernels.activations.DERIVATIVES`.
    """
    if self.activation_name is None:
        logger.warning_once(
            f"No handwritten derivative for the activation {type(self.act_fn).__name__}: experts run in the plain loop."
        )
        # Not `self.forward`: the host's dispatch has replaced it, and hooks of accelerate may have once more.
        return STMoEExperts.forward(self, hidden_states, top_k_index, top_k_weights)
    parameters = self.parameters_of_all()
    on_cpu = hidden_states.device.type == "cpu"
    # A graph captured on the CPU may be run with any number of tokens, so it must not depend on there being few.
    may_differ = on_cpu and torch.compiler.is_compiling()
    inference = not (self.training or torch.is_grad_enabled() or may_differ) and parameters.scale is None
    if inference and top_k_index.numel() <= _FEW_ASSIGNMENTS:
        # Decoding: the host's implementations have less overhead, and batched_mm needs no sync on an accelerator.
        host = "grouped_mm" if on_cpu else "batched_mm"
        return ALL_EXPERTS_FUNCTIONS[host](self, hidden_states, top_k_index, top_k_weights)
    device = hidden_states.device.type
    # The kernel is opaque to autocast, which a dense FFN's linear layers would follow.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters.w_in.dtype
    parameters = parameters.map(lambda parameter: parameter.to(dtype))
    keep = None
    if self.training and self.dropout.p > 0:
        keep = self.dropout(hidden_states.new_ones(top_k_index.numel(), parameters.w_out.shape[-1], dtype=dtype))
    gated = self.in_name == "gate_up_proj"
    output = sorted_experts(
        hidden_states.to(dtype), top_k_index, top_k_weights, parameters, self.activation_name, gated, keep
    )
    return output.to(hidden_states.dtype)


def _registered_forward(
    self: STMoEExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    if not hasattr(self, "sorted_forward"):
        # The experts that a family has of its own in other layers: computed as the host does unless told otherwise.
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    # The host keeps one function per name, and a process may hold copies of this module, from bundles.
    return self.sorted_forward(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _registered_forward)
