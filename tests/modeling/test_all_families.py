"""Every entry of Transformers' causal-LM mapping: exact, or refused with the reason; and controls that must fail."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families import (
    FAMILIES,
    TOLERANCE,
    Row,
    category_of,
    dense_of,
    markdown,
    measure,
    refusal_of,
    round_trip_faults,
    sparse_of,
)
from benchmarks.measure import write_table
from benchmarks.tiny_models import dense_model, perturb
from st_moe import STMoEModel, locate_ffns, prove_identity, upcycle
from st_moe.configuration import REFUSED_FAMILIES, dense_model_types
from st_moe.modeling.ffn import LAYOUTS
from st_moe.modeling.routing import losses
from st_moe.modeling.sparse_block import SparseBlock
from tests.families import token_ids

#: What a mixture can be made from: nothing here may fall out of the table without a word.
DENSE = ("dense decoder", "seq2seq decoder", "encoder with LM head", "image model", "mixture")
REASONS = r"composite of several models|no mixture can be made from|another name of"
#: Each of these is found or held in a way that no other of them is.
ODD = ("llama", "bart", "roberta-prelayernorm", "cpmant", "xlm", "prophetnet", "nemotron_h", "zamba", "hrm_text", "mpt")

counted = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older Transformers have fewer families"
)


def blocks(model: PreTrainedModel) -> list[SparseBlock]:
    return [module for module in model.modules() if isinstance(module, SparseBlock)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exact_or_refused_with_the_reason(family: str) -> None:
    row = measure(family)
    if row.difference is None and family in dense_model_types():
        try:
            dense_of(family)
        except RuntimeError as error:
            pytest.skip(f"the dense model of this Transformers cannot be built: {error}")
    if row.difference is None:
        assert re.search(REASONS, row.reason), row
        assert family not in dense_model_types()
        return
    assert row.category in DENSE
    assert row.difference <= TOLERANCE, row
    assert row.round_trip is True, row
    assert row.generation in (True, None), row
    assert (row.generation is None) == (row.category == "image model")


def test_what_is_listed_as_dense_is_measured() -> None:
    assert set(dense_model_types()) <= set(FAMILIES)
    assert not set(REFUSED_FAMILIES) & set(dense_model_types())
    assert len(dense_model_types()) >= 100


@pytest.mark.parametrize("family", ODD)
def test_a_changed_expert_and_a_dropped_tensor_are_seen(family: str) -> None:
    """Negative controls of the table's columns."""
    dense = dense_of(family)
    sparse = sparse_of(dense)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE
    changed = copy.deepcopy(sparse)
    with torch.no_grad():
        for parameter in blocks(changed)[0].experts.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert prove_identity(dense, changed).max_relative_difference > 10 * TOLERANCE
    whole = sparse.state_dict()
    name = next(name for name in whole if ".experts." in name)
    # What is saved; loading makes a model of its own. Layers may share a tensor, so it goes from all of them.
    part = name[name.index(".experts.") :]
    sparse.state_dict = lambda: {key: value for key, value in whole.items() if not key.endswith(part)}
    assert any(name in fault for fault in round_trip_faults(sparse))


def test_the_layers_of_a_decoder_are_counted_not_the_encoders() -> None:
    """Three encoder layers and two decoder layers: the causal language model has the two."""
    dense = dense_of("bart")
    assert dense.config.encoder_layers == 3
    sparse = upcycle(dense, num_experts=2, sparse_layers="last:1", verify=False)
    assert sparse.config.sparse_layer_indices == [1]
    assert [ffn.path for ffn in locate_ffns(dense)] == ["model.decoder.layers.0", "model.decoder.layers.1"]
    with pytest.raises(ValueError, match=r"sparse_layers: must be .* that fit 2 layers, got \[2\]"):
        upcycle(dense, num_experts=2, sparse_layers=[2])


def test_an_encoder_and_a_decoder_in_one_model_are_refused() -> None:
    config = sparse_of(dense_of("bart")).config
    with pytest.raises(ValueError, match=r"encoder\.layers \(3\), decoder\.layers \(2\); use a decoder or an encoder"):
        STMoEModel(config)


def test_two_stacks_are_one_list_of_layers() -> None:
    dense = dense_of("hrm_text")
    assert [ffn.path for ffn in locate_ffns(dense)] == [
        f"model.{stack}_module.layers.{layer}.mlp" for stack in "LH" for layer in range(2)
    ]
    sparse = upcycle(dense, num_experts=2, sparse_layers=[1, 2], verify=False)
    names = [name for name, module in sparse.named_modules() if isinstance(module, SparseBlock)]
    assert names == ["model.L_module.layers.1.mlp", "model.H_module.layers.0.mlp"]
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE


def test_losses_of_layers_that_are_run_several_times_are_means_over_the_runs() -> None:
    """The first of them are run without gradients, so that losses of those alone would train no router."""
    sparse = sparse_of(dense_of("hrm_text"))
    perturb(sparse, seed=2)
    gates = [block.gate for block in blocks(sparse)]
    seen: dict[Any, list[Any]] = {gate: [] for gate in gates}
    for gate in gates:
        gate.register_forward_hook(lambda module, _, routing: seen[module].append(routing))
    ids = token_ids(2, 8)
    output = sparse.train()(input_ids=ids, labels=ids)
    assert [len(seen[gate]) for gate in gates] == [4, 4, 2, 2]
    for name in ("balance_loss", "router_z_loss"):
        layers = [torch.stack([gate.losses(routing)[name] for routing in seen[gate]]).mean() for gate in gates]
        assert torch.allclose(output.aux_losses[name], torch.stack(layers).mean(), rtol=1e-6)
        first = torch.stack([gates[0].losses(seen[gates[0]][0])[name], layers[1], layers[2], layers[3]]).mean()
        assert not torch.allclose(output.aux_losses[name], first, rtol=1e-6)
    loads = [torch.stack([losses.expert_load(routing) for routing in seen[gate]]).mean(0) for gate in gates]
    assert torch.allclose(output.expert_load, torch.stack(loads))
    output.aux_loss.backward()
    assert all(gate.weight.grad.abs().max() > 0 for gate in gates)


def test_widths_that_differ_between_layers_are_kept() -> None:
    for family, widths in {"gemma3n_text": [48, 64], "gemma4_text": [48, 48, 96, 96]}.items():
        dense = dense_of(family)
        found = [ffn.module.down_proj.in_features for ffn in locate_ffns(dense)]
        assert found == widths
        for block, width in zip(blocks(sparse_of(dense)), widths, strict=True):
            first = next(iter(block.experts.parameters()))
            assert width in (first.shape[-1], first.shape[-2] // 2, first.shape[-2])


def test_a_tied_block_stays_tied() -> None:
    sparse = sparse_of(dense_of("zamba"))
    first, second = blocks(sparse)
    assert first.experts.gate_up_proj is second.experts.gate_up_proj
    assert first.gate.weight is second.gate.weight


@pytest.mark.parametrize("layer", [1, 3])
def test_layers_that_share_an_ffn_are_sparse_together(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layers 1, 3 share .*, got {layer} alone"):
        upcycle(dense_of("zamba"), num_experts=2, sparse_layers=[layer])


@counted
def test_mixtures_are_measured_in_mixed_models() -> None:
    """One dense layer and one with experts of the family's own, where the family can have both."""
    mixtures = [family for family in FAMILIES if category_of(family) == "mixture"]
    refused = {family for family in mixtures if refusal_of(family)}
    assert all("each of its layers holds experts of its own" in refusal_of(family) for family in refused)
    able = {
        family: [ffn.storage != "none" for ffn in locate_ffns(dense_of(family))]
        for family in mixtures
        if family not in refused
    }
    assert able.pop("granitemoehybrid") == [True, True]
    assert {tuple(layers) for layers in able.values()} == {(True, False)}
    assert (len(refused), len(able) + 1) == (22, 32)


@counted
def test_seventy_four_dense_decoders_have_code_of_their_own() -> None:
    """The count of the research: those of the table, less what runs another family's code, and one that is refused."""
    rows = [family for family in FAMILIES if category_of(family) == "dense decoder"]
    another = {"internlm3", "iquestcoder", "cohere_compass_text"}
    assert {"gpt_neox", "gpt_neox_japanese"} < set(rows)
    assert len(set(rows) - another | {"zamba2"}) == 74
    assert {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in ("internlm3", "iquestcoder")} == {"LlamaForCausalLM"}


def test_layers_with_experts_of_the_familys_own_stay() -> None:
    dense = dense_model("doge", is_moe=True, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"experts of its own \(DogeCDMoE.num_experts\); no other layer can be either"):
        upcycle(dense, num_experts=2)
    dense = dense_model("gemma4_text", enable_moe_block=True, top_k_experts=2)
    assert {ffn.reason for ffn in locate_ffns(dense)} == {"it holds experts of its own (experts)"}
    types = ["mlp", "moe", "full_attention", "mlp"]
    dense = dense_model("nemotron_h", num_hidden_layers=4, layers_block_type=types)
    with pytest.raises(ValueError, match=r"layer 1: .*; the layers .*sparse_layers=\[0, 3\]"):
        upcycle(dense, num_experts=2, sparse_layers=[0, 1, 3])
    sparse = upcycle(dense, num_experts=2, sparse_layers=[0, 3], verify=False)
    assert prove_identity(dense, sparse).max_relative_difference <= TOLERANCE
    assert not round_trip_faults(sparse)


def test_doges_own_numbers_of_experts_do_not_become_ours() -> None:
    dense = dense_model("doge", num_experts=9)
    sparse = upcycle(dense, num_experts=3, num_experts_per_tok=1, verify=False)
    assert sparse.config.num_experts == 3
    assert sparse.config.dense_config().num_experts == 9


def test_training_a_decoder_of_a_seq2seq_family() -> None:
    sparse = sparse_of(dense_of("bart")).train()
    ids = token_ids()
    output = sparse(input_ids=ids, labels=ids)
    expected = output.lm_loss + 1e-2 * output.balance_loss + 1e-3 * output.router_z_loss
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(block.gate.weight.grad.abs().max() > 0 for block in blocks(sparse))


def test_auto_classes_find_the_decoder_of_a_seq2seq_family(tmp_path: Path) -> None:
    sparse = sparse_of(dense_of("trocr"))
    sparse.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(sparse)


def test_no_two_rows_of_the_layouts_are_alike() -> None:
    assert len({(layout.projections_in, layout.projection_out) for layout in LAYOUTS}) == len(LAYOUTS)


def test_the_page_keeps_its_text_around_the_table(tmp_path: Path) -> None:
    page, rows = tmp_path / "page.md", [Row("llama", "dense decoder", difference=1e-7, round_trip=True)]
    write_table(page, "benchmarks.families", markdown(rows))
    page.write_text(f"Before.\n\n{page.read_text()}\nAfter.\n")
    write_table(page, "benchmarks.families", markdown(rows))
    text = page.read_text()
    assert text.startswith("Before.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert text.count("| llama | dense decoder |") == 1
    assert markdown(rows) in text
