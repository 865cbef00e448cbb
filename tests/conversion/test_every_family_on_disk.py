"""Every family of the table goes from a dense folder to that of a mixture, which computes the dense function."""

from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from benchmarks.families import FAMILIES, IMAGE_MODELS, TOLERANCE, category_of, dense_of, measure, refusal_of
from st_moe import locate_ffns
from st_moe.conversion import from_disk, upcycle_checkpoint
from st_moe.conversion.folder import plan_checkpoint

#: Of these, a module reads weights of another, so that they run with all but their layers in memory.
PARTLY_IN_MEMORY = {"llama4_text", "prophetnet", "siglip", "siglip_vision_model"}
CONVERTIBLE = [
    family
    for family in FAMILIES
    if family in IMAGE_MODELS or not (category_of(family) == "alias" or refusal_of(family))
]


@pytest.mark.parametrize("family", CONVERTIBLE)
def test_a_folder_becomes_a_mixtures_folder(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(from_disk.logger, "propagate", True)
    try:
        dense = dense_of(family)
    except Exception:
        if Version(transformers.__version__) >= Version("5.23"):
            raise
        pytest.skip(f"this Transformers cannot build its own {family}: {measure(family).reason}")
    dense.save_pretrained(tmp_path / "dense")
    able = [ffn.layer for ffn in locate_ffns(dense) if ffn.storage != "none"]
    plan = plan_checkpoint(tmp_path / "dense", num_experts=4, sparse_layers=able)
    proof = upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=4, sparse_layers=able)
    assert plan.num_bytes == (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert proof is not None
    assert proof.max_relative_difference <= TOLERANCE
    assert ("Run with all but the layers in memory" in caplog.text) == (family in PARTLY_IN_MEMORY)
    assert "Run with everything" not in caplog.text


def test_hardly_any_is_left_out() -> None:
    assert len(CONVERTIBLE) > 130
