"""The presets of published recipes, on tiny models of the architectures that they are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from st_moe import DYNMOE_PHI2, DYNMOE_QWEN2, DYNMOE_STABLELM, AdaptiveExperts, STMoEConfig, upcycle
from st_moe.modeling.routing.top_any import TopAnyRouter
from tests.families import TOLERANCE, dense_model, tiny_config, token_ids


@pytest.mark.parametrize(
    ("family", "preset"),
    [("stablelm", DYNMOE_STABLELM), ("qwen2", DYNMOE_QWEN2), ("phi", DYNMOE_PHI2)],
    ids=["stablelm", "qwen2", "phi"],
)
def test_dynmoe(family: str, preset: Mapping[str, Any], tmp_path: Path) -> None:
    dense = dense_model(family, num_hidden_layers=5)
    model = upcycle(dense, **preset)
    assert model.identity_proof.max_relative_difference <= TOLERANCE
    assert model.config.sparse_layer_indices == [0, 2, 4]
    routers = [module for module in model.modules() if isinstance(module, TopAnyRouter)]
    assert [router.active_experts.tolist() for router in routers] == [[True, True, False, False]] * 3
    assert "gate" not in dict(model.model.layers[1].mlp.named_children()), "the layers between stay dense"
    # Trained as published: the FFNs of all layers, dense and sparse, with their gates.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    adaptive, ids = AdaptiveExperts(record_every=1, update_every=2), token_ids(4, 12)
    adaptive.start(model.train())
    for _ in range(4):
        output = model(input_ids=ids, labels=ids)
        assert set(output.aux_losses) == {
            "diversity_loss",
            "simplicity_loss",
            "top_any_balance_loss",
            "efficiency_loss",
        }
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        adaptive.step(model, optimizer)
    assert all(1 <= router.active_experts.sum() <= 4 for router in routers)
    assert [router.active_experts.tolist() for router in routers] != [[True, True, False, False]] * 3, "it adapts"
    small = model.eval().prune_experts()
    with torch.no_grad():
        assert (small(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
    small.save_pretrained(tmp_path)
    assert STMoEConfig.from_pretrained(tmp_path).num_experts == small.config.num_experts


def test_a_preset_is_fields_and_cannot_be_changed() -> None:
    config = STMoEConfig.from_dense(tiny_config("stablelm"), **{**DYNMOE_STABLELM, "num_experts": 6})
    assert (config.num_experts, config.initial_experts, config.router_type) == (6, 2, "top_any")
    with pytest.raises(TypeError):
        DYNMOE_STABLELM["num_experts"] = 5  # type: ignore[index]
