"""Stands in for the host's list of common config values, which its source distribution leaves out."""

config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "eos_token_id": 8,
    "bos_token_id": 6,
    "pad_token_id": 7,
    "id2label": {0: "zero", 1: "one", 2: "two"},
    "label2id": {"zero": 0, "one": 1, "two": 2},
    "is_encoder_decoder": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
"""A value other than the default for each field that every config of the host has."""
