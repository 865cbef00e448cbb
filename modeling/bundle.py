"""A mixture's code beside its weights: a few flat files, which load without this package.

Transformers loads them with `trust_remote_code=True`, and its ways decide their form. It copies the files that a file
names as `from .name import`, so they lie in one folder. It gives each entry of `auto_map` a folder after the content of
the files it needs, and classes from two folders are strangers to each other, so all Auto classes share one entry.

This lives in the modeling room, not above it, because a model saves itself. It is part of the bundle: what was loaded
from one is saved with its code again. What makes the files from the source of the package is not.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from st_moe.configuration import ROUTER_TYPES, STMoEConfig, check_own_code

_OWN_NAME = "st_moe.modeling.bundle"
_PACKAGE = _OWN_NAME.partition(".")[0]

#: Whether this module is part of a bundle.
IN_BUNDLE = __name__ != _OWN_NAME

#: The file, without its suffix, that `auto_map` names: it knows every class, and imports every other file.
ENTRY = "st_moe_modeling"


def auto_map() -> dict[str, str]:
    """`auto_map` of a bundled config: Auto class -> entry and class."""
    from st_moe.modeling.families import KINDS

    models = {auto_class.__name__: f"{ENTRY}.{public.__name__}" for public, _, auto_class in KINDS}
    return {"AutoConfig": f"{ENTRY}.{STMoEConfig.__name__}", **models}


def write_bundle(folder: str | os.PathLike[str]) -> None:
    """Write the bundle into the folder of a saved mixture, and `auto_map` into the config there, last.

    Raises:
        ValueError: when the folder holds no mixture's config, or one that `check_own_code` refuses; nothing is written.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != STMoEConfig.model_type:
        raise ValueError(f"folder: must hold the config.json of a saved mixture to bundle code, got {folder}")
    # A saved config leaves defaults out.
    check_own_code(*(config.get(name, getattr(STMoEConfig, name)) for name in ("router_type", "dense_model_type")))
    for name, text in bundle_files().items():
        (path.parent / name).write_text(text, encoding="utf-8", newline="\n")
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(config | {"auto_map": auto_map()}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


@lru_cache
def bundle_files() -> dict[str, str]:
    """Name and text of each file of the bundle; a bundle's own files are passed on as they are."""
    if IN_BUNDLE:
        own = sorted(Path(__file__).parent.glob(f"{_PACKAGE}_*.py"))
        return {path.name: path.read_text(encoding="utf-8") for path in own}
    # Called by name, and so no part of a bundle itself.
    concatenation = import_module("st_moe.modeling.concatenation")
    routers = (row.path.rpartition(".")[0] for row in ROUTER_TYPES.values() if row.path.startswith(f"{_PACKAGE}."))
    return concatenation.concatenated([*routers, _OWN_NAME.rpartition(".")[0]])
