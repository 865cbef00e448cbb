"""Mixtures made larger or smaller, and with other numbers of choices: what stays exact, and what is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from st_moe import STMoEForCausalLM, STMoEModel, upcycle
from st_moe.conversion.resize import grow_experts, remove_experts, set_num_experts_per_tok
from tests.families import dense_model, mixture, relative_difference, token_ids


def blocks_of(model: Any) -> list[Any]:
    return model.base_model.sparse_blocks


def difference(model: Any, other: Any) -> float:
    ids = token_ids()
    return relative_difference(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "apertus"])
def test_growing_repeats_experts_and_rows(family: str) -> None:
    if family == "apertus":
        model = upcycle(dense_model(family), num_experts=4, router_std=1.0, verify=False)
    else:
        model = mixture(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grown = grow_experts(model, 8)
    assert type(grown) is type(model)
    assert (grown.config.num_experts, grown.config.num_experts_per_tok) == (8, 2)
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for old, new in zip(blocks_of(model), blocks_of(grown), strict=True):
        for name, tensor in new.gate.state_dict().items():
            assert torch.equal(tensor, old.gate.state_dict()[name].repeat_interleave(2, dim=0))
        if family == "apertus":
            assert len(new.experts) == 8
            assert torch.equal(new.experts[5].up_proj.weight, old.experts[2].up_proj.weight)
            assert new.experts[5] is not new.experts[4]
        else:
            for name, tensor in new.experts.state_dict().items():
                assert torch.equal(tensor, old.experts.state_dict()[name].repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1},
        {"router_type": "sigmoid_top_k"},
        {"router_type": "noisy_top_k"},
        {"num_shared_experts": 1, "shared_expert_gate": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("times", [2, 3])
def test_growing_experts_and_choices_alike_is_exact(fields: dict[str, Any], times: int) -> None:
    model = mixture(**fields)
    choices = fields.get("num_experts_per_tok", 2)
    grown = grow_experts(model, 4 * times, num_experts_per_tok=choices * times)
    assert grown.config.num_experts_per_tok == choices * times
    assert grown.identity_proof.max_relative_difference <= 1e-5
    assert difference(model, grown) <= 1e-5
    experts = blocks_of(grown)[0].experts
    with torch.no_grad():
        # Two copies that are told apart: one expert swapped must be seen.
        experts.down_proj[[0, times]] = experts.down_proj[[times, 0]]
    assert difference(model, grown) > 1e-4


def test_one_choice_is_exact_at_the_same_cost() -> None:
    model = mixture(num_experts_per_tok=1)
    grown = grow_experts(model, 8)
    assert grown.config.num_experts_per_tok == 1
    assert grown.identity_proof.max_relative_difference <= 1e-5
    switch = grow_experts(mixture(num_experts_per_tok=1, norm_topk_prob=False), 8)
    assert not switch.identity_proof.holds, "half of the probability goes to the other copy"


def test_what_moves_when_growing_is_measured() -> None:
    model = mixture()
    assert not grow_experts(model, 8).identity_proof.holds, "the second choice is a copy of the first"
    assert not grow_experts(model, 6, num_experts_per_tok=3).identity_proof.holds
    unnormalised = mixture(router_type="sigmoid_top_k", norm_topk_prob=False)
    assert not grow_experts(unnormalised, 8, num_experts_per_tok=4).identity_proof.holds
    # The same cost leaves each token its best K / m experts.
    halved = set_num_experts_per_tok(model, 1)
    assert difference(halved, grow_experts(model, 8)) <= 1e-5


def test_left_over_places_go_to_the_most_loaded() -> None:
    model = mixture()
    loads = [torch.tensor([1, 5, 2, 9]), torch.tensor([7, 0, 0, 1])]
    grown = grow_experts(model, 6, loads=loads)
    for old, new, rows in zip(
        blocks_of(model), blocks_of(grown), ([0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 3, 3]), strict=True
    ):
        assert torch.equal(new.gate.weight, old.gate.weight[rows])
    plain = grow_experts(model, 6)
    assert torch.equal(blocks_of(plain)[0].gate.weight, blocks_of(model)[0].gate.weight[[0, 0, 1, 1, 2, 3]])


def test_noise_sets_copies_apart() -> None:
    model = mixture()
    grown = grow_experts(model, 8, num_experts_per_tok=4, noise=0.01, seed=1)
    for old, new in zip(blocks_of(model), blocks_of(grown), strict=True):
        rows, spread = old.gate.weight, old.gate.weight.std()
        assert torch.equal(new.gate.weight[::2], rows)
        moved = new.gate.weight[1::2] - rows
        assert moved.std().item() == pytest.approx(0.01 * spread.item(), rel=0.2)
    assert grown.identity_proof.max_relative_difference > 1e-5
    again, other = (grow_experts(model, 8, noise=0.01, seed=seed) for seed in (1, 2))
    assert torch.equal(blocks_of(again)[0].gate.weight, blocks_of(grown)[0].gate.weight)
    assert not torch.equal(blocks_of(other)[0].gate.weight, blocks_of(grown)[0].gate.weight)
    # Without it, copies get the same gradients for ever.
    ids = token_ids()
    twins = grow_experts(model, 8, num_experts_per_tok=4)
    for result, equal in ((twins, True), (grown, False)):
        result.train()(ids, labels=ids).loss.backward()
        gradient = blocks_of(result)[0].experts.down_proj.grad
        assert torch.allclose(gradient[::2], gradient[1::2], rtol=1e-4, atol=1e-9) is equal


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_removing_takes_the_least_loaded(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    loads = [torch.tensor([4, 0, 3, 9]), torch.tensor([0, 8, 2, 2])]
    small = remove_experts(model, 2, loads=loads)
    assert small.config.num_experts == 2
    for old, new, kept in zip(blocks_of(model), blocks_of(small), ([0, 3], [1, 2]), strict=True):
        assert torch.equal(new.gate.weight, old.gate.weight[kept])
        assert torch.equal(new.experts.down_proj, old.experts.down_proj[kept])
    assert not small.identity_proof.holds
    named = remove_experts(model, removed=[[1, 2], [0, 3]])
    assert difference(small, named) == 0
    small.save_pretrained(tmp_path)
    loaded = STMoEForCausalLM.from_pretrained(tmp_path)
    assert difference(small, loaded) == 0


def test_removing_what_no_token_chooses_is_exact() -> None:
    model = mixture()
    for block in blocks_of(model):
        with torch.no_grad():
            # A row that loses against the others whatever the token says.
            block.gate.weight[1] = 0
            block.gate.weight[3] = -block.gate.weight[0]
            block.gate.weight[2] = -block.gate.weight[0] * 0.5
    ids = token_ids(4, 16)
    one = set_num_experts_per_tok(model, 1)
    chosen = [logits.argmax(-1) for logits in one(ids, output_router_logits=True).router_logits]
    assert all((index != 1).all() and (index != 2).all() for index in chosen)
    small = remove_experts(one, removed=[[1, 2], [1]], proof_inputs=ids)
    assert small.config.num_experts == [2, 3]
    assert small.identity_proof.max_relative_difference <= 1e-5
    assert not remove_experts(one, removed=[[0], [0]], proof_inputs=ids).identity_proof.holds


def test_choices_of_copies_do_not_matter_and_of_others_do() -> None:
    copies = upcycle(dense_model("llama"), num_experts=4, router_std=1.0, verify=False)
    assert set_num_experts_per_tok(copies, 3).identity_proof.max_relative_difference <= 1e-5
    model = mixture()
    wider = set_num_experts_per_tok(model, 3)
    assert wider.config.num_experts_per_tok == 3
    assert not wider.identity_proof.holds
    direct = mixture(num_experts_per_tok=3)
    assert difference(direct, wider) == 0
    back = set_num_experts_per_tok(wider, 2)
    assert difference(model, back) == 0


def test_choices_shrink_with_the_experts() -> None:
    small = remove_experts(mixture(num_experts_per_tok=3), removed=[[0, 1], [3]])
    assert small.config.num_experts == [2, 3]
    assert small.config.num_experts_per_tok == [2, 3]


def test_shards_of_granular_experts_stay_together() -> None:
    model = upcycle(
        dense_model("llama"), num_experts=4, num_experts_per_tok=2, recipe="granular", router_std=1.0, verify=False
    )
    grown = grow_experts(model, 8, num_experts_per_tok=4)
    assert grown.identity_proof.max_relative_difference <= 1e-5


def test_base_models_have_no_proof() -> None:
    model = mixture(auto=STMoEModel)
    assert grow_experts(model, 8).identity_proof is None


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda m: grow_experts(m, 3), "num_experts: must be at least the 4 of layer 0 to grow, got 3"),
        (lambda m: grow_experts(m, 8, noise=-1), "noise: must be finite and not negative, got -1"),
        (lambda m: grow_experts(m, 8, num_experts_per_tok=9), "num_experts_per_tok: must be between 1 and num_experts"),
        (lambda m: grow_experts(m, 6, loads=[torch.ones(4)]), "loads: must be 4 numbers for layer 1"),
        (lambda m: grow_experts(m, 6, loads=[torch.ones(3)] * 2), "loads: must be 4 numbers for layer 0"),
        (lambda m: grow_experts(dense_model("llama"), 8), "model: must be a mixture, got LlamaForCausalLM"),
        (lambda m: remove_experts(m), "removed: must be given, or num_experts and loads; got neither or both"),
        (lambda m: remove_experts(m, 2), "removed: must be given, or num_experts and loads"),
        (
            lambda m: remove_experts(m, 2, loads=[torch.ones(4)] * 2, removed=[[0], [0]]),
            "removed: must be given, or num_experts and loads",
        ),
        (lambda m: remove_experts(m, removed=[[0]]), "removed: must have one list for each of the 2 sparse layers"),
        (lambda m: remove_experts(m, removed=[[0], [4]]), r"removed: must leave some of the 4 experts of layer 1"),
        (lambda m: remove_experts(m, removed=[[0, 1, 2, 3], []]), "removed: must leave some of the 4 experts"),
        (
            lambda m: remove_experts(m, 5, loads=[torch.ones(4)] * 2),
            "num_experts: must be between 1 and the 4 of layer 0, got 5",
        ),
        (lambda m: set_num_experts_per_tok(m, 5), "num_experts_per_tok: must be between 1 and num_experts=4, got 5"),
        (
            lambda m: set_num_experts_per_tok(mixture(router_type="soft", allow_non_causal_routing=True), 1),
            "router_type: must have routers with one row per expert .* 'soft' has other scale",
        ),
    ],
)
def test_faulty_arguments_are_refused(attempt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt(mixture())
