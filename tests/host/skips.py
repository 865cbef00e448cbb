"""Every host test that is skipped, with its reason.

A skip outside of this table fails the test, and so does an entry that is no longer needed (`conftest.py` sees to both).
"""

import importlib.util
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

FAMILIES = ("llama", "gpt2", "qwen3")


@dataclass(frozen=True)
class Skip:
    """One line of the table.

    Attributes:
        tests: names, or shell patterns of names, of test methods.
        reason: why the test does not apply to these models.
        says: for a skip by the host's own code, a part of its message; None when the table skips the test itself,
            because it would pass without having tested anything.
        families: the families that the line is about.
        unless: Python package in whose presence the host runs the test after all.
    """

    tests: tuple[str, ...]
    reason: str
    says: str | None
    families: tuple[str, ...] = FAMILIES
    unless: str | None = None

    def covers(self, test: str, family: str) -> bool:
        """Whether the line is about this test method of this family, in this environment."""
        lifted = self.unless is not None and importlib.util.find_spec(self.unless) is not None
        return not lifted and family in self.families and any(fnmatchcase(test, pattern) for pattern in self.tests)


SKIPS: tuple[Skip, ...] = (
    Skip(
        (
            "test_can_load_with_device_context_manager",
            "test_can_load_with_global_device_set",
            "test_cpu_offload",
            "test_disk_offload_*",
            "test_flash_attn_*",
            "test_flex_attention_with_grads",
            "test_kernels_can_load_without_crashing",
            "test_model_parallelism",
            "test_sdpa_can_compile_dynamic",
            "test_sdpa_can_dispatch_on_flash",
        ),
        reason="needs an accelerator; this suite runs on the CPU",
        says="test requires",
    ),
    Skip(
        ("test_torch_compile_for_training",),
        reason="needs an accelerator, which the host's mark for slow tests hides; tests/modeling compiles full graphs",
        says="test is slow",
    ),
    Skip(
        ("test_resize_*_with_deepspeed*",),
        reason="needs an accelerator and DeepSpeed",
        says="test requires deepspeed",
    ),
    Skip(
        ("test_attn_implementation_composite_models", "test_can_set_attention_dynamically_composite_model"),
        reason="a mixture holds no models within the model",
        says="composite",
    ),
    Skip(
        ("test_sdpa_can_dispatch_composite_models",),
        reason="a mixture holds no models within the model; the host words that like this",
        says="does not support SDPA",
    ),
    Skip(
        ("test_internal_model_config_and_subconfig_are_same",),
        reason="a mixture has one flat config",
        says="No subconfigs",
    ),
    Skip(
        ("test_encoder_decoder_loss_no_double_shift",),
        reason="all families are decoders",
        says="No sequence-to-sequence language modeling head",
    ),
    Skip(
        ("test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",),
        reason="the host looks for output_attentions in the annotation of **kwargs, and the dense family's has none",
        says="Model does not support output_attentions",
        families=("gpt2",),
    ),
    Skip(
        ("test_keep_in_fp32_modules", "test_keep_in_fp32_modules_exist"),
        reason="no weight is pinned to float32: the router computes in float32 from weights of any type",
        says="_keep_in_fp32_modules",
    ),
    Skip(
        ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
        reason="checkpoints hold the model's own keys, so there is no conversion to reverse",
        says="No conversion found",
    ),
    Skip(
        ("test_resize_position_vector_embeddings",),
        reason="no dense family here implements the host's resizing of positions, not even those that learn them",
        says="Model does not have position embeddings",
    ),
    Skip(
        ("test_model_rope_with_partial_rotation",),
        reason="the dense family rotates whole heads",
        says="does not have partial rope",
        families=("llama", "qwen3"),
    ),
    Skip(
        ("test_model_rope_*",),
        reason="the dense family learns its positions",
        says="RoPE",
        families=("gpt2",),
    ),
    Skip(("test_vision_axial_rope",), reason="rotations over images only", says="has no axial RoPE layer"),
    Skip(
        ("test_sliding_window_mask",),
        reason="the dense family attends to everything before a token",
        says="does not support sliding window",
        families=("llama", "gpt2"),
    ),
    Skip(
        ("test_tp_plan_matches_params", "test_tied_head_has_a_tp_plan_entry"),
        reason="the dense family has no tensor-parallel plan to extend",
        says="does not have a TP plan",
        families=("gpt2",),
    ),
    Skip(
        ("test_tp_generation_quantized",),
        reason="quantises through torchao, which nothing here depends on",
        says="requires torchao",
        families=("llama",),
        unless="torchao",
    ),
    Skip(
        ("test_get_*_features_*",),
        reason="would pass empty-handed: it loops over models with other modalities than text, and there are none",
        says=None,
    ),
    Skip(
        ("test_generation_tester_mixin_inheritance",),
        reason="would pass empty-handed: the generation tests that it asks for are not in the source distribution",
        says=None,
    ),
    Skip(
        ("test_save_load_keys_to_ignore_on_save",),
        reason="would pass empty-handed: every key is saved",
        says=None,
    ),
    Skip(
        ("test_training_gradient_checkpointing_use_reentrant_true",),
        reason="refused: reentrant checkpointing cuts the routers off from the gradient of their losses",
        says=None,
    ),
)


def skip_of(test: str, family: str) -> Skip | None:
    """The line about a test method of a family, or None."""
    return next((skip for skip in SKIPS if skip.covers(test, family)), None)


def complaint(test: str, family: str, outcome: Literal["passed", "skipped"], said: str) -> str | None:
    """What is wrong with an outcome, given the table; None when nothing is.

    Args:
        test: name of the test method.
        family: dense family that it ran on.
        outcome: how it ended.
        said: message of the skip.
    """
    skip = skip_of(test, family)
    if outcome == "passed":
        stale = "its line in tests/host/skips.py is stale: delete it"
        return f"{test} ({family}) was not skipped; {stale}" if skip else None
    if skip is None:
        return f"{test} ({family}) was skipped without a line in tests/host/skips.py; the host says: {said}"
    expected = skip.reason if skip.says is None else skip.says
    if expected not in said:
        return (
            f"{test} ({family}) was skipped for another reason than tests/host/skips.py states; the host says: {said}"
        )
    return None
