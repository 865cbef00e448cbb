"""The proof of step-0 identity: what it measures, on which tokens, and what it must not let pass."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from st_moe import prove_identity, upcycle
from st_moe.conversion import IdentityProof
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import VOCAB, dense_model, pair, relative_difference, tiny_tokenizer, token_ids

TEXTS = ["the quick brown fox", "and the dog sleeps on and on, the dog"]


def changed(change: str) -> Any:
    """A copy of the llama mixture that is no longer the dense model."""
    sparse = copy.deepcopy(pair("llama")[1])
    block = next(module for module in sparse.modules() if isinstance(module, SparseBlock))
    with torch.no_grad():
        if change == "zeroed FFN":
            block.experts.down_proj.zero_()
        elif change == "one expert":
            block.experts.down_proj[2] *= 1.5
        elif change == "swapped gate and up":
            gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
            block.experts.gate_up_proj.copy_(torch.cat([up, gate], dim=1))
        elif change == "weights that do not sum to 1":
            block.gate.normalize = False
        elif change == "dropped tokens":
            block.gate.capacity.factors[False] = 0.25
            block.gate.min_capacity = 1
        elif change == "attention":
            sparse.model.layers[0].self_attn.o_proj.weight *= 1.1
        elif change == "not a number":
            block.experts.down_proj[0, 0, 0] = float("nan")
    return sparse


def cross_entropy(model: Any, ids: Tensor, mask: Tensor) -> float:
    """Mean over pairs of neighbouring real tokens, one at a time."""
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    losses = [
        F.cross_entropy(logits[b, t], ids[b, t + 1])
        for b in range(ids.shape[0])
        for t in range(ids.shape[1] - 1)
        if mask[b, t] and mask[b, t + 1]
    ]
    return torch.stack(losses).mean().item()


def test_ids_are_compared_logit_by_logit() -> None:
    dense, _ = pair("llama")
    sparse = changed("one expert")
    ids = token_ids(3, 9)
    proof = prove_identity(dense, sparse, ids)
    with torch.no_grad():
        expected = relative_difference(sparse(ids).logits, dense(ids).logits)
    assert proof.max_relative_difference == pytest.approx(expected, rel=1e-5)
    assert proof.num_tokens == 27
    mask = torch.ones_like(ids)
    assert proof.dense_loss == pytest.approx(cross_entropy(dense, ids, mask), rel=1e-5)
    assert proof.sparse_loss == pytest.approx(cross_entropy(sparse, ids, mask), rel=1e-5)
    assert proof.sparse_loss != proof.dense_loss


def test_without_inputs_it_draws_the_same_tokens_every_time() -> None:
    dense, sparse = pair("llama")
    state = torch.get_rng_state()
    first, second = prove_identity(dense, sparse), prove_identity(dense, sparse)
    assert first == second
    assert first.num_tokens == 64
    assert torch.equal(torch.get_rng_state(), state)
    assert first.holds


def test_text_goes_through_the_tokenizer() -> None:
    dense, _ = pair("llama")
    sparse, tokenizer = changed("one expert"), tiny_tokenizer()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    for text in (TEXTS[0], TEXTS[:1]):
        assert prove_identity(dense, sparse, text, tokenizer) == prove_identity(dense, sparse, ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_compared(side: str) -> None:
    dense, sparse = pair("llama")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = side
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert lengths[0] != lengths[1]
    proof = prove_identity(dense, sparse, TEXTS, tokenizer)
    assert proof.num_tokens == sum(lengths)
    assert proof.holds
    expected = cross_entropy(dense, encoded["input_ids"], encoded["attention_mask"])
    assert proof.dense_loss == pytest.approx(expected, rel=1e-5)
    alone = [prove_identity(dense, sparse, text, tokenizer) for text in TEXTS]
    weighted = sum(p.dense_loss * (n - 1) for p, n in zip(alone, lengths, strict=True)) / (sum(lengths) - 2)
    assert proof.dense_loss == pytest.approx(weighted, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        "zeroed FFN",
        "one expert",
        "swapped gate and up",
        "weights that do not sum to 1",
        "dropped tokens",
        "attention",
        "not a number",
    ],
)
def test_what_has_changed_does_not_pass(change: str) -> None:
    dense, _ = pair("llama")
    proof = prove_identity(dense, changed(change))
    assert not proof.holds
    assert not proof.max_relative_difference <= 1e-3
    assert "NOT equal" in str(proof)


def test_a_model_passes_against_itself() -> None:
    dense, sparse = pair("llama")
    for model in (dense, sparse):
        proof = prove_identity(model, model)
        assert proof.max_relative_difference == 0
        assert proof.dense_loss == proof.sparse_loss


def test_the_proof_is_one_line_with_its_numbers() -> None:
    proof = IdentityProof(2.5e-7, 3.21987, 3.21991, 128, tolerance=1e-4)
    assert str(proof) == (
        "step 0: equal up to rounding; max relative logit difference 2.5e-07 over 128 tokens; loss 3.2199 -> 3.2199"
    )
    moved = IdentityProof(0.5, 3.0, 3.5, 128, tolerance=1e-4)
    assert str(moved).startswith("step 0: NOT equal; ")
    assert not moved.holds
    assert not IdentityProof(float("nan"), 3.0, 3.0, 1, tolerance=1e-4).holds
    with pytest.raises(AttributeError):
        proof.num_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tolerance_follows_the_dtype(dtype: torch.dtype) -> None:
    dense = dense_model("llama").to(dtype)
    sparse = upcycle(dense, num_experts=4, verify=False)
    proof = prove_identity(dense, sparse)
    # Routers compute in float32 whatever the weights are, so nothing finer can be asked for.
    assert proof.tolerance <= {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-4)
    assert proof.holds
    with torch.no_grad():
        for module in sparse.modules():
            if isinstance(module, SparseBlock):
                module.experts.down_proj.zero_()
    assert not prove_identity(dense, sparse).holds


def test_modes_and_models_are_left_as_they_were() -> None:
    dense, sparse = (copy.deepcopy(model) for model in pair("gpt2"))
    dense.train()
    sparse.train()
    expected = prove_identity(*pair("gpt2"))
    # Dropout would make the models differ, if the proof did not switch it off.
    assert prove_identity(dense, sparse) == expected
    assert dense.training
    assert sparse.training
    assert all(module.training for module in sparse.modules())
    dense.eval()
    dense.transformer.h[0].train()
    prove_identity(dense, sparse)
    assert not dense.training
    assert dense.transformer.h[0].training, "a part that was in training mode left it"
    assert all(parameter.grad is None for parameter in sparse.parameters())


def test_classifiers_are_compared_by_their_logits() -> None:
    dense = dense_model("llama", AutoModelForSequenceClassification, num_labels=3)
    sparse = upcycle(dense, num_experts=4, verify=False)
    ids = token_ids(4, 7)
    proof = prove_identity(dense, sparse, ids)
    assert proof.holds
    assert math.isnan(proof.dense_loss)
    assert math.isnan(proof.sparse_loss)
    with torch.no_grad():
        sparse.score.weight[0] *= 2
        expected = relative_difference(sparse(ids).logits, dense(ids).logits)
    proof = prove_identity(dense, sparse, ids)
    assert proof.max_relative_difference == pytest.approx(expected, rel=1e-5)
    assert not proof.holds


@pytest.mark.parametrize("side", ["left", "right"])
def test_classifiers_without_a_pad_token_run_sequence_by_sequence(side: str) -> None:
    dense = dense_model("llama", AutoModelForSequenceClassification, num_labels=3, pad_token_id=None)
    sparse = upcycle(dense, num_experts=4, verify=False)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = side
    assert prove_identity(dense, sparse, TEXTS, tokenizer).holds
    with torch.no_grad():
        sparse.score.weight[0] *= 2
        # Each text as it is alone, so without padding.
        alone = [[model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS] for model in (sparse, dense)]
    proof = prove_identity(dense, sparse, TEXTS, tokenizer)
    expected = relative_difference(*(torch.cat(logits) for logits in alone))
    assert proof.max_relative_difference == pytest.approx(expected, rel=1e-5)
    assert proof.num_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert not proof.holds


@pytest.mark.parametrize(
    "inputs",
    [torch.ones(2, 3), torch.ones(3, dtype=torch.long), torch.ones(0, 3, dtype=torch.long), torch.ones(1, 2, 3).long()],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_ids_of_the_wrong_form_are_refused(inputs: Tensor) -> None:
    with pytest.raises(ValueError, match=r"inputs: token ids must be integers \[B, S\], got"):
        prove_identity(*pair("llama"), inputs)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer: must be given when inputs are text, got None"):
        prove_identity(*pair("llama"), TEXTS[0])


def test_several_texts_need_a_pad_token() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: needs a pad token to compare several texts"):
        prove_identity(*pair("llama"), TEXTS, tokenizer)
    assert prove_identity(*pair("llama"), TEXTS[0], tokenizer).holds


@pytest.mark.parametrize("inputs", ["", [], [""]], ids=repr)
def test_empty_text_is_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="inputs: "):
        prove_identity(*pair("llama"), inputs, tiny_tokenizer())


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=f"inputs: .*{VOCAB + 3}"):
        prove_identity(*pair("llama"), torch.tensor([[1, VOCAB + 3, 2]]))


def test_one_token_has_no_next_token() -> None:
    proof = prove_identity(*pair("llama"), torch.tensor([[5], [6]]))
    assert proof.holds
    assert math.isnan(proof.dense_loss)
    assert proof.num_tokens == 2


def test_outputs_of_zeros_prove_nothing() -> None:
    dense = dense_model("llama")
    torch.nn.init.zeros_(dense.lm_head.weight)
    with pytest.raises(ValueError, match="inputs: the dense model's outputs are all zero, which proves nothing"):
        upcycle(dense, num_experts=2, recipe="noise")
