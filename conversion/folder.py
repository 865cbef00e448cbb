"""Upcycling on disk: a dense checkpoint's folder in, a mixture's folder out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import transformers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from st_moe.configuration import STMoEConfig
from st_moe.configuration.configuration_st_moe import installed_version
from st_moe.conversion.proof import IdentityProof
from st_moe.conversion.upcycle import upcycle

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

    The folder appears whole or not at all.

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
    target = Path(destination)
    if target.exists() and not overwrite:
        raise ValueError(f"destination: must not exist, but {target} does; choose another or pass overwrite")
    if target.resolve() == Path(source).resolve():
        raise ValueError(f"destination: must not be the source, got {target}")
    model = upcycle(
        source, recipe=recipe, recipe_options=recipe_options, router_std=router_std, seed=seed, **mixture_fields
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _copy_companions(source, partial)
        card = _model_card(str(source), cast(STMoEConfig, model.config), recipe, seed, model.identity_proof)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model.identity_proof


def _copy_companions(source: str | Path, target: Path) -> None:
    """Save the tokenizer and what else travels with a checkpoint."""
    loaders: tuple[Any, ...] = (AutoTokenizer, AutoProcessor)
    for loader in loaders:
        try:
            found = loader.from_pretrained(source)
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


def _model_card(source: str, config: STMoEConfig, recipe: str, seed: int, proof: IdentityProof | None) -> str:
    """Model card in the Hub's format."""
    total, active = (config.num_parameters(active=active) for active in (False, True))
    return f"""---
library_name: transformers
tags: [st_moe, mixture-of-experts, upcycled]
base_model: {Path(source).name if Path(source).exists() else source}
---

# Mixture of experts, upcycled from {Path(source).name if Path(source).exists() else source}

| | |
|---|---|
| dense family | {config.dense_model_type} |
| experts per sparse layer | {config.num_experts}, of which {config.num_experts_per_tok} per token |
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
