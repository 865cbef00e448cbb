"""Checks of checkpoints, before anything is loaded from them, and their configs."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from st_moe.configuration import STMoEConfig
from st_moe.conversion.tensor_files import (
    StoredTensor,
    read_header,
    without_duplicates,
)

#: What a config that contradicts itself ends in, inside of the host's code.
CONFIG_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

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
    checkpoint_tensors(folder, needed=needs_weights)


def checkpoint_tensors(folder: Path, needed: bool = True) -> dict[str, StoredTensor]:
    """Where each tensor of a checkpoint lies, by its name in the checkpoint; only headers are read.

    Args:
        folder: of the checkpoint.
        needed: whether a folder without any weights is refused.

    Raises:
        ValueError: when files and index are not whole, or do not agree.
    """
    listed = _index(folder)
    names = sorted(set(listed.values())) if listed else _single(folder, needed)
    found: dict[str, StoredTensor] = {}
    for name in names:
        for key, tensor in read_header(_inside(folder, name)).items():
            if key in found:
                both = f"{Path(found[key].path).name} and {name}"
                raise ValueError(f"source: a tensor must be stored once, but {both} in {folder} both hold {key!r}")
            found[key] = tensor
    for key, name in (listed or {}).items():
        if key not in found or Path(found[key].path).name != name:
            raise ValueError(f"source: {folder / INDEX_NAME} says that {name!r} holds {key!r}, which it does not")
    return found


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
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except CONFIG_FAULTS as error:
        raise ValueError(
            f"source: config.json in {source} must be one of the family {model_type!r}, but {type(error).__name__}: "
            f"{error}"
        ) from None
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
    if not config.exists():
        raise ValueError(f"source: must hold config.json, but {folder} does not")
    if not isinstance(_read_json(_inside(folder, "config.json")), dict):
        raise ValueError(f"source: {config} must be a JSON object, got {type(_read_json(config)).__name__}")


def _read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint says.

    Raises:
        ValueError: when it is none, or names something twice.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except OSError as error:
        raise ValueError(f"source: {path} must be a readable file, but {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"source: {path} must be JSON, but {error}") from None


def _inside(folder: Path, name: str) -> Path:
    """A file of a checkpoint, which may be a link only to a file of the same folder or of the Hub's cache.

    Raises:
        ValueError: when it is missing, no file, or a link that leads elsewhere.
    """
    path = folder / name
    # In the Hub's cache the files of `<model>/snapshots/<revision>` are links into `<model>/blobs`.
    cache = folder.absolute().parent.parent / "blobs" if folder.absolute().parent.name == "snapshots" else folder
    homes = {folder.resolve(), cache.resolve()}
    if path.is_symlink() and not homes & set(path.resolve().parents):
        raise ValueError(f"source: {path} must lie in its own folder, but is a link to {path.resolve()}")
    if not path.exists():
        raise ValueError(f"source: {folder} must hold {name!r}, which its index names, but the file is missing")
    if not path.is_file():
        raise ValueError(f"source: {path} must be a file, but is none")
    return path


def _index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the checkpoint's index says; None without an index."""
    index = folder / INDEX_NAME
    if not index.exists() and not index.is_symlink():
        return None
    found = _read_json(_inside(folder, INDEX_NAME))
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict):
        raise ValueError(f"source: {index} must be a JSON object with a weight_map, but it is not")
    if not listed:
        raise ValueError(f"source: {index} must name at least one file, got an empty weight_map")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"source: {index} must name safetensors files of its own folder, got {name!r}")
        if not (folder / name).exists():
            raise ValueError(f"source: {index} names {name!r}, which is missing from {folder}")
    return listed


def _single(folder: Path, needed: bool) -> list[str]:
    """The one weight file of a checkpoint without an index, as a list; empty only if none is needed."""
    single = folder / WEIGHTS_NAME
    if single.exists() or single.is_symlink():
        return [WEIGHTS_NAME]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"source: weights must be safetensors, but {folder} holds pickles ({', '.join(pickles)}), which can run "
            'code when loaded; if you trust them, convert them with: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}, dtype='auto', use_safetensors=False)"
            ".save_pretrained('converted')\""
        )
    if needed:
        raise ValueError(f"source: must hold {WEIGHTS_NAME} or its index, but {folder} holds neither")
    return []
