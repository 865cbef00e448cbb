"""The sparse block: what stands in the place of a dense feed-forward network.

Shape letters: B sequences, S tokens per sequence, T = B * S, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.modeling.experts import ModuleExperts, STMoEExperts, tensor_experts
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.routing import router_class
from st_moe.modeling.routing.scope import active_scope


class DenseFFN(nn.Module):
    """A dense FFN of an expert's kind: H -> width -> H, with plain linear layers.

    Args:
        ffn: the dense FFN whose gate, bias and activation it shares.
        width: hidden width.
        norm: whether the input is normalised first (RMSNorm).
    """

    def __init__(self, ffn: FFNLocation, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(ffn.hidden_size) if norm else nn.Identity()
        self.gate_proj = nn.Linear(ffn.hidden_size, width, bias=ffn.bias) if ffn.gated else None
        self.up_proj = nn.Linear(ffn.hidden_size, width, bias=ffn.bias)
        self.down_proj = nn.Linear(width, ffn.hidden_size, bias=ffn.bias)
        self.act_fn = copy.deepcopy(ffn.activation)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero the output projection, so that a fresh FFN adds nothing and step 0 keeps the dense function."""
        init.zeros_(self.down_proj.weight)
        if self.down_proj.bias is not None:
            init.zeros_(self.down_proj.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H], without the residual."""
        hidden_states = self.norm(hidden_states)
        up = self.up_proj(hidden_states)
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(up))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up)


class SparseBlock(nn.Module):
    """A router and its experts, in the place of one dense FFN.

    y = dropout(moe(u) + shared(u)) with u = x + before(x); y gets before(x) and, last, after(x + y) added: ST-MoE's
    extra dense FFNs with their residuals, seen from inside the decoder layer (Zoph et al. 2022, appendix C).

    Args:
        config: the mixture's fields.
        ffn: the dense FFN that it replaces; its storage is `"tensors"` or `"modules"`.
        sparse_layer: position among the sparse layers, for numbers of experts that differ between them.
    """

    def __init__(self, config: STMoEConfig, ffn: FFNLocation, sparse_layer: int = 0) -> None:
        super().__init__()
        hidden_size = ffn.hidden_size or config.hidden_size
        self.sparse_layer = sparse_layer
        self.gate = router_class(config.router_type)(config, hidden_size, sparse_layer)
        self.experts: STMoEExperts | ModuleExperts
        extra = config.ffn_before or config.ffn_after or config.num_shared_experts
        if ffn.storage == "tensors":
            self.experts = tensor_experts(config, ffn, self.gate.num_experts)
        elif extra:
            raise ValueError(
                f"ffn_before, ffn_after, num_shared_experts: need an FFN that 3-D tensors can hold, but {ffn.reason}"
            )
        else:
            self.experts = ModuleExperts(config, ffn, self.gate.num_experts)
        self.initializer_range = config.initializer_range
        width = config.moe_intermediate_size or ffn.intermediate_size
        shared_width = width * config.num_shared_experts
        self.shared_experts = DenseFFN(ffn, shared_width, norm=False) if config.num_shared_experts else None
        gated = config.num_shared_experts and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if gated else None
        self.ffn_before = DenseFFN(ffn, width, norm=True) if config.ffn_before else None
        self.ffn_after = DenseFFN(ffn, width, norm=True) if config.ffn_after else None
        self.output_dropout = nn.Dropout(ffn.output_dropout)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Route the tokens and combine their experts' outputs.

        Args:
            hidden_states: [B, S, H], or [T, H] from layers that flatten their tokens first.
            residual: same shape; given by layers whose FFN adds the residual itself.

        Returns:
            Same shape: the FFN's output, plus `residual` if given.
        """
        extra = None if self.ffn_before is None else self.ffn_before(hidden_states)
        expert_input = hidden_states if extra is None else hidden_states + extra
        output = self.route(expert_input)
        if self.shared_experts is not None:
            shared = self.shared_experts(expert_input)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(expert_input).sigmoid() * shared
            output = output + shared
        output = self.output_dropout(output)
        if extra is not None:
            output = output + extra
        if self.ffn_after is not None:
            output = output + self.ffn_after(hidden_states + output)
        return output if residual is None else residual + output

    def route(self, hidden_states: Tensor) -> Tensor:
        """The routed experts alone, [..., H] -> [..., H]; the routing is recorded in the active scope."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scope = active_scope()
        mask = None if scope is None else scope.token_mask
        # Sizes as shapes give them: len() would fix them in an exported program.
        count = tokens.shape[0]
        if mask is None or mask.numel() != count:
            # Called outside of a model's forward: every token counts, each sequence is a group.
            groups = hidden_states.shape[0] if hidden_states.ndim == 3 else 1
            mask = torch.ones(groups, count // max(groups, 1), dtype=torch.bool, device=tokens.device)
        routing = self.gate(tokens, mask.to(tokens.device))
        if scope is not None:
            scope.record(routing, self.gate.losses(routing) if scope.with_losses else {}, self.sparse_layer)
        if self.training and (scope is None or scope.recording):
            self.gate.observe(tokens, routing)
        return self.gate.mix(self.experts, tokens, routing).view_as(hidden_states)
