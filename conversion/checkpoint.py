"""Checks of checkpoints, before anything is loaded from them, and their configs."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from st_moe.configuration import STMoEConfig

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_checkpoint(source: str | Path, *, needs_weights: bool = True) -> None:
    """Refuse a local folder that is not a whole checkpoint in safetensors; names on the Hub pass.

    Args:
        source: folder, or name on the Hub.
        needs_weights: whether a folder without any weights is refused; weights that are there are always checked.

    Raises:
        ValueError: naming the file, the rule and what to do.
    """
    folder = Path(source)
    if not folder.exists():
        name = str(source)
        if isinstance(source, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ValueError(f"source: must be a checkpoint folder or a name on the Hub, but {source} does not exist")
        return
    if not folder.is_dir():
        raise ValueError(f"source: must be a checkpoint folder, but {source} is a file")
    _check_config(folder)
    for shard in _shards(folder, needs_weights):
        _check_shard(shard)


def dense_config(source: str | Path) -> PreTrainedConfig:
    """Config of a dense checkpoint, a folder or a name on the Hub; code that it brings is never run.

    Raises:
        ValueError: when there is none, it is a mixture's or quantised, or Transformers does not know its family.
    """
    model_type = _saved_config(source).get("model_type")
    if model_type == STMoEConfig.model_type:
        raise ValueError(f"source: must be a dense model, but {source} already is a mixture (model_type 'st_moe')")
    if not model_type or not isinstance(model_type, str):
        raise ValueError(
            f"source: model_type in {source} must be one of Transformers', got {model_type!r}; "
            "write the family of the weights into config.json, such as 'llama'"
        )
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"source: model_type in {source} must be one of Transformers', got {model_type!r}{hint}")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"source: must not be quantised, but config.json in {source} has a quantization_config")
    return config


def mixture_config(source: str | Path) -> STMoEConfig:
    """Config of a saved mixture, a folder or a name on the Hub.

    Raises:
        ValueError: when there is none, or it is not a mixture's.
    """
    saved = _saved_config(source)
    if saved.get("model_type") != STMoEConfig.model_type:
        raise ValueError(
            f"model: {source} must be a mixture (model_type 'st_moe'), got model_type {saved.get('model_type')!r}; "
            "make one of it with `st-moe upcycle`"
        )
    return STMoEConfig.from_dict(saved)


def _saved_config(source: str | Path) -> dict[str, Any]:
    """What config.json says."""
    try:
        found, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"source: {source} is neither a folder here nor a model that the Hub gives: {reason}"
        ) from None
    return found


def _check_config(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"source: must hold config.json, but {folder} does not")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"source: {config} must be JSON, but {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"source: {config} must be a JSON object, got {type(found).__name__}")


def _shards(folder: Path, needed: bool) -> list[Path]:
    """Weight files of a checkpoint, as its index names them; none only if none are needed."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"source: {index} must be a JSON object with a weight_map, but {error!r}") from None
        if not names:
            raise ValueError(f"source: {index} must name at least one file, got an empty weight_map")
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"source: {index} must name files of its own folder, got {name!r}")
            if not (folder / name).is_file():
                raise ValueError(f"source: {index} names {name!r}, which is missing from {folder}")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"source: weights must be safetensors, but {folder} holds pickles ({', '.join(pickles)}), which can run "
            "code when loaded; if you trust them, load with Transformers and save_pretrained() to get safetensors"
        )
    if needed:
        raise ValueError(f"source: must hold model.safetensors or its index, but {folder} holds neither")
    return []


def _check_shard(shard: Path) -> None:
    try:
        with safe_open(shard, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"source: {shard} must be a whole safetensors file, but {error}") from None
