"""Several fine-tuned models of one architecture: whether they go together, and the rest that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from st_moe.conversion.tensor_files import mean_of

# Fields of a config that say nothing of what its model computes from token ids.
_MAY_DIFFER = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "transformers_version",
    "use_cache",
)
_MOST_SHOWN = 5


def check_compatible(
    configs: Sequence[PreTrainedConfig], tensors: Sequence[Mapping[str, tuple[Sequence[int], torch.dtype]]]
) -> None:
    """Refuse models that are not of one architecture: config field by field, tensor by tensor.

    Args:
        configs: one per model.
        tensors: of each model, shape and dtype of every tensor by name.

    Raises:
        ValueError: with the first differences of every model from the first one.
    """
    faults = []
    first_fields = _compared(configs[0])
    for number, (config, own) in enumerate(zip(configs, tensors, strict=True)):
        fields = _compared(config)
        pairs: list[tuple[str, Any, Any]] = [
            (name, first_fields.get(name), fields.get(name)) for name in first_fields | fields
        ]
        pairs += [(name, _shown(tensors[0].get(name)), _shown(own.get(name))) for name in {**tensors[0], **own}]
        faults += [f"model {number}: {name} is {got}, not {wanted}" for name, wanted, got in pairs if wanted != got]
    if faults:
        more = f"\n- and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
        raise ValueError(
            "models: must be fine-tuned from one model, to be merged, but they differ from the first in\n- "
            + "\n- ".join(faults[:_MOST_SHOWN])
            + more
        )


def merged(tensors: Sequence[Tensor], rest: str) -> Tensor:
    """What becomes of a tensor outside of the experts: the models' mean, taken in float32 or wider, or the first's.

    Args:
        tensors: one per model, of one shape and dtype.
        rest: `"average"` or `"first"`.
    """
    return tensors[0].clone() if rest == "first" or len(tensors) == 1 else mean_of(tensors)


def _compared(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _MAY_DIFFER}


def _shown(tensor: tuple[Sequence[int], torch.dtype] | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor[1]).removeprefix('torch.')} {list(tensor[0])}"
