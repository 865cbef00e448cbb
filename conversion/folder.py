"""Upcycling on disk: a dense checkpoint's folder in, a mixture's folder out."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import torch
import transformers
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from st_moe.configuration import MIXTURE_FIELDS, STMoEConfig, family_config
from st_moe.configuration.configuration_st_moe import installed_version
from st_moe.conversion.checkpoint import check_checkpoint, dense_config
from st_moe.conversion.proof import IdentityProof
from st_moe.conversion.recipes import try_recipe
from st_moe.conversion.upcycle import upcycle
from st_moe.modeling import locate_ffns

logger = logging.get_logger(__name__)

# What a checkpoint's folder holds beside weights, config and tokenizer, and what the mixture's folder should keep.
_COMPANION_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*", "chat_template*", "*.jinja")


def upcycle_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: str = "copy",
    recipe_options: Mapping[str, Any] | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    **mixture_fields: Any,
) -> IdentityProof | None:
    """Write the mixture that a dense checkpoint becomes, with its tokenizer, generation config, chat template and card.

    The folder appears whole or not at all. Every argument is checked before weights are read.

    Args:
        source: a local folder or the name of a model on the Hub.
        destination: the folder to write; must not exist, unless `overwrite`.
        recipe, recipe_options, router_std, seed, mixture_fields: as for `upcycle`.
        overwrite: whether an existing destination is replaced, once the new folder is complete.
        max_shard_size: largest weight file, such as `"5GB"`.

    Returns:
        The proof of step-0 identity.

    Raises:
        ValueError: when an argument or the source is at fault; nothing is written then.
    """
    target = Path(destination).resolve()
    _check_destination(target, source, overwrite)
    check_checkpoint(source)
    _rehearse(source, recipe, recipe_options or {}, router_std, mixture_fields)
    with _replacing(target) as folder:
        model = upcycle(
            source, recipe=recipe, recipe_options=recipe_options, router_std=router_std, seed=seed, **mixture_fields
        )
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _copy_companions(source, folder)
        card = _model_card(source, cast(STMoEConfig, model.config), recipe, seed, model.identity_proof)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return model.identity_proof


def _check_destination(target: Path, source: str | Path, overwrite: bool) -> None:
    """Refuse to write over what is there, above all over the source."""
    if Path(source).exists():
        origin = Path(source).resolve()
        if target == origin or origin in target.parents:
            raise ValueError(f"destination: must lie outside of the source {origin}, got {target}")
        if target in origin.parents:
            raise ValueError(f"destination: must not hold the source {origin}, got {target}")
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"destination: must not exist, but {target} does; choose another or pass overwrite")
    if not target.is_dir():
        raise ValueError(f"destination: must be a folder to be overwritten, but {target} is a file")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(f"destination: only a checkpoint is overwritten, but {target} holds no config.json")


def _rehearse(
    source: str | Path, recipe: str, options: Mapping[str, Any], router_std: float, fields: Mapping[str, Any]
) -> None:
    """Upcycle without weights, so that a fault of any argument shows before the weights are read.

    Raises:
        ValueError: when an argument or the dense model is at fault.
    """
    known = {*MIXTURE_FIELDS, *STMoEConfig.attribute_map} - {"dense_model_type", "st_moe_version"}
    for name in fields.keys() - known:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        raise ValueError(f"{name}: is not a field of the mixture" + (f"; did you mean {near[0]!r}?" if near else ""))
    try_recipe(recipe, options)
    config = dense_config(source)
    family_config(config.model_type)
    with torch.device("meta"):
        dense = AutoModel.from_config(config)
    locations = locate_ffns(dense)
    if all(ffn.storage == "none" for ffn in locations):
        raise ValueError(
            f"source: no layer of {source} ({config.model_type}) can be made sparse: {locations[0].reason}"
        )
    upcycle(dense, router_std=router_std, verify=False, **fields)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` at the end of the block; if that fails, nothing stays."""
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    fresh, old = workshop / "fresh", workshop / "old"
    try:
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: the new folder stands in it
                parent.rmdir()


def _copy_companions(source: str | Path, target: Path) -> None:
    """Save the tokenizer and what else travels with a checkpoint."""
    loaders: tuple[Any, ...] = (AutoTokenizer, AutoProcessor)
    for loader in loaders:
        try:
            found = loader.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if loader is AutoTokenizer:
                logger.warning(f"No tokenizer in {source}, so none is written ({type(error).__name__}).")
            continue
        if loader is AutoTokenizer or not isinstance(found, PreTrainedTokenizerBase):
            found.save_pretrained(target)
    folder = Path(source)
    if folder.is_dir():
        for pattern in _COMPANION_FILES:
            for path in folder.glob(pattern):
                if path.is_file() and not path.is_symlink() and not (target / path.name).exists():
                    shutil.copyfile(path, target / path.name)


def _model_card(source: str | Path, config: STMoEConfig, recipe: str, seed: int, proof: IdentityProof | None) -> str:
    """Model card in the Hub's format."""
    experts, choices = (", ".join(map(str, dict.fromkeys(sizes))) for sizes in zip(*config.layer_sizes, strict=True))
    total, active = (config.num_parameters(active=active) for active in (False, True))
    local = Path(source).exists()
    parent = Path(source).resolve().name if local else str(source)
    # The Hub knows no folder of this machine, so only a name of its own is linked.
    link = "" if local else f"base_model: {parent}\n"
    return f"""---
library_name: transformers
tags: [st_moe, mixture-of-experts, upcycled]
{link}---

# Mixture of experts, upcycled from {parent}

| | |
|---|---|
| dense family | {config.dense_model_type} |
| experts per sparse layer | {experts}, of which {choices} per token |
| sparse layers | {len(config.sparse_layer_indices)} of {config.num_hidden_layers} |
| parameters | {total:,}, of which {active:,} active per token |
| recipe | `{recipe}`, seed {seed} |
| proof | {proof or "not measured"} |
| made with | st_moe {installed_version()}, transformers {transformers.__version__} |

```python
import st_moe
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
