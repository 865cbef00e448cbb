"""What the host's test classes need from a model family: tiny configs, inputs, class names, and the skip table."""

from typing import Any, ClassVar
from unittest import mock

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from st_moe import STMoEConfig
from st_moe.modeling import family_of

from .fetch import install
from .skips import complaint

install()

TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {**TOKENS, **ROTARY},
    "qwen3": {**TOKENS, **ROTARY, "head_dim": 8},
    # The old-style family: of all dense families it shares least with llama. Its FFN is ungated, with biases and
    # transposed weights (Conv1D), positions are learnt, embeddings are tied, the decoder is called `transformer.h`, and
    # its config has other names for the sizes. gpt_neox differs from llama in the FFN and the fused attention only.
    "gpt2": {**TOKENS, "n_embd": 32, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
"""Fields of the smallest config that still exercises a family. An odd vocabulary makes tensor parallelism shard
unevenly; expert widths are multiples of 16 bytes in half precision, which `grouped_mm` asks for."""

MIXTURE_FIELDS = {"num_experts": 4, "num_experts_per_tok": 2}

# The host's tests ask these tables, by class name, whether a class is a base model and which labels it takes.
CLASS_NAMES = {
    "MODEL_MAPPING_NAMES": "STMoEModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "STMoEForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "STMoEForSequenceClassification",
}

# What tests said that skipped a part of themselves and went on (`subTest`), by class and method; their outcome alone
# would look like a full pass.
PARTLY_SKIPPED: dict[tuple[str, str], str] = {}


class HostModelTester:
    """The object that the host's tests ask for configs, inputs and sizes."""

    batch_size = 13
    seq_length = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    num_labels = 3
    type_sequence_label_size = 2
    is_training = True

    def __init__(self, family: str) -> None:
        self.fields = {"dense_model_type": family, **FAMILY_FIELDS[family], **MIXTURE_FIELDS}
        classes = family_of(family)
        self.base_model_class = classes.STMoEModel
        self.causal_lm_class = classes.STMoEForCausalLM
        self.sequence_classification_class = classes.STMoEForSequenceClassification

    @property
    def all_model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return self.base_model_class, self.causal_lm_class, self.sequence_classification_class

    def get_config(self) -> STMoEConfig:
        return STMoEConfig(**self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """A config and inputs with padding on the right in most rows: input_ids and attention_mask, both [B, S]."""
        config = self.get_config()
        # Ids of padding, start and end have rules of their own in generation and classification.
        input_ids = torch.randint(3, config.vocab_size, (self.batch_size, self.seq_length))
        return config, {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class HostCase:
    """First base of every test class here, before the host's mixins and `unittest.TestCase`."""

    family: ClassVar[str]
    # The host's mixins declare it abstract, and pytest passes over abstract classes without a word.
    model_tester: HostModelTester | None = None
    # Off by default for model files older than 2023, which ours are not.
    test_can_init_all_missing_weights_before_2023 = True

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        for table, class_name in CLASS_NAMES.items():
            names = mock.patch.dict(getattr(modeling_auto, table), {STMoEConfig.model_type: class_name})
            names.start()
            cls.addClassCleanup(names.stop)

    def setUp(self) -> None:
        self.model_tester = HostModelTester(self.family)
        self.all_model_classes = self.model_tester.all_model_classes

    def skipTest(self, reason: str) -> None:  # noqa: N802  (unittest's name)
        """Skip as the table allows it; anything else is a failure."""
        name = self._testMethodName
        problem = complaint(name, self.family, "skipped", reason)
        if problem is not None:
            self.fail(problem)
        PARTLY_SKIPPED[type(self).__name__, name] = reason
        super().skipTest(reason)
