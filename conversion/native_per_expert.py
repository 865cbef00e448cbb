"""Checkpoints with one tensor per expert and projection, for tools that want them.

Names: `<...>.experts.<number>.<gate|up|down>_proj.<weight|bias>`. The model itself holds 3-D tensors and
`from_pretrained` reads their names only, so such a folder is read back by `read_per_expert` or `st-moe import`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init

from st_moe.configuration import STMoEConfig
from st_moe.configuration.configuration_st_moe import installed_version
from st_moe.conversion.checkpoint import check_checkpoint, mixture_config
from st_moe.conversion.native import check_complete, import_native
from st_moe.conversion.native_files import (
    config_of,
    copy_companions,
    destination_of,
    load_mixture,
    new_folder,
    write_folder,
)
from st_moe.modeling import STMoEForCausalLM
from st_moe.modeling.experts import STMoEExperts


def export_per_expert(
    model: STMoEForCausalLM | str | Path,
    destination: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a mixture with one tensor per expert and projection, and all that travels with the source.

    Args:
        model: a mixture, its folder, or its name on the Hub.
        destination: the folder to write; must not exist, unless `overwrite`.
        overwrite: whether an existing destination is replaced, once the new folder is complete.
        max_shard_size: largest weight file, such as `"5GB"`.

    Raises:
        ValueError: when the model or the destination is at fault; nothing is written then.
    """
    source = model if isinstance(model, str | Path) else None
    place = destination_of(destination, source, overwrite)
    config_of(model)
    mixture = load_mixture(model)
    card = (
        f"# {place.name}\n\nMixture of {mixture.config.dense_model_type} with one tensor per expert and projection, "
        f"written by st_moe {installed_version()} and transformers {transformers.__version__}.\n\n**`from_pretrained` "
        "does not read these names** (it would draw new experts). `st-moe import` turns this folder into one that it "
        "reads; `st_moe.conversion.read_per_expert` gives the model.\n"
    )
    with new_folder(place) as folder:
        mixture.config.save_pretrained(folder)
        mixture.generation_config.save_pretrained(folder)
        save_torch_state_dict(_per_expert(mixture), folder, max_shard_size=max_shard_size)
        copy_companions(source, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def read_per_expert(folder: str | Path) -> STMoEForCausalLM:
    """The mixture that `export_per_expert` wrote.

    Raises:
        ValueError: when the folder is none of these, or a tensor is missing, left over or of another shape.
    """
    check_checkpoint(folder)
    config = mixture_config(folder)
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    with init.no_init_weights():
        model = STMoEForCausalLM(config)
    model.tie_weights()
    for name, experts in _tensor_experts(model):
        for key, _ in experts.named_parameters(recurse=False):
            if f"{name}.{key}" in found:
                raise ValueError(
                    f"source: must have one tensor per expert, but {folder} holds a whole {name}.{key}; "
                    "it is what from_pretrained reads already"
                )
            rows = _part_names(name, key, experts.num_experts)
            if all(part in found for row in rows for part in row):
                found[f"{name}.{key}"] = torch.stack([torch.cat([found.pop(part) for part in row]) for row in rows])
    like = model.state_dict()
    # Tied tensors are written once.
    written = {tensor.data_ptr(): name for name, tensor in like.items() if name in found}
    tied = {name: written.get(tensor.data_ptr()) for name, tensor in like.items() if name not in found}
    found |= {name: found[other] for name, other in tied.items() if other is not None}
    check_complete(found, like)
    model.load_state_dict(found, assign=True)
    model.tie_weights()
    model.config.dtype = config.dtype
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def import_checkpoint(
    source: str | Path, destination: str | Path, *, family: str | None = None, overwrite: bool = False
) -> None:
    """Write the mixture that a native checkpoint is, or one of `export_per_expert`, with all that travels with it.

    Args:
        source: a folder or a name on the Hub.
        destination: the folder to write; must not exist, unless `overwrite`.
        family, overwrite: as for `import_native` and `export_native`.

    Raises:
        ValueError: as `import_native`; nothing is written then.
    """
    place = destination_of(destination, source, overwrite)
    check_checkpoint(source)
    own = PreTrainedConfig.get_config_dict(source)[0].get("model_type") == STMoEConfig.model_type
    if own and family is not None:
        raise ValueError(f"family: is for native checkpoints, but {source} is a mixture of st_moe already")
    ours = read_per_expert(source) if own else import_native(source, family)
    config: Any = ours.config
    card = (
        f"Mixture of {config.dense_model_type}, read from {Path(source).name} by st_moe {installed_version()} and "
        f"transformers {transformers.__version__}. `import st_moe`, then AutoModelForCausalLM.from_pretrained."
    )
    write_folder(ours, place, source, card)


def _per_expert(model: STMoEForCausalLM) -> dict[str, Tensor]:
    """A state dict with one tensor per expert and projection, tied tensors once."""
    fused: dict[str, list[list[str]]] = {}
    for name, experts in _tensor_experts(model):
        for key, _ in experts.named_parameters(recurse=False):
            fused[f"{name}.{key}"] = _part_names(name, key, experts.num_experts)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name in fused:
            for row, expert in zip(fused[name], tensor, strict=True):
                found |= {part: piece.clone() for part, piece in zip(row, expert.chunk(len(row)), strict=True)}
        elif tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor.contiguous()
    return found


def _tensor_experts(model: Any) -> list[tuple[str, STMoEExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, STMoEExperts)]


def _part_names(name: str, key: str, num_experts: int) -> list[list[str]]:
    """For each expert the names of the parts of one fused tensor: gate and up, or one alone."""
    kind = "bias" if key.endswith("_bias") else "weight"
    whole = key.removesuffix("_bias")
    parts = ["gate_proj", "up_proj"] if whole == "gate_up_proj" else [whole]
    return [[f"{name}.{number}.{part}.{kind}" for part in parts] for number in range(num_experts)]
