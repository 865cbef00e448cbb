"""Routers that learn nothing: hashes of tokens and positions, and forced balance.

Shape letters: T tokens, H hidden size, E experts, K choices per token, G groups (sequences), S tokens of one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_moe import STMoEForCausalLM
from st_moe.modeling.routing import Routing, router_class
from st_moe.modeling.routing.fixed import FixedRouter
from st_moe.modeling.routing.losses import expert_load, router_entropy
from st_moe.modeling.routing.scope import RoutingScope, activate
from tests.families import assert_same_gradients, checkpoint_activations, gradients, mixture, token_ids
from tests.modeling.reference import assert_close, one_group, small_config

HIDDEN = 8
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
KINDS: dict[str, dict[str, Any]] = {
    "token": {"router_type": "hash"},
    "position": {"router_type": "hash", "hash_by": "position"},
    "uniform": {"router_type": "uniform"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def router_of(kind: str, experts: int = 4, choices: int = 1, layer: int = 0, **fields: Any) -> FixedRouter:
    size = {"num_hidden_layers": 50, "num_experts": experts, "num_experts_per_tok": choices}
    config = small_config(**size, **KINDS[kind], **fields)
    router = router_class(config.router_type)(config, HIDDEN, layer)
    assert isinstance(router, FixedRouter)
    return router


def route(router: FixedRouter, numbers: Tensor) -> Routing:
    """Route tokens whose ids and positions are the same numbers, int64 [G, S]."""
    mask = torch.ones_like(numbers, dtype=torch.bool)
    with activate(RoutingScope(mask, token_ids=numbers, positions=numbers)):
        return router(torch.randn(numbers.numel(), HIDDEN), mask)


def plain_hash(number: int, experts: int, layer: int) -> int:
    """The hash with Python's own integers."""
    mixed = (number // experts + layer * 0x9E3779B1) % 2**32
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 16)) * 0x45D9F3B % 2**32
    return (number + (mixed ^ (mixed >> 16))) % experts


def plain_first(kind: str, number: int, experts: int, choices: int, layer: int) -> int:
    return number * choices % experts if kind == "uniform" else plain_hash(number, experts, layer)


@properties
@given(
    st.sampled_from(list(KINDS)),
    st.integers(1, 9),
    st.data(),
    st.integers(0, 49),
    st.lists(st.integers(0, 2**31 - 1), max_size=9),
)
def test_choices_and_weights(kind: str, experts: int, data: st.DataObject, layer: int, numbers: list[int]) -> None:
    choices = data.draw(st.integers(1, experts))
    routing = route(router_of(kind, experts, choices, layer), torch.tensor([numbers], dtype=torch.int64))
    firsts = [plain_first(kind, number, experts, choices, layer) for number in numbers]
    assert routing.index.tolist() == [[(first + k) % experts for k in range(choices)] for first in firsts]
    assert routing.index.dtype == torch.int64
    assert torch.equal(routing.weight, torch.full((len(numbers), choices), 1 / choices))
    assert torch.equal(routing.logits, torch.zeros(len(numbers), experts))
    for row, first in zip(routing.probabilities.tolist(), firsts, strict=True):
        chosen = {(first + k) % experts for k in range(choices)}
        assert row == pytest.approx([1 / choices if e in chosen else 0.0 for e in range(experts)])
    assert routing.dropped is None


def test_the_hash_never_changes() -> None:
    """Saved models depend on it."""
    index = [route(router_of("token", 8, 1, layer), torch.arange(16)[None]).index[:, 0].tolist() for layer in (0, 1)]
    assert index == [
        [0, 1, 2, 3, 4, 5, 6, 7, 7, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 0, 1, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize("experts", [2, 3, 8, 13])
@pytest.mark.parametrize("start", [0, 7, 50000])
def test_consecutive_numbers_are_balanced(experts: int, start: int) -> None:
    for count in (experts, 10 * experts + 1, 1000):
        index = route(router_of("token", experts), torch.arange(start, start + count)[None]).index
        load = index.flatten().bincount(minlength=experts)
        assert load.max() - load.min() <= 2


def test_the_hash_mixes() -> None:
    """Strides, which a plain remainder sends to one expert, spread; layers differ as chance has it."""
    experts, count = 8, 4096
    for stride in (8, 64, 1000, 1024):
        load = route(router_of("token", experts), torch.arange(count)[None] * stride).index.flatten()
        assert (load.bincount(minlength=experts) / count - 1 / experts).abs().max() < 0.03
    index = torch.stack([route(router_of("token", experts, 1, la), torch.arange(count)[None]).index for la in range(5)])
    for i in range(5):
        for j in range(i):
            assert abs((index[i] == index[j]).float().mean() - 1 / experts) < 0.05


def test_uniform_is_balanced_in_every_sequence() -> None:
    routing = route(router_of("uniform", 4, 2), torch.arange(6).expand(3, 6))
    assert torch.equal(expert_load(routing), torch.full((4,), 0.25))
    assert routing.index[:4].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    # The entropy of two choices among four.
    assert router_entropy(routing).item() == pytest.approx(0.5)
    assert router_entropy(route(router_of("uniform", 4, 1), torch.arange(6)[None])).item() == 0


@kinds
def test_nothing_is_learnt(kind: str) -> None:
    router = router_of(kind)
    assert list(router.parameters()) == list(router.buffers()) == []
    assert router.state_dict() == {}
    router.reset_parameters()
    assert router.loss_names == []
    assert router.losses(route(router, torch.arange(4)[None])) == {}


@kinds
def test_nothing_is_drawn(kind: str) -> None:
    router, numbers = router_of(kind, 4, 2), torch.arange(12).view(2, 6)
    before, first = torch.get_rng_state(), None
    for training in (True, False):
        routing = router.train(training)
        with activate(RoutingScope(token_ids=numbers, positions=numbers)):
            index = routing(torch.zeros(12, HIDDEN), torch.ones(2, 6, dtype=torch.bool)).index
        first = index if first is None else first
        assert torch.equal(index, first)
    assert torch.equal(before, torch.get_rng_state())


@kinds
def test_capacity(kind: str) -> None:
    router = router_of(kind, 4, 1, capacity_factor=1.0, min_capacity=1)
    routing = route(router, torch.zeros(1, 8, dtype=torch.int64))
    assert routing.dropped is not None
    assert routing.dropped[:, 0].tolist() == [False, False, *[True] * 6]
    assert (routing.weight[2:] == 0).all()


# Where ids and positions come from.


def test_hash_of_tokens_needs_their_ids() -> None:
    router, mask = router_of("token"), one_group(3)
    with pytest.raises(ValueError, match=r"hash_by: 'token' needs the token ids.*outside"):
        router(torch.zeros(3, HIDDEN), mask)
    for ids in (None, torch.zeros(1, 4, dtype=torch.int64)):
        with activate(RoutingScope(mask, ids)), pytest.raises(ValueError, match=r"hash_by: .*input_ids"):
            router(torch.zeros(3, HIDDEN), mask)
    model = mixture(router_type="hash")
    with pytest.raises(ValueError, match="hash_by"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("kind", ["position", "uniform"])
def test_positions_outside_and_inside_of_a_forward_pass(kind: str) -> None:
    router = router_of(kind)
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])
    outside = router(torch.zeros(10, HIDDEN), mask)
    places = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert torch.equal(outside.index, route(router, places).index)
    for positions in (None, torch.zeros(1, 3, dtype=torch.int64)):
        with activate(RoutingScope(mask, positions=positions)), pytest.raises(ValueError, match="position"):
            router(torch.zeros(10, HIDDEN), mask)


@kinds
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(kind: str, tokens: int) -> None:
    routing = route(router_of(kind, 4, 4), torch.zeros(2, tokens, dtype=torch.int64))
    assert routing.index.shape == (2 * tokens, 4)


# In models.


def index_of(model: Any, **inputs: Any) -> list[Tensor]:
    """Experts of each layer, [B, S, K]."""
    seen: list[Tensor] = []
    hooks = [block.gate.register_forward_hook(lambda _m, _i, r: seen.append(r)) for block in model.model.sparse_blocks]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [routing.index.view(*routing.token_mask.shape, -1) for routing in seen]


@kinds
def test_cache_and_left_padding_change_no_choice(kind: str) -> None:
    model = mixture(**KINDS[kind], num_experts_per_tok=2)
    ids = token_ids(2, 8)
    full = index_of(model, input_ids=ids)
    assert len({tuple(map(tuple, layer[0].tolist())) for layer in full}) == (1 if kind == "uniform" else 2)
    past = model(ids[:, :5], use_cache=True).past_key_values
    for layer, rest in zip(full, index_of(model, input_ids=ids[:, 5:], past_key_values=past), strict=True):
        assert torch.equal(rest, layer[:, 5:])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    for layer, left in zip(full, index_of(model, input_ids=padded, attention_mask=mask), strict=True):
        assert torch.equal(left[:, 3:], layer)
    past = model(padded[:, :7], attention_mask=mask[:, :7], use_cache=True).past_key_values
    rest = index_of(model, input_ids=padded[:, 7:], attention_mask=mask, past_key_values=past)
    for layer, left in zip(full, rest, strict=True):
        assert torch.equal(left, layer[:, 4:])


@kinds
def test_a_model_trains_saves_and_generates(kind: str, tmp_path: Path) -> None:
    model = mixture(**KINDS[kind], num_experts_per_tok=2)
    assert not [name for name in model.state_dict() if "gate.weight" in name]
    ids = token_ids()
    output = model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.aux_losses == {}
    assert output.aux_loss == 0
    assert torch.equal(output.loss, output.lm_loss)
    plain = gradients(model)
    model.zero_grad()
    checkpoint_activations(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert_same_gradients(gradients(model), plain)
    model.eval().save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits, 1e-6)
    for one, other in zip(index_of(model, input_ids=ids), index_of(loaded, input_ids=ids), strict=True):
        assert torch.equal(one, other)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    uncached = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(generated, uncached)
