"""Auxiliary losses and routing statistics: values, gradients, masks, and how the model's output uses them.

Shape letters: T tokens, E experts, K choices, G groups (sequences), S tokens of one.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_moe import STMoEForCausalLM, STMoEForSequenceClassification
from st_moe.modeling.routing import Routing, TopKRouter, losses
from st_moe.modeling.routing.losses import dropped_fraction, expert_load, router_entropy, router_z_loss
from tests.families import mixture, token_ids
from tests.modeling.reference import assert_close, difference, one_group

NEAR = 1e-5
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


def reference_balance(logits: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    """E * sum_e f_e P_e of each group that holds tokens, then the mean; written as the paper states it."""
    groups = []
    logits, first = logits.view(*mask.shape, -1), first.view(mask.shape)
    for g in range(len(mask)):
        rows = [s for s in range(mask.shape[1]) if mask[g, s]]
        if rows:
            p = logits[g, rows].double().softmax(-1).mean(0)
            f = torch.tensor([sum(int(first[g, s]) == e for s in rows) / len(rows) for e in range(logits.shape[-1])])
            groups.append(logits.shape[-1] * (f * p).sum())
    return torch.stack(groups).mean() if groups else logits.sum() * 0


def random_case(seed: int, experts: int, groups: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(groups * length, experts) * 2
    return logits.requires_grad_(), logits.argmax(-1), torch.rand(groups, length) < 0.7


def routing_of(logits: Tensor, index: Tensor, weight: Tensor, mask: Tensor, dropped: Tensor | None = None) -> Routing:
    return Routing(logits, logits.softmax(-1), index, weight, mask, dropped)


def balance_loss(logits: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    """The first-choice loss of a softmax router."""
    return losses.balance_loss(logits.float().softmax(-1), first[:, None], mask)


@pytest.mark.parametrize("experts", [1, 2, 4, 7])
def test_balanced_is_one_and_collapsed_is_the_number_of_experts(experts: int) -> None:
    tokens = 3 * experts
    first = torch.arange(tokens) % experts
    assert balance_loss(torch.zeros(tokens, experts), first, one_group(tokens)).item() == pytest.approx(1, abs=1e-6)
    # Confident and balanced is balanced too.
    logits = torch.nn.functional.one_hot(first, experts) * 50.0
    assert balance_loss(logits, first, one_group(tokens)).item() == pytest.approx(1, abs=1e-6)
    logits = torch.zeros(tokens, experts)
    logits[:, -1] = 50.0
    collapsed = balance_loss(logits, logits.argmax(-1), one_group(tokens))
    assert collapsed.item() == pytest.approx(experts, rel=1e-6)


def test_z_loss_of_known_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    log4 = torch.log(torch.tensor(4.0)).item()
    expected = (log4**2 + (3 + log4) ** 2) / 2
    assert router_z_loss(logits, one_group(2)).item() == pytest.approx(expected, rel=1e-6)


@properties
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), seeds)
def test_values_and_gradients_against_the_formulas(experts: int, groups: int, length: int, seed: int) -> None:
    logits, first, mask = random_case(seed, experts, groups, length)
    p = logits.detach().double().softmax(-1)
    tokens = mask.sum(-1).double()
    held = (tokens > 0).sum().clamp(min=1)
    loss = balance_loss(logits, first, mask)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert_close(loss, reference_balance(logits, first, mask), NEAR)
    (actual,) = torch.autograd.grad(loss, logits)
    # d L / d z_tj = E p_tj (c_j - sum_e c_e p_te) / (G n^2), with c the counts of t's group and n its tokens.
    one_hot = torch.nn.functional.one_hot(first, experts).view(groups, length, experts)
    counts = (one_hot * mask[..., None]).sum(1).double().repeat_interleave(length, 0)
    n = tokens.clamp(min=1).repeat_interleave(length)[:, None]
    expected = experts * p * (counts - (counts * p).sum(-1, keepdim=True)) / (held * n**2) * mask.view(-1, 1)
    # With one expert, or with equal counts, the gradient is zero up to rounding.
    assert (actual - expected).abs().max() <= NEAR * max(expected.abs().max().item(), 0.1)

    z = router_z_loss(logits, mask)
    logsumexp = logits.detach().double().logsumexp(-1)
    total = mask.sum().clamp(min=1)
    assert z.dtype == torch.float32
    assert_close(z, (logsumexp.square() * mask.flatten()).sum() / total, NEAR)
    (actual,) = torch.autograd.grad(z, logits)
    assert_close(actual, 2 * logsumexp[:, None] * p * mask.view(-1, 1) / total, NEAR)


@properties
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 5), seeds)
def test_masked_tokens_count_as_little_as_removed_ones(experts: int, groups: int, length: int, seed: int) -> None:
    logits, first, mask = random_case(seed, experts, groups, length)
    real = mask.flatten()
    noise = torch.where(real[:, None], logits.detach(), torch.randn_like(logits) * 10)
    elsewhere = torch.where(real, first, torch.randint(0, experts, first.shape))
    for one in (mask, mask.view(1, -1)):
        assert torch.equal(balance_loss(noise, elsewhere, one), balance_loss(logits, first, one))
    assert torch.equal(router_z_loss(noise, mask), router_z_loss(logits, mask))
    kept = one_group(int(real.sum()))
    removed = balance_loss(logits[real], first[real], kept)
    assert_close(balance_loss(logits, first, mask.view(1, -1)), removed, NEAR)
    assert_close(router_z_loss(logits, mask), router_z_loss(logits[real], kept), NEAR)


def test_groups_without_tokens_are_no_groups() -> None:
    logits, first, _ = random_case(0, 4, 3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    rows = mask.flatten()
    expected = balance_loss(logits[rows], first[rows], torch.ones(2, 5, dtype=torch.bool))
    assert_close(balance_loss(logits, first, mask), expected, NEAR)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (2, 0), (2, 3)])
def test_no_real_token_gives_zero_losses_and_gradients(shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    logits = torch.randn(mask.numel(), 4, requires_grad=True)
    first = torch.zeros(mask.numel(), dtype=torch.long)
    for loss in (balance_loss(logits, first, mask), router_z_loss(logits, mask)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient == 0).all()
    index = first[:, None]
    routing = routing_of(logits, index, torch.ones_like(index).float(), mask, torch.zeros_like(index).bool())
    assert (expert_load(routing) == 0).all()
    assert router_entropy(routing).item() == 0
    assert dropped_fraction(routing).item() == 0


def test_the_scope_of_balance_matters() -> None:
    """Two sequences that each use their own half of the experts: balanced as a batch, not as sequences."""
    first = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    logits = torch.nn.functional.one_hot(first, 4) * 50.0
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert balance_loss(logits, first, mask).item() == pytest.approx(2, rel=1e-5)
    assert balance_loss(logits, first, mask.view(1, -1)).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_read_as_float32(dtype: torch.dtype) -> None:
    logits, first, mask = random_case(0, 4, 2, 8)
    low = logits.detach().to(dtype)
    assert torch.equal(balance_loss(low, first, mask), balance_loss(low.float(), first, mask))
    assert torch.equal(router_z_loss(low, mask), router_z_loss(low.float(), mask))


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    loss = balance_loss(logits, logits.argmax(-1), one_group(2)) + router_z_loss(logits, one_group(2))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_statistics_of_a_known_routing() -> None:
    index = torch.tensor([[0, 1], [0, 2], [1, 0], [3, 3]])
    weight = torch.tensor([[0.5, 0.5], [0.9, 0.0], [0.6, 0.4], [1.0, 1.0]])
    dropped = torch.zeros(4, 2, dtype=torch.bool)
    dropped[1, 1] = True
    mask = torch.tensor([[True, True], [True, False]])
    logits = torch.tensor([[0.0] * 4, [50.0, 0.0, 0.0, 0.0], [50.0, 50.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    routing = routing_of(logits, index, weight, mask, dropped)
    # Used by real tokens: 0, 1, 0, 1, 0; the last token is padding.
    assert_close(expert_load(routing), torch.tensor([0.6, 0.4, 0.0, 0.0]), NEAR)
    assert router_entropy(routing).item() == pytest.approx((1 + 0 + 0.5) / 3, rel=1e-5)
    assert dropped_fraction(routing).item() == pytest.approx(1 / 6, rel=1e-6)
    assert dropped_fraction(routing._replace(dropped=None)).item() == 0
    assert router_entropy(routing_of(torch.zeros(2, 1), index[:2], weight[:2], one_group(2))).item() == 0


# How the model uses them.


def router_gradients(model: Any, loss: Tensor) -> Tensor:
    """Gradient of a loss with respect to all routers, flat."""
    routers = [module.weight for module in model.modules() if isinstance(module, TopKRouter)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, routers, retain_graph=True)])


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("padded", [False, True])
def test_model_losses_are_means_over_sparse_layers(scope: str, padded: bool) -> None:
    model = mixture(balance_loss_scope=scope, num_hidden_layers=3, sparse_layers=[0, 2]).train()
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[2, :7] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert len(output.router_logits) == 2
    groups = mask.bool() if scope == "sequence" else mask.bool().view(1, -1)
    balance = [reference_balance(logits, logits.argmax(-1), groups) for logits in output.router_logits]
    real = mask.flatten()
    z = [(logits.double().logsumexp(-1).square() * real).sum() / real.sum() for logits in output.router_logits]
    assert difference(balance[0], balance[1]) > 0.01, "layers too alike to tell a mean from a pool"
    assert_close(output.balance_loss, torch.stack(balance).mean(), NEAR)
    assert_close(output.router_z_loss, torch.stack(z).mean(), NEAR)
    assert_close(output.aux_loss, 1e-2 * output.balance_loss + 1e-3 * output.router_z_loss, NEAR)
    assert set(output.aux_losses) == {"balance_loss", "router_z_loss"}
    assert output.aux_losses["balance_loss"] is output.balance_loss
    assert_close(output.expert_load.sum(-1), torch.ones(2), NEAR)
    assert output.expert_load.shape == (2, 4)
    assert output.router_entropy.shape == output.dropped_fraction.shape == (2,)


@pytest.mark.parametrize(("balance", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_losses_are_live_with_exactly_their_coefficient(balance: float, z: float) -> None:
    model = mixture(balance_loss_coef=balance, router_z_loss_coef=z).train()
    ids = token_ids(2, 16)
    output = model(input_ids=ids, labels=ids)
    assert_close(output.loss, output.lm_loss + balance * output.balance_loss + z * output.router_z_loss, 1e-6)
    whole, language = (router_gradients(model, loss) for loss in (output.loss, output.lm_loss))
    raw_balance = router_gradients(model, output.balance_loss)
    raw_z = router_gradients(model, output.router_z_loss)
    assert raw_balance.abs().max() > 1e-3
    assert raw_z.abs().max() > 1e-3
    expected = balance * raw_balance + z * raw_z
    assert_close(whole - language, expected, 1e-4)
    assert difference(whole - language, 2 * expected) > 0.1, "a doubled coefficient would be seen"


def test_coefficients_of_zero_add_nothing() -> None:
    model = mixture(balance_loss_coef=0, router_z_loss_coef=0.0).train()
    ids = token_ids()
    output = model(input_ids=ids, labels=ids)
    assert torch.equal(output.loss, output.lm_loss)
    assert output.aux_loss.item() == 0
    assert output.balance_loss.item() > 0.9
    assert torch.equal(router_gradients(model, output.loss), router_gradients(model, output.lm_loss))


@pytest.mark.parametrize("training", [True, False])
def test_losses_do_not_depend_on_output_router_logits(training: bool) -> None:
    ids = token_ids()
    outputs = []
    for configured in (False, True):
        for asked in (None, False, True):
            model = mixture(output_router_logits=configured).train(training)
            outputs.append(model(input_ids=ids, labels=ids, output_router_logits=asked))
            wanted = configured if asked is None else asked
            assert (outputs[-1].router_logits is not None) == wanted
    for output in outputs[1:]:
        for name in ("loss", "lm_loss", "balance_loss", "router_z_loss", "aux_loss", "expert_load"):
            assert torch.equal(output[name], outputs[0][name]), name


def test_evaluation_loss_is_the_language_models_alone() -> None:
    model = mixture(balance_loss_coef=1.0)
    ids = token_ids()
    logits = model(input_ids=ids).logits
    output = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(output.loss, expected, NEAR)
    assert torch.equal(output.loss, output.lm_loss)
    assert output.balance_loss > 0
    training = model.train()(input_ids=ids, labels=ids)
    assert_close(training.lm_loss, expected, NEAR)
    assert (training.loss - training.lm_loss).item() > 0.5


def test_padding_moves_no_loss_and_no_statistic() -> None:
    model = mixture()
    ids = token_ids(1, 9)
    plain = model.train()(input_ids=ids, labels=ids)
    junk = token_ids(1, 4, seed=1)
    padded = torch.cat([junk, ids], dim=1)
    mask = torch.cat([torch.zeros_like(junk), torch.ones_like(ids)], dim=1)
    labels = padded.where(mask.bool(), -100)
    labels[:, 4] = -100  # the first real token has nothing before it to be predicted from
    output = model(input_ids=padded, attention_mask=mask, labels=labels)
    for name in ("lm_loss", "balance_loss", "router_z_loss", "loss", "expert_load", "router_entropy"):
        assert_close(output[name], plain[name], 1e-4, name)
    unmasked = model(input_ids=padded, labels=labels)
    assert difference(unmasked.router_z_loss, plain.router_z_loss) > 1e-3, "the mask matters here"


def test_step_total_scales_the_auxiliary_part_like_the_language_part() -> None:
    """Two micro-batches of one step add up to the step's losses; without padding the z-loss does so exactly."""
    model = mixture(balance_loss_coef=0.0, router_z_loss_coef=0.5).train()
    ids = token_ids(4, 8)
    whole = model(input_ids=ids, labels=ids, num_items_in_batch=4 * 7)
    single = model(input_ids=ids, labels=ids)
    parts = [model(input_ids=rows, labels=rows, num_items_in_batch=4 * 7) for rows in (ids[:1], ids[1:])]
    assert_close(whole.loss, single.loss, NEAR)
    assert_close(parts[0].loss + parts[1].loss, whole.loss, NEAR)
    gradients = [router_gradients(model, part.loss) for part in parts]
    assert_close(gradients[0] + gradients[1], router_gradients(model, whole.loss), 1e-4)
    share = model(input_ids=ids[:1], labels=ids[:1], num_items_in_batch=torch.tensor(28))
    assert_close(share.loss - share.lm_loss, 0.5 * share.router_z_loss * 7 / 28, 1e-4)


def test_statistics_without_labels() -> None:
    model = mixture()
    ids = token_ids()
    quiet = model(input_ids=ids)
    assert quiet.loss is None
    assert quiet.balance_loss is None
    asked = model(input_ids=ids, output_router_logits=True)
    assert asked.loss is None
    assert asked.balance_loss > 0
    training = model.train()(input_ids=ids)
    assert training.loss is None
    assert training.aux_loss > 0


@pytest.mark.parametrize("auto", [STMoEForCausalLM, STMoEForSequenceClassification])
def test_every_head_trains_its_routers(auto: type) -> None:
    model = mixture(auto=auto, num_labels=3).train()
    ids = token_ids()
    labels = ids if auto is STMoEForCausalLM else torch.tensor([0, 2])
    output = model(input_ids=ids, labels=labels)
    assert_close(output.loss, output.lm_loss + output.aux_loss, 1e-6)
    model.eval()
    assert torch.equal(*(model(input_ids=ids, labels=labels)[name] for name in ("loss", "lm_loss")))


# Losses that are off by default.


def reference_fractions(index: Tensor, rows: list[int], experts: int) -> Tensor:
    counts = torch.zeros(experts, dtype=torch.float64)
    for row in rows:
        for expert in index[row].tolist():
            counts[expert] += 1
    return counts / max(len(rows) * index.shape[1], 1)


@properties
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 6), seeds)
def test_balance_of_all_choices(experts: int, groups: int, length: int, seed: int) -> None:
    logits, _, mask = random_case(seed, experts, groups, length)
    p = logits.detach().softmax(-1)
    index = p.argsort(-1, descending=True)[:, :2]
    terms = []
    for g in range(groups):
        rows = [g * length + s for s in range(length) if mask[g, s]]
        if rows:
            terms.append(experts * (reference_fractions(index, rows, experts) * p[rows].double().mean(0)).sum())
    expected = torch.stack(terms).mean() if terms else torch.zeros(())
    assert_close(losses.balance_loss(p, index, mask), expected, NEAR)
    half = torch.tensor([True, False]).expand(index.shape)
    first = losses.balance_loss(p, index[:, :1], mask)
    assert_close(
        losses.balance_loss(p, index, mask, half), first / 2, NEAR, "a fraction of all choices, half of them kept"
    )


@pytest.mark.parametrize(("experts", "choices"), [(4, 2), (6, 3), (5, 5), (3, 1)])
def test_values_at_balance_and_at_collapse(experts: int, choices: int) -> None:
    """The table of docs/routers.md."""
    tokens = 2 * experts
    everyone = one_group(tokens)
    balanced = (torch.arange(tokens)[:, None] + torch.arange(choices)) % experts
    collapsed = torch.arange(choices).expand(tokens, -1)
    uniform = torch.full((tokens, experts), 1 / experts)
    sure = torch.zeros(tokens, experts)
    sure[:, :choices] = 1 / choices
    assert losses.balance_loss(uniform, balanced, everyone).item() == pytest.approx(1)
    assert losses.balance_loss(sure, collapsed, everyone).item() == pytest.approx(experts / choices)
    weight = torch.full((tokens, choices), 1 / choices)
    assert losses.importance_loss(weight, balanced, experts, everyone).item() == pytest.approx(0, abs=1e-6)
    at_collapse = losses.importance_loss(weight, collapsed, experts, everyone).item()
    assert at_collapse == pytest.approx(experts / choices - 1, abs=1e-6)
    if choices >= 2:
        assert losses.second_place_loss(uniform, balanced, everyone).item() == pytest.approx(0.5)
        certain = torch.zeros(tokens, experts)
        certain[:, 0], certain[:, 1] = 0.6, 0.4
        assert losses.second_place_loss(certain, collapsed, everyone).item() == pytest.approx(experts / 2)


@properties
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 6), seeds)
def test_second_place_and_importance_against_the_formulas(experts: int, groups: int, length: int, seed: int) -> None:
    logits, _, mask = random_case(seed, experts, groups, length)
    p = logits.softmax(-1)
    index = p.argsort(-1, descending=True)[:, :2]
    rest, terms = p.detach().double().clone(), []
    for t in range(groups * length):
        rest[t, index[t, 0]] = 0
        rest[t] /= rest[t].sum()
    for g in range(groups):
        rows = [g * length + s for s in range(length) if mask[g, s]]
        if rows:
            second = reference_fractions(index[:, 1:], rows, experts)
            terms.append(0.5 * experts**2 * (second * rest[rows].mean(0)).mean())
    expected = torch.stack(terms).mean() if terms else torch.zeros(())
    found = losses.second_place_loss(p, index, mask)
    assert_close(found, expected, NEAR)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    assert gradient.isfinite().all()
    weight = p.gather(1, index)
    importance = torch.zeros(experts, dtype=torch.float64)
    for t in range(groups * length):
        for k in range(2):
            importance[index[t, k]] += weight[t, k].item() * bool(mask.flatten()[t])
    variation = importance.var(unbiased=False) / (importance.mean() ** 2 + 1e-10)
    assert_close(losses.importance_loss(weight, index, experts, mask), variation, 1e-4)


def test_the_config_chooses_what_balance_counts() -> None:
    ids = token_ids(3, 10)
    found = {}
    for count, after_drop in (("first", False), ("all", False), ("first", True)):
        fields = {"balance_loss_count": count, "balance_loss_after_drop": after_drop}
        model = mixture(capacity_factor=0.5, min_capacity=1, **fields).train()
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        found[count, after_drop] = output.balance_loss
        assert (output.dropped_fraction > 0.1).all()
    assert found["first", True] < 0.8 * found["first", False], "what was dropped is not counted"
    assert difference(found["all", False], found["first", False]) > 0.01


def test_every_loss_that_is_asked_for_is_listed_and_weighted() -> None:
    coefficients = {
        "balance_loss": 0.0,
        "router_z_loss": 0.01,
        "sequence_balance_loss": 0.1,
        "second_place_loss": 0.2,
        "importance_loss": 0.3,
    }
    model = mixture(**{f"{name}_coef": value for name, value in coefficients.items()}).train()
    ids = token_ids()
    output = model(input_ids=ids, labels=ids)
    assert set(output.aux_losses) == set(coefficients)
    expected = sum(value * output.aux_losses[name] for name, value in coefficients.items())
    assert_close(output.loss - output.lm_loss, expected, 1e-4)
    for name in ("sequence_balance_loss", "second_place_loss", "importance_loss"):
        assert router_gradients(model, output.aux_losses[name]).abs().max() > 1e-5, name


def test_layers_of_different_sizes() -> None:
    model = mixture(num_experts=[3, 5], num_experts_per_tok=[1, 4]).train()
    ids = token_ids()
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(24, 3), (24, 5)]
    assert (output.expert_load[0, 3:] == 0).all()
    assert_close(output.expert_load.sum(-1), torch.ones(2), NEAR)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
