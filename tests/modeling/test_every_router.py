"""What holds for every router of the registry: causality, neighbours, padding, cache, sizes and dtypes."""

from typing import Any

import pytest
import torch

from st_moe import upcycle
from st_moe.configuration import ROUTER_TYPES
from tests.families import assert_same_gradients, checkpoint_activations, dense_model, gradients, mixture, token_ids
from tests.modeling.reference import assert_close, difference

NEAR = 1e-5
#: What a router cannot do without, beside the defaults.
NEEDS: dict[str, dict[str, Any]] = {
    "expert_choice": {"allow_non_causal_routing": True},
    "soft": {"allow_non_causal_routing": True},
    "mixture_of_depths": {"num_experts": 1, "num_experts_per_tok": 1},
    "sigmoid_top_k": {"n_group": 2},
}
CAUSAL = [name for name, row in ROUTER_TYPES.items() if row.causal]
every_router = pytest.mark.parametrize("name", list(ROUTER_TYPES))


def model_of(name: str, **fields: Any) -> Any:
    return mixture(**{"router_type": name, **NEEDS.get(name, {}), **fields})


@torch.no_grad()
def changes_before(model: Any, place: int, length: int = 16) -> float:
    """How much the logits before a place change, at most, when the tokens from there on are replaced."""
    ids = token_ids(2, length)
    before = model(input_ids=ids).logits[:, :place]
    worst = 0.0
    for seed in range(1, 6):
        other = torch.cat([ids[:, :place], token_ids(2, length - place, seed=seed)], dim=1)
        worst = max(worst, difference(model(input_ids=other).logits[:, :place], before))
    return worst


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("place", [1, 7, 15])
def test_later_tokens_change_nothing_before_them(name: str, place: int) -> None:
    assert changes_before(model_of(name), place) <= NEAR


@pytest.mark.parametrize("name", [name for name in ROUTER_TYPES if name not in CAUSAL])
def test_the_others_are_not_causal(name: str) -> None:
    """Negative control: the comparison above sees a router that looks ahead."""
    assert changes_before(model_of(name), 7) > 1e-3


def test_capacity_with_two_choices_is_not_causal_and_one_choice_is() -> None:
    fields = {"eval_capacity_factor": 1.0, "min_capacity": 1}
    assert changes_before(model_of("top_k", **fields), 12, length=24) > 1e-3
    assert changes_before(model_of("top_k", num_experts_per_tok=1, **fields), 12, length=24) <= NEAR
    first = {"num_experts_per_tok": 1, "drop_priority": "router_prob"}
    assert changes_before(model_of("top_k", **first, **fields), 12, length=24) > 1e-3


@every_router
@torch.no_grad()
def test_neighbours_and_padding_change_nothing(name: str) -> None:
    model, ids = model_of(name), token_ids(3, 9)
    together = model(input_ids=ids).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    assert_close(together, alone, NEAR)
    junk = token_ids(3, 4, seed=5)
    mask = torch.cat([torch.zeros_like(junk), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=torch.cat([junk, ids], dim=1), attention_mask=mask, position_ids=positions).logits
    assert_close(padded[:, 4:], together, NEAR)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_token_by_token_with_the_cache_is_the_full_pass(name: str) -> None:
    model, ids = model_of(name), token_ids(2, 10)
    full = model(input_ids=ids).logits
    cache, steps = None, []
    for place in range(10):
        output = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), full, NEAR)


@every_router
@torch.no_grad()
def test_evaluation_is_deterministic(name: str) -> None:
    model, ids = model_of(name), token_ids()
    state = torch.get_rng_state()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"


@every_router
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = model_of(name).train()
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(3)
        output = model(input_ids=token_ids(), labels=token_ids())
        output.loss.backward()
        present = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), output.expert_load, present))
    (loss, load, expected), (again, load_again, actual) = found
    assert_close(again, loss, 1e-6)
    assert torch.equal(load, load_again)
    assert_same_gradients(actual, expected)


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_models(name: str, dtype: torch.dtype) -> None:
    exact, low, ids = model_of(name), model_of(name).to(dtype), token_ids()
    output = low(input_ids=ids, labels=ids)
    assert output.logits.dtype == dtype
    assert output.logits.isfinite().all()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in output.aux_losses.values())
    # Choices between near equals fall the other way, so only most tokens agree.
    gap = (output.logits.float() - exact(input_ids=ids).logits).abs().amax(-1)
    scale = exact(input_ids=ids).logits.abs().max()
    assert (gap <= 0.1 * scale).float().mean() > 0.5


@every_router
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5)])
def test_few_tokens(name: str, shape: tuple[int, int]) -> None:
    model = model_of(name).train()
    ids = token_ids(*shape)
    output = model(input_ids=ids, labels=ids)
    assert output.logits.isfinite().all()
    assert output.aux_loss.isfinite()


@every_router
def test_padding_alone_gives_no_loss(name: str) -> None:
    model = model_of(name).train()
    ids = token_ids(2, 4)
    output = model(input_ids=ids, attention_mask=torch.zeros_like(ids), labels=torch.full_like(ids, -100))
    by_tokens = {key: v for key, v in output.aux_losses.items() if key not in ("diversity_loss", "simplicity_loss")}
    assert all(loss.item() == 0 for loss in by_tokens.values()), by_tokens


@every_router
def test_statistics_are_there(name: str) -> None:
    model = model_of(name).train()
    ids = token_ids()
    output = model(input_ids=ids, labels=ids)
    assert set(output.aux_losses) == {k for k, c in model.config.loss_coefficients.items() if c > 0}
    assert_close(output.expert_load.sum(-1), torch.ones(2), NEAR)
    for statistic in (output.router_entropy, output.dropped_fraction):
        assert ((statistic >= 0) & (statistic <= 1 + NEAR)).all()
    output.loss.backward()
    assert gradients(model.model.layers[0].self_attn), "what is before the router gets gradients too"


@every_router
def test_upcycling_keeps_the_function_where_it_says_so(name: str) -> None:
    dense = dense_model("llama")
    fields = {"num_experts": 4, **NEEDS.get(name, {})}
    sparse = upcycle(dense, router_type=name, **fields)
    gap = sparse.identity_proof.max_relative_difference
    assert sparse.config.combine_weights_sum_to_one == ROUTER_TYPES[name].keeps_function
    assert (gap <= NEAR) == ROUTER_TYPES[name].keeps_function, gap


@every_router
def test_generation_is_greedy_and_cached(name: str) -> None:
    model, ids = model_of(name), token_ids(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first, second = (model.generate(ids, **options) for _ in range(2))
    assert torch.equal(first, second)
    if name in CAUSAL:
        assert torch.equal(first, model.generate(ids, use_cache=False, **options))
