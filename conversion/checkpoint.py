"""Checks of checkpoints on disk, before anything is loaded from them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_checkpoint(source: str | Path) -> None:
    """Refuse a local folder that is not a whole checkpoint in safetensors; names on the Hub pass.

    Raises:
        ValueError: naming the file, the rule and what to do.
    """
    folder = Path(source)
    if not folder.exists():
        if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
            raise ValueError(f"source: must be a checkpoint folder or a name on the Hub, but {source} does not exist")
        return
    if not folder.is_dir():
        raise ValueError(f"source: must be a checkpoint folder, but {source} is a file")
    _check_config(folder)
    shards = _shards(folder)
    for shard in shards:
        _check_shard(shard)


def _check_config(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"source: must hold config.json, but {folder} does not")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"source: {config} must be JSON, but {error}") from None


def _shards(folder: Path) -> list[Path]:
    """Weight files of a checkpoint, as its index names them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"source: {index} must be a JSON object with a weight_map, but {error!r}") from None
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
    raise ValueError(f"source: must hold model.safetensors or its index, but {folder} holds neither")


def _check_shard(shard: Path) -> None:
    try:
        with safe_open(shard, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"source: {shard} must be a whole safetensors file, but {error}") from None
