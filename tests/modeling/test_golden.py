"""Numbers of the reference implementations: st-moe-pytorch 0.1.8 and Transformers 5.23.

The files state their conventions. Absolute tolerances are the files' own: 2e-5, and 1e-4 for gradients.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from st_moe.modeling.experts import STMoEExperts
from st_moe.modeling.kernels.sorted_experts import ExpertParameters
from st_moe.modeling.routing import Routing, TopKRouter, expert_capacity, keep_within_capacity, losses, router_class
from st_moe.modeling.routing.coordinate_descent import coordinate_descent
from st_moe.modeling.sparse_block import DenseFFN
from tests.modeling.reference import location, make_experts, reference_slots, small_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "st_moe_pytorch.json").read_text(encoding="utf-8"))["cases"]
OTHER = {
    case["name"]: case
    for case in json.loads((GOLDEN / "transformers_and_dynmoe.json").read_text(encoding="utf-8"))["cases"]
}
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4

# Cases that are not run here, and why.
LEFT_OUT = {"dynmoe_top_any_gate": "tested in test_router_top_any.py"}


def cases(kind: str) -> Any:
    chosen = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", chosen, ids=[case["name"] for case in chosen])


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor, expected: Any, tolerance: float = TOLERANCE) -> bool:
    expected = tensor(expected)
    assert actual.shape == expected.shape
    return bool((actual.detach() - expected).abs().max() <= tolerance)


def golden_router(case: dict[str, Any], weight: Any, monkeypatch: pytest.MonkeyPatch) -> TopKRouter:
    """Our router with a case's weight; its uniform draws come from the file."""
    config, inputs = case["config"], case["inputs"]
    router_type = "coordinate_descent" if config.get("differentiable_topk") else "top_k"
    fields = small_config(
        router_type=router_type,
        num_experts=config["num_experts"],
        num_experts_per_tok=config["top_n"],
        router_gumbel_noise=config.get("noise_mult") or 0.0,
        second_expert_policy_train="random",
        second_expert_policy_eval="random",
        second_expert_threshold=config["thresholds"],
        capacity_factor=config["capacity_factor"],
        eval_capacity_factor=config["capacity_factor"],
        min_capacity=config["min_capacity"],
    )
    router = router_class(router_type)(fields, config["dim"]).train(config["mode"] == "train")
    assert isinstance(router, TopKRouter)
    router.weight.data = tensor(weight)
    draws = [tensor(inputs["policy_uniform_draws"])[1:].flatten(1).t()]
    if config.get("gumbel_noise"):
        draws.append(tensor(inputs["gumbel_uniform_draws"]).flatten(0, 1))
    # The draws of the policy and of the noise differ in shape: later choices, of which there are fewer than experts.
    by_shape = {each.shape: each for each in draws}
    monkeypatch.setattr(torch, "rand_like", lambda like: by_shape[like.shape])
    return router


def route(router: TopKRouter, x: Tensor) -> Routing:
    return router(x.flatten(0, 1), torch.ones(x.shape[:2], dtype=torch.bool))


def auxiliary_loss(case: dict[str, Any], routing: Routing, first_choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance loss, z-loss, and both times their coefficients."""
    balance = losses.balance_loss(routing.probabilities, first_choice[:, None], routing.token_mask)
    z = losses.router_z_loss(routing.logits, routing.token_mask)
    return balance, z, case["config"]["balance_loss_coef"] * balance + case["config"]["router_z_loss_coef"] * z


def expert_parameters(values: dict[str, Any], prefix: str, first: int = 0) -> tuple[Tensor, ...]:
    """One GEGLU expert of the reference in our layout: its linear's halves are (value, gate), ours (gate, up)."""
    weight, bias = (tensor(values[f"{prefix}net.{first}.{name}"]) for name in ("weight", "bias"))
    half = len(bias) // 2
    return (
        torch.cat([weight[half:], weight[:half]]),
        tensor(values[f"{prefix}net.{first + 2}.weight"]),
        torch.cat([bias[half:], bias[:half]]),
        tensor(values[f"{prefix}net.{first + 2}.bias"]),
        tensor(values[f"{prefix}net.{first + 1}.mult_bias"]),
    )


def golden_experts(values: dict[str, Any], prefixes: list[str], hidden: int) -> STMoEExperts:
    """Our experts with the parameters of the reference's."""
    stacked = ExpertParameters(*map(torch.stack, zip(*(expert_parameters(values, p) for p in prefixes), strict=True)))
    ffn = location(hidden, stacked.w_out.shape[2], gated=True, bias=True, act="gelu")
    experts = make_experts(ffn, num_experts=len(prefixes), num_experts_per_tok=1, multiplicative_bias=True)
    for own, value in zip(experts.parameters_of_all(), stacked, strict=True):
        own.data = value
    return experts


def mixture(case: dict[str, Any], routing: Routing, experts: STMoEExperts, x: Tensor) -> Tensor:
    """The reference's layer: with straight-through dispatch an expert reads x * (1 + c - stopgrad(c))."""
    tokens, choices = routing.index.shape
    rows = x.flatten(0, 1).repeat_interleave(choices, dim=0)
    weight = routing.weight.reshape(-1, 1)
    if case["config"]["straight_through_dispatch"]:
        rows = rows * (1 + weight - weight.detach())
    output = experts(rows, routing.index.reshape(-1, 1), weight)
    return output.view(tokens, choices, -1).sum(1).view_as(x)


def extra_ffn(values: dict[str, Any], prefix: str, hidden: int) -> nn.Module:
    """The reference's ff_before or ff_after as our DenseFFN, with the multiplicative bias folded into its output."""
    w_in, w_out, b_in, b_out, scale = expert_parameters(values, prefix, first=1)
    ffn = DenseFFN(location(hidden, len(scale), gated=True, bias=True, act="gelu"), len(scale), norm=True)
    assert isinstance(ffn.norm, nn.RMSNorm)
    assert ffn.gate_proj is not None
    ffn.norm.eps = 1e-24  # theirs is x / max(||x||, 1e-12) * sqrt(d)
    ffn.norm.weight.data = tensor(values[f"{prefix}net.0.gamma"])
    ffn.gate_proj.weight.data, ffn.up_proj.weight.data = w_in.chunk(2)
    ffn.gate_proj.bias.data, ffn.up_proj.bias.data = b_in.chunk(2)
    ffn.down_proj.weight.data, ffn.down_proj.bias.data = w_out * scale, b_out
    return ffn


def check_gradients(case: dict[str, Any], x: Tensor, router: TopKRouter, experts: STMoEExperts) -> None:
    expected = case["expected"]
    assert x.grad is not None
    assert router.weight.grad is not None
    assert close(x.grad, expected["grad_x"], GRADIENT_TOLERANCE)
    assert close(router.weight.grad, expected["grad_gate_weight"], GRADIENT_TOLERANCE)
    gate, up = experts.gate_up_proj.grad[0].chunk(2)
    assert close(torch.cat([up, gate]), expected["grad_expert0_first_linear"], GRADIENT_TOLERANCE)
    for gradient in (x.grad, router.weight.grad, experts.gate_up_proj.grad[0]):
        assert gradient.abs().max() > 10 * GRADIENT_TOLERANCE, "too small for the tolerance to mean anything"


def test_every_case_is_run_or_left_out_for_a_reason() -> None:
    kinds = ("gating", "moe", "sparse_moe_block", "expert", "coordinate_descent")
    run = {case["name"] for case in CASES if case["kind"] in kinds}
    run.add("transformers_mixtral_lb_two_layers")
    assert run | set(LEFT_OUT) == {case["name"] for case in CASES} | set(OTHER)


@cases("gating")
def test_gating(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected = case["config"], case["expected"]
    x = tensor(case["inputs"]["x"])
    router = golden_router(case, case["inputs"]["gate_weight"], monkeypatch)
    routing = route(router, x)
    groups, length, _ = x.shape
    shape = (groups, length, config["top_n"])
    index, weight = routing.index.view(shape), routing.weight.view(shape)
    assert close(routing.logits.view(groups, length, -1), expected["gate_logits"])
    assert close(routing.probabilities.view(groups, length, -1), expected["router_probs"])
    if config.get("gumbel_noise"):
        assert not close(routing.logits.softmax(-1).view(groups, length, -1), expected["router_probs"])
    assert index.tolist() == expected["topn_experts"]
    gates, _ = router.choose(routing.probabilities)
    assert close(gates.view(shape), expected["topn_gates_normalised"])
    routed = torch.tensor(expected["routed_by_policy"], dtype=torch.bool).permute(1, 2, 0)
    assert torch.equal(router.second_expert_policy(gates).view(shape), routed)
    accepted = torch.tensor(expected["accepted_after_capacity"], dtype=torch.bool).permute(1, 2, 0)
    assert torch.equal(weight > 0, accepted)
    assert routing.dropped is not None
    assert torch.equal(routing.dropped.view(shape), routed & ~accepted)
    assert int(routing.dropped.sum()) == expected["num_dropped"]
    assert close(weight.sum(-1), expected["combine_sum_per_token"])
    used = [[*place, int(index[tuple(place)])] for place in accepted.nonzero().tolist()]
    assert used == [row[:4] for row in expected["assignments"]]
    assert close(weight[accepted], [row[5] for row in expected["assignments"]])


@cases("gating")
def test_capacity_and_slots(case: dict[str, Any]) -> None:
    config, expected = case["config"], case["expected"]
    index = torch.tensor(expected["topn_experts"])
    routed = torch.tensor(expected["routed_by_policy"], dtype=torch.bool).permute(1, 2, 0)
    groups, length, _ = index.shape
    capacity = expert_capacity(
        torch.full((groups,), length), config["capacity_factor"], config["num_experts"], config["min_capacity"]
    )
    assert capacity.tolist() == [expected["capacity"]] * groups
    kept = keep_within_capacity(index, routed, capacity, config["num_experts"])
    assert kept.permute(2, 0, 1).int().tolist() == expected["accepted_after_capacity"]
    _, slots = reference_slots(index, routed, capacity.tolist())
    assert slots.permute(2, 0, 1).tolist() == expected["slot"]
    # The slot of a kept assignment is its place among the kept ones of its expert, in the order of the ranks.
    for g in range(groups):
        places = sorted((s, k) for s, k in kept[g].nonzero().tolist())
        places.sort(key=lambda place: place[1])
        for expert in range(config["num_experts"]):
            own = [slots[g, s, k].item() for s, k in places if index[g, s, k] == expert]
            assert own == list(range(len(own)))


@cases("gating")
def test_losses(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case["expected"]
    routing = route(golden_router(case, case["inputs"]["gate_weight"], monkeypatch), tensor(case["inputs"]["x"]))
    first = routing.index[:, 0]
    balance = losses.balance_loss(routing.probabilities, first[:, None], routing.token_mask)
    # Ours counts first choices before capacity, as the paper does; the library counts what is left of them.
    assert close(balance, expected["balance_loss_if_counted_before_capacity"])
    if expected["balance_loss"] != expected["balance_loss_if_counted_before_capacity"]:
        assert not close(balance, expected["balance_loss"])
    if case["config"]["mode"] == "train":
        assert close(losses.router_z_loss(routing.logits, routing.token_mask), expected["router_z_loss"])


@cases("moe")
def test_layer_forward_and_backward(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected, values = case["config"], case["expected"], case["inputs"]["parameters"]
    router = golden_router(case, values["gate.to_gates.weight"], monkeypatch)
    experts = golden_experts(values, [f"experts.experts.{e}." for e in range(config["num_experts"])], config["dim"])
    x = tensor(case["inputs"]["x"]).requires_grad_()
    routing = route(router, x)
    output = mixture(case, routing, experts, x)
    plain = experts(x.flatten(0, 1), routing.index, routing.weight).view_as(x)
    assert close(output, expected["output"])
    assert close(plain, expected["output"])
    # The library's loss counts the first choices that capacity left; a refused one is moved to no expert at all.
    accepted = routing.weight[:, 0] > 0
    balance, z, total = auxiliary_loss(case, routing, routing.index[:, 0])
    if bool(accepted.all()):
        assert close(balance, expected["balance_loss"])
        assert close(total, expected["total_aux_loss"])
    else:
        balance = balance_after_capacity(routing, accepted)
        total = config["balance_loss_coef"] * balance + config["router_z_loss_coef"] * z
        assert close(balance, expected["balance_loss"])
    assert close(z, expected["router_z_loss"])
    ((output * tensor(case["inputs"]["output_cotangent"])).sum() + total).backward()
    check_gradients(case, x, router, experts)


def balance_after_capacity(routing: Routing, accepted: Tensor) -> Tensor:
    """The library's balance loss, which counts accepted first choices only; per group, then the mean."""
    groups, length = routing.token_mask.shape
    experts = routing.logits.shape[1]
    chosen = nn.functional.one_hot(routing.index[:, 0], experts) * accepted[:, None]
    fraction = chosen.view(groups, length, experts).float().mean(1)
    probability = routing.logits.softmax(-1).view(groups, length, experts).mean(1)
    return experts * (fraction * probability).sum(-1).mean()


def test_gradients_tell_straight_through_from_hard_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the straight-through term the golden router gradient is missed."""
    case = next(c for c in CASES if c["name"] == "moe_forward_backward_straight_through")
    values = case["inputs"]["parameters"]
    router = golden_router(case, values["gate.to_gates.weight"], monkeypatch)
    experts = golden_experts(values, [f"experts.experts.{e}." for e in range(case["config"]["num_experts"])], 4)
    x = tensor(case["inputs"]["x"]).requires_grad_()
    routing = route(router, x)
    output = experts(x.flatten(0, 1), routing.index, routing.weight).view_as(x)
    _, _, total = auxiliary_loss(case, routing, routing.index[:, 0])
    ((output * tensor(case["inputs"]["output_cotangent"])).sum() + total).backward()
    assert not close(router.weight.grad, case["expected"]["grad_gate_weight"], GRADIENT_TOLERANCE)
    with pytest.raises(AssertionError):
        check_gradients(case, x, router, experts)


@cases("sparse_moe_block")
def test_block(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected, values = case["config"], case["expected"], case["inputs"]["parameters"]
    hidden = config["dim"]
    router = golden_router(case, values["moe.gate.to_gates.weight"], monkeypatch)
    experts = golden_experts(values, [f"moe.experts.experts.{e}." for e in range(config["num_experts"])], hidden)
    norm = nn.RMSNorm(hidden, eps=1e-24)
    norm.weight.data = tensor(values["moe_prenorm.gamma"])
    x = tensor(case["inputs"]["x"]).requires_grad_()
    state: Tensor = x
    if config["add_ff_before"]:
        state = state + extra_ffn(values, "ff_before.", hidden)(state)
    normed = norm(state)
    routing = route(router, normed)
    state = state + mixture(case, routing, experts, normed)
    if config["add_ff_after"]:
        state = state + extra_ffn(values, "ff_after.", hidden)(state)
    assert close(state, expected["output"])
    balance, z, total = auxiliary_loss(case, routing, routing.index[:, 0])
    assert close(balance, expected["balance_loss"])
    assert close(z, expected["router_z_loss"])
    assert close(total, expected["total_aux_loss"])
    ((state * tensor(case["inputs"]["output_cotangent"])).sum() + total).backward()
    check_gradients(case, x, router, experts)


@cases("expert")
def test_expert(case: dict[str, Any]) -> None:
    x = tensor(case["inputs"]["x"])
    experts = golden_experts(case["inputs"]["parameters"], [""], case["config"]["dim"])
    index, weight = torch.zeros(len(x), 1, dtype=torch.long), torch.ones(len(x), 1)
    for implementation in ("st_moe", "eager"):
        experts.config._experts_implementation = implementation
        assert close(experts(x, index, weight), case["expected"]["output"])
    experts.gate_up_proj.data = experts.gate_up_proj.roll(experts.intermediate_size, dims=1)
    assert not close(experts(x, index, weight), case["expected"]["output"]), "gate and value must not be exchangeable"


@cases("coordinate_descent")
def test_coordinate_descent(case: dict[str, Any]) -> None:
    config, expected = case["config"], case["expected"]
    scores = tensor(case["inputs"]["scores"]).requires_grad_()
    mask = torch.tensor(config["mask"]).bool() if config.get("mask") else None
    options = {
        "epsilon": config["eps"],
        "epsilon_init": config.get("eps_init"),
        "epsilon_decay": config.get("eps_decay", 1.0),
    }
    selection = coordinate_descent(scores, config["k"], config["n_iters"], mask=mask, **options)
    assert close(selection, expected["selection"])
    assert close(selection.sum(-1), expected["row_sums"])
    (selection * torch.arange(1, 1 + scores.shape[1])).sum().backward()
    assert scores.grad is not None
    assert close(scores.grad, expected["grad_scores"], GRADIENT_TOLERANCE)
    another = coordinate_descent(scores, config["k"] + 0.25, config["n_iters"], mask=mask, **options)
    assert not close(another, expected["selection"])


def test_transformers_balance_loss() -> None:
    """Theirs counts all K choices, so it is the sum of ours over the ranks; `joint` pools the layers' tokens."""
    case = OTHER["transformers_mixtral_lb_two_layers"]
    inputs, expected = case["inputs"], case["expected"]
    layers = [tensor(inputs["logits_layer0"]), tensor(inputs["logits_layer1"])]
    mask = torch.tensor(inputs["attention_mask"], dtype=torch.bool).view(1, -1)

    def over_all_ranks(logits: Tensor, token_mask: Tensor) -> Tensor:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        ranks = [
            losses.balance_loss(logits.softmax(-1), order[:, k : k + 1], token_mask) for k in range(inputs["top_k"])
        ]
        return torch.stack(ranks).sum()

    everything = torch.ones_like(mask)
    assert close(torch.stack([over_all_ranks(logits, everything) for logits in layers]), expected["per_layer"])
    pooled = torch.cat(layers)
    assert close(over_all_ranks(pooled, everything.repeat(1, 2)), expected["joint"])
    assert close(over_all_ranks(pooled, mask.repeat(1, 2)), expected["joint_masked"])
    # Ours counts the first choice alone: written out from the inputs, per layer.
    for logits in layers:
        probabilities = logits.softmax(-1)
        fraction = nn.functional.one_hot(logits.argmax(-1), 4).float().mean(0)
        ours = losses.balance_loss(logits.softmax(-1), logits.argmax(-1, keepdim=True), everything)
        assert close(ours, (4 * (fraction * probabilities.mean(0)).sum()).item())


def test_norm_is_the_references_norm() -> None:
    """x / max(||x||, 1e-12) * sqrt(d) * gamma, which leaves a zero row zero."""
    norm = nn.RMSNorm(4, eps=1e-24)
    norm.weight.data = tensor([0.9, 1.1, 1.0, -0.5])
    x = tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0], [1e-4, 2e-4, 0.0, 0.0]])
    expected = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) * 2 * norm.weight
    assert close(norm(x), expected.tolist())
