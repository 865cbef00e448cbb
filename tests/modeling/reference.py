"""Slow, plain restatements of routing and experts, and a comparison whose tolerance is relative to the signal.

Shape letters: T tokens, H hidden size, I expert width, E experts, K choices, G groups, S tokens of one, P = 2 if gated.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from st_moe import STMoEConfig
from st_moe.modeling.experts import STMoEExperts, tensor_experts
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.kernels.sorted_experts import ExpertParameters
from st_moe.modeling.routing import TopKRouter


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected value; infinite if a value is not finite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.numel() == 0:
        return 0.0
    if not actual.isfinite().all():
        return float("inf")
    gap, signal = (actual - expected).abs().max().item(), expected.abs().max().item()
    return gap / signal if signal > 0 else (0.0 if gap == 0 else float("inf"))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "value") -> None:
    """`actual` equals `expected` up to a fraction of the largest expected value."""
    gap = difference(actual, expected)
    assert gap <= tolerance, f"{name}: relative difference {gap:.2e} exceeds {tolerance:.0e}"


def small_config(**fields: Any) -> STMoEConfig:
    """A config whose dense part hardly matters."""
    dense = {
        "vocab_size": 31,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return STMoEConfig(**{**dense, "num_experts": 4, **fields})


def make_router(hidden_size: int = 8, **fields: Any) -> TopKRouter:
    """A router with N(0, 1) rows, in training mode."""
    router = TopKRouter(small_config(**fields), hidden_size)
    nn.init.normal_(router.weight)
    return router


def one_group(tokens: int) -> Tensor:
    """Token mask of one sequence without padding."""
    return torch.ones(1, tokens, dtype=torch.bool)


def location(
    hidden: int = 8, width: int = 12, gated: bool = True, bias: bool = False, act: str | nn.Module = "silu", **more: Any
) -> FFNLocation:
    """A dense FFN's description without the FFN."""
    return FFNLocation(
        layer=0,
        path="layers.0.mlp",
        rule="module",
        module=None,
        gated=gated,
        bias=bias,
        hidden_size=hidden,
        intermediate_size=width,
        activation=ACT2FN[act] if isinstance(act, str) else act,
        storage="tensors",
        **more,
    )


def make_experts(ffn: FFNLocation | None = None, implementation: str = "st_moe", **fields: Any) -> STMoEExperts:
    """Experts with N(0, 0.5) parameters everywhere, in training mode."""
    config = small_config(**fields)
    experts = tensor_experts(config, ffn or location(), config.num_experts)
    experts.config._experts_implementation = implementation
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def reference_expert(
    x: Tensor, p: ExpertParameters, expert: int, act: nn.Module, gated: bool, keep: Tensor | None = None
) -> Tensor:
    """One expert on one token: [H] -> [H]."""
    pre = p.w_in[expert] @ x
    if p.b_in is not None:
        pre = pre + p.b_in[expert]
    if gated:
        half = len(pre) // 2
        hidden = act(pre[:half]) * pre[half:]
    else:
        hidden = act(pre)
    if p.scale is not None:
        hidden = hidden * p.scale[expert]
    if keep is not None:
        hidden = hidden * keep
    out = p.w_out[expert] @ hidden
    return out if p.b_out is None else out + p.b_out[expert]


def reference_experts(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    p: ExpertParameters,
    act: nn.Module,
    gated: bool,
    keep: Tensor | None = None,
) -> Tensor:
    """Weighted sum over each token's experts, token by token; [T, H]. Weight 0 and foreign experts are skipped."""
    choices = index.shape[1]
    rows = []
    for t in range(len(hidden)):
        row = torch.zeros_like(hidden[t])
        for k in range(choices):
            expert = int(index[t, k])
            if expert < len(p.w_in) and weight[t, k] != 0:
                kept = None if keep is None else keep[t * choices + k]
                row = row + weight[t, k] * reference_expert(hidden[t], p, expert, act, gated, kept)
        rows.append(row)
    return torch.stack(rows) if rows else hidden * 0


def reference_slots(index: Tensor, routed: Tensor, capacity: list[int]) -> tuple[Tensor, Tensor]:
    """ST-MoE's slots, as the references state them: rank by rank, left to right, after what lower ranks got.

    Returns:
        kept bool [G, S, K] and slot int64 [G, S, K], -1 where nothing was kept.
    """
    groups, length, choices = index.shape
    kept, slots = torch.zeros_like(routed), torch.full_like(index, -1)
    for g in range(groups):
        accepted: dict[int, int] = {}
        for k in range(choices):
            before, asked = dict(accepted), {}
            for s in range(length):
                if not routed[g, s, k]:
                    continue
                expert = int(index[g, s, k])
                slot = asked.get(expert, 0) + before.get(expert, 0)
                asked[expert] = asked.get(expert, 0) + 1
                if slot < capacity[g]:
                    kept[g, s, k], slots[g, s, k] = True, slot
                    accepted[expert] = accepted.get(expert, 0) + 1
    return kept, slots
