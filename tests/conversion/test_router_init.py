"""Router initialisation: the rows that each way makes, from what the routers really see."""

from typing import Any

import pytest
import torch
from torch import Tensor

from st_moe import upcycle
from st_moe.conversion.router_init import (
    ROUTER_INITS,
    check_router_init,
    cluster,
    initialise_routers,
    normal,
    prompts,
    router_inputs,
    zeros,
)
from tests.families import HIDDEN, LAYERS, dense_model, mixture, relative_difference, tiny_tokenizer, token_ids

SETS = [["the quick brown fox", "fox"], ["the lazy dog sleeps on", "dog"], "jumps over", ["and the", "brown", "over"]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(model: Any) -> list[Tensor]:
    return [block.gate.weight for block in model.base_model.sparse_blocks]


def seen_alone(model: Any, texts: list[str]) -> list[list[Tensor]]:
    """What each router sees of each text, one text at a time: per layer, per text [n, H]."""
    seen: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for text in texts:
        for layer, rows in zip(seen, router_inputs(model, text, tiny_tokenizer()), strict=True):
            layer.append(rows[0])
    return seen


def test_rows_without_text() -> None:
    drawn = normal(400, 50, generator(), [], std=0.3)
    assert drawn.shape == (400, 50)
    assert drawn.std().item() == pytest.approx(0.3, rel=0.03)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.equal(zeros(3, 5, generator(), []), torch.zeros(3, 5))


def test_prompts_are_means_of_means() -> None:
    texts = [[torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 3.0]])], [torch.tensor([[0.0, -5.0]])]]
    rows = prompts(2, 2, generator(), texts, scale=2.0)
    # The mean of (3, 0) and (0, 3), not of the three tokens.
    assert torch.allclose(rows, torch.tensor([[2**0.5, 2**0.5], [0.0, -2.0]]))


def test_clusters_are_found() -> None:
    centres = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    tokens = centres.repeat(10, 1) + torch.randn(30, 3, generator=generator()) * 0.1
    rows = cluster(3, 3, generator(), [[tokens[:7], tokens[7:19]], [tokens[19:]]], scale=4.0)
    assert torch.allclose(rows.norm(dim=1), torch.full((3,), 4.0))
    order = rows.argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert torch.allclose(rows, centres[order] * 4 / 9, atol=0.2)
    with pytest.raises(ValueError, match="texts: must hold at least 3 tokens, one per router row, got 2"):
        cluster(3, 3, generator(), [[tokens[:2]]])


def test_inputs_are_what_the_gate_gets() -> None:
    """The same tensors as a hook of our own sees: behind the norm, not the layer's input."""
    model = mixture()
    ids = token_ids(2, 5)
    caught: list[Tensor] = []
    normed = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda _, __, output: caught.append(output)) for norm in normed]
    found = router_inputs(model, ids)
    for hook in hooks:
        hook.remove()
    assert len(found) == LAYERS
    for layer, expected in zip(found, caught, strict=True):
        assert torch.equal(torch.stack(layer), expected)
    states = model(ids, output_hidden_states=True).hidden_states
    assert relative_difference(torch.stack(found[0]), states[0]) > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_texts_do_not_see_each_other(family: str) -> None:
    """Texts of different lengths are what each is alone, whatever pads and whatever positions a family has."""
    model = mixture(family)
    texts = ["the quick brown fox jumps over", "dog sleeps", "the"]
    together = router_inputs(model, texts, tiny_tokenizer())
    for batch, alone in zip(together, seen_alone(model, texts), strict=True):
        for ours, theirs in zip(batch, alone, strict=True):
            assert ours.shape == theirs.shape
            assert relative_difference(ours, theirs) <= 1e-5
    assert len({len(rows) for rows in together[0]}) == 3


def test_prompt_rows_of_a_model() -> None:
    model = mixture()
    flat = [[texts] if isinstance(texts, str) else texts for texts in SETS]
    expected = [[] for _ in range(LAYERS)]
    for texts in flat:
        for layer, seen in enumerate(seen_alone(model, texts)):
            mean = torch.stack([rows.mean(0) for rows in seen]).mean(0)
            expected[layer].append(3 * mean / mean.norm())
    initialise_routers(model, "prompts", texts=SETS, tokenizer=tiny_tokenizer(), scale=3.0)
    for rows, wanted in zip(rows_of(model), expected, strict=True):
        assert relative_difference(rows, torch.stack(wanted)) <= 1e-5
    # The sets in another order are other rows.
    other = mixture()
    initialise_routers(other, "prompts", texts=SETS[::-1], tokenizer=tiny_tokenizer(), scale=3.0)
    assert relative_difference(rows_of(other)[0], rows_of(model)[0]) > 0.1
    assert torch.allclose(rows_of(other)[0].flip(0), rows_of(model)[0], atol=1e-5)


def test_prompts_go_to_their_expert() -> None:
    """Of a mixture of copies: most of a prompt's tokens choose their own expert."""
    dense = dense_model("llama")
    sets = [token_ids(2, 10, seed=seed) % 20 + 20 * seed for seed in range(4)]
    model = upcycle(dense, num_experts=4, router_init="prompts", router_texts=sets)
    assert model.identity_proof.max_relative_difference <= 1e-5
    for layer in range(LAYERS):
        hits = []
        for number, ids in enumerate(sets):
            tokens = torch.cat(router_inputs(model, ids)[layer])
            hits.append(((tokens @ rows_of(model)[layer].T).argmax(1) == number).float().mean())
        assert torch.stack(hits).mean() > 0.5
        assert min(hits) > 0.25


def test_clusters_of_a_model_share_its_tokens() -> None:
    dense = dense_model("llama")
    text = [token_ids(4, 20)]
    model = upcycle(dense, num_experts=4, router_init="cluster", router_texts=text, router_options={"scale": 2.0})
    assert model.identity_proof.holds
    for layer, rows in enumerate(rows_of(model)):
        assert torch.allclose(rows.norm(dim=1), torch.full((4,), 2.0), atol=1e-5)
        tokens = torch.cat(router_inputs(model, text[0])[layer])
        expected = cluster(4, HIDDEN, generator(1_000_003 + layer), [[tokens]], scale=2.0)
        assert relative_difference(rows, expected) <= 1e-4


@pytest.mark.parametrize("init", ROUTER_INITS)
def test_shards_of_a_copy_still_share_their_row(init: str) -> None:
    texts = {"prompts": SETS, "cluster": SETS}.get(init)
    model = upcycle(
        dense_model("llama"),
        num_experts=8,
        num_experts_per_tok=4,
        recipe="granular",
        router_init=init,
        router_texts=texts,
        tokenizer=tiny_tokenizer(),
    )
    assert model.identity_proof.max_relative_difference <= 1e-6
    for rows in rows_of(model):
        assert torch.equal(rows[::2], rows[1::2])
        assert init == "zeros" or len(rows.unique(dim=0)) == 4


def test_the_seed_decides() -> None:
    dense = dense_model("llama")

    def drawn(seed: int) -> list[Tensor]:
        options = {"std": 0.5}
        return rows_of(upcycle(dense, num_experts=4, router_options=options, seed=seed, verify=False))

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert torch.cat(first).std().item() == pytest.approx(0.5, rel=0.2)


def test_the_model_is_left_in_its_mode_and_without_hooks() -> None:
    model = mixture().train()
    before = [rows.clone() for rows in rows_of(model)]
    with pytest.raises(ValueError, match="tokenizer"):
        initialise_routers(model, "cluster", texts=["the fox"])
    assert all(torch.equal(a, b) for a, b in zip(before, rows_of(model), strict=True))
    initialise_routers(model, "cluster", texts=[token_ids()])
    assert model.training
    assert all(not block.gate._forward_pre_hooks for block in model.base_model.sparse_blocks)
    assert all(rows.requires_grad and rows.is_leaf for rows in rows_of(model))


@pytest.mark.parametrize(
    ("init", "options", "texts", "message"),
    [
        ("random", {}, None, "router_init: must be one of normal, zeros, prompts, cluster, got 'random'"),
        ("zeros", {"std": 1}, None, "router_options: 'zeros' takes none, got std"),
        ("cluster", {"sise": 1}, ["a"], "router_options: 'cluster' takes scale, got sise"),
        ("normal", {"std": -1.0}, None, "router_options: std must be a number that is finite and not negative"),
        ("prompts", {"scale": "x"}, ["a"], "router_options: scale must be a number"),
        ("prompts", {}, None, "router_texts: must be given with router_init 'prompts', got None"),
        ("cluster", {}, [], "router_texts: must be given"),
        ("normal", {}, ["a"], "router_texts: must be left out, for it reads none, with router_init 'normal'"),
        ("cluster", {}, "the fox", "router_texts: must be a list"),
    ],
)
def test_faulty_ways_are_refused(init: str, options: dict[str, Any], texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_router_init(init, options, texts)
    with pytest.raises(ValueError, match=message):
        upcycle(dense_model("llama"), router_init=init, router_options=options, router_texts=texts)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="texts: must be one set of prompts for each of the 4 router rows, got 3"):
        initialise_routers(mixture(), "prompts", texts=SETS[:3], tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="HashRouter has none; choose another router_type"):
        initialise_routers(mixture(router_type="hash"), "zeros")
    with torch.device("meta"):
        empty = type(mixture())(mixture().config)
    with pytest.raises(ValueError, match="model: must have weights to start routers from text"):
        initialise_routers(empty, "cluster", texts=[token_ids()])
