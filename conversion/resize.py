"""A mixture with more experts, fewer experts, or another number of choices; how far that moves it is measured.

Shape letters: E experts before, F after, K choices per token before, L after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from st_moe.conversion.proof import prove_identity
from st_moe.conversion.router_init import Text
from st_moe.modeling.modeling_st_moe import STMoEModel, STMoEPreTrainedModel
from st_moe.modeling.pruning import sparse_blocks, with_experts


def grow_experts(
    model: STMoEPreTrainedModel,
    num_experts: int,
    *,
    num_experts_per_tok: int | None = None,
    loads: Sequence[Tensor] | None = None,
    noise: float = 0.0,
    seed: int = 0,
    proof_inputs: Text | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """A new mixture with F experts per sparse layer, made by repeating experts with their router rows.

    Copies stand next to each other, so that groups of experts and the shards of granular experts stay together.
    Without noise, copies have equal logits and are chosen together:

    - F = m E and L = m K keeps the function of softmax top-K routers, normalised or not, and of sigmoid ones with
      `norm_topk_prob`: each of the K choices comes m times, with the m-th part of its weight.
    - L = K, the cheap way (expert upcycling), leaves each token its K / m best experts, so the function moves; not with
      K = 1 and `norm_topk_prob`.

    Equal copies with equal rows get equal gradients and stay equal; some noise sets them apart, and moves the function.

    Args:
        model: a mixture; it is left as it is.
        num_experts: F, at least E; what is left over after repeating all goes to the most loaded experts.
        num_experts_per_tok: L; None keeps K.
        loads: per sparse layer, tokens per expert [E]; None takes the first experts to be the most loaded.
        noise: standard deviation of what is added to the router rows of copies, in standard deviations of the row's
            layer.
        seed: of the noise.
        proof_inputs, tokenizer: what both models run on, as for `prove_identity`.

    Returns:
        The mixture in evaluation mode, with the comparison as `identity_proof`.

    Raises:
        ValueError: when an argument is at fault.
    """
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: must be finite and not negative, got {noise!r}")
    slots, choices = [], []
    for number, (experts, k) in enumerate(_sizes(model)):
        if num_experts < experts:
            raise ValueError(
                f"num_experts: must be at least the {experts} of layer {number} to grow, got {num_experts}"
            )
        repeats = torch.full((experts,), num_experts // experts)
        repeats[_most_loaded(loads, number, experts)[: num_experts % experts]] += 1
        slots.append(torch.arange(experts).repeat_interleave(repeats))
        choices.append(k if num_experts_per_tok is None else num_experts_per_tok)
    grown = with_experts(model, slots, choices)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        for block, chosen in zip(sparse_blocks(grown), slots, strict=True):
            _set_apart(block.gate, chosen, noise, generator)
    return _proven(model, grown, proof_inputs, tokenizer)


def remove_experts(
    model: STMoEPreTrainedModel,
    num_experts: int | None = None,
    *,
    loads: Sequence[Tensor] | None = None,
    removed: Sequence[Sequence[int]] | None = None,
    proof_inputs: Text | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """A new mixture without some experts: those of the least load, or those that are named.

    Step 0 keeps the function for tokens that none of the removed experts had a weight for, if their weights are
    renormalised. K becomes no larger than the number of experts.

    Args:
        model: a mixture; it is left as it is.
        num_experts: F, experts that each sparse layer keeps; with `loads`.
        loads: per sparse layer, tokens per expert [E], as a run's report counts them.
        removed: per sparse layer, the indices of the experts to remove; instead of `num_experts` and `loads`.
        proof_inputs, tokenizer: what both models run on, as for `prove_identity`.

    Returns:
        The mixture in evaluation mode, with the comparison as `identity_proof`.

    Raises:
        ValueError: when an argument is at fault.
    """
    if (removed is None) == (num_experts is None or loads is None) or (removed is not None and loads is not None):
        raise ValueError("removed: must be given, or num_experts and loads; got neither or both")
    sizes = _sizes(model)
    if removed is not None and len(removed) != len(sizes):
        raise ValueError(f"removed: must have one list for each of the {len(sizes)} sparse layers, got {len(removed)}")
    slots = []
    for number, (experts, _) in enumerate(sizes):
        if removed is None:
            kept = _most_loaded(loads, number, experts)[:num_experts].sort().values
        else:
            gone = set(removed[number])
            if not gone <= set(range(experts)) or len(gone) == experts:
                raise ValueError(f"removed: must leave some of the {experts} experts of layer {number}, got {gone}")
            kept = torch.tensor([expert for expert in range(experts) if expert not in gone])
        if not 1 <= len(kept) <= experts or (num_experts is not None and len(kept) != num_experts):
            raise ValueError(f"num_experts: must be between 1 and the {experts} of layer {number}, got {num_experts}")
        slots.append(kept)
    choices = [min(k, len(kept)) for (_, k), kept in zip(sizes, slots, strict=True)]
    return _proven(model, with_experts(model, slots, choices), proof_inputs, tokenizer)


def set_num_experts_per_tok(
    model: STMoEPreTrainedModel,
    num_experts_per_tok: int,
    *,
    proof_inputs: Text | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """A new mixture with another number of choices per token. Step 0 keeps the function if the experts are copies.

    Args:
        model: a mixture; it is left as it is.
        num_experts_per_tok: L.
        proof_inputs, tokenizer: what both models run on, as for `prove_identity`.

    Returns:
        The mixture in evaluation mode, with the comparison as `identity_proof`.

    Raises:
        ValueError: when the number breaks a rule of the config.
    """
    slots = [torch.arange(experts) for experts, _ in _sizes(model)]
    other = with_experts(model, slots, [num_experts_per_tok] * len(slots))
    return _proven(model, other, proof_inputs, tokenizer)


def _sizes(model: STMoEPreTrainedModel) -> list[tuple[int, int]]:
    """E and K of each sparse layer.

    Raises:
        ValueError: when the model is no mixture, or its routers do not have one row per expert.
    """
    if not isinstance(model, STMoEPreTrainedModel):
        raise ValueError(f"model: must be a mixture, got {type(model).__name__}; st_moe.upcycle makes one")
    for block in sparse_blocks(model):
        odd = [name for name, t in block.gate.named_parameters(recurse=False) if len(t) != block.gate.num_experts]
        if odd:
            raise ValueError(
                f"router_type: must have routers with one row per expert to change their number, and "
                f"{model.config.router_type!r} has other {', '.join(odd)}"
            )
    return model.config.layer_sizes


def _most_loaded(loads: Sequence[Tensor] | None, number: int, experts: int) -> Tensor:
    """Experts of a layer by falling load, equal ones by index."""
    if loads is None:
        return torch.arange(experts)
    load = torch.as_tensor(loads[number]).cpu() if number < len(loads) else torch.empty(0)
    if load.shape != (experts,):
        raise ValueError(f"loads: must be {experts} numbers for layer {number}, one per expert, got {load.tolist()}")
    return load.argsort(descending=True, stable=True)


@torch.no_grad()
def _set_apart(router: Any, slots: Tensor, noise: float, generator: torch.Generator) -> None:
    """Add noise to the rows of every copy but the first of its expert."""
    weight = getattr(router, "weight", None)
    if weight is None:
        return
    copied = torch.cat([torch.tensor([False]), slots[1:] == slots[:-1]])
    draw = torch.randn(weight.shape, generator=generator) * noise * weight.float().std().cpu()
    weight += (draw * copied[:, None]).to(weight)


def _proven(
    model: STMoEPreTrainedModel, other: Any, inputs: Text | None, tokenizer: PreTrainedTokenizerBase | None
) -> Any:
    """Measure how far a mixture is from the one that it was made of, and print it; base models have no logits."""
    other.eval()
    other.identity_proof = None
    if not isinstance(model, STMoEModel) and model.device.type != "meta":
        other.identity_proof = prove_identity(model, other, inputs, tokenizer)
        print(other.identity_proof)  # noqa: T201 -- the comparison is part of what the caller asked for
    return other
