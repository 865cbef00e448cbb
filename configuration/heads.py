"""Which of Transformers' Auto classes builds the model of a config, dense or sparse."""

from typing import Any

from transformers import PreTrainedConfig

# Heads that a config may name, in `architectures`.
_NAMED = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
# Heads of families whose configs name none, the first that a family has.
_USUAL = {
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "ForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}


def auto_class_of(config: PreTrainedConfig) -> Any:
    """The Auto class of the head that a config names; if none, of the usual head of its family, language or images."""
    # They take their time, and a config alone does not need them.
    import transformers

    named = (head for head in _NAMED if any(name.endswith(head) for name in config.architectures or ()))
    usual = (head for head, mapping in _USUAL.items() if type(config) in getattr(transformers, mapping))
    return getattr(transformers, f"AutoModel{next(named, None) or next(usual, '')}")
