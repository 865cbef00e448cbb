"""Folders of exported and imported models: whole or not at all, with all that travels with the source."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import huggingface_hub
from transformers import AutoTokenizer, PreTrainedModel

from st_moe.configuration import STMoEConfig
from st_moe.conversion.checkpoint import check_checkpoint, mixture_config
from st_moe.conversion.folder import _COMPANION_FILES, _check_destination, _names_its_class
from st_moe.conversion.proof import IdentityProof
from st_moe.modeling import STMoEForCausalLM


def config_of(model: STMoEForCausalLM | str | Path) -> STMoEConfig:
    """Config of a mixture with a language-model head, in memory or on disk; no weights are read.

    Raises:
        ValueError: when it is not one.
    """
    if isinstance(model, str | Path):
        check_checkpoint(model)
        config = mixture_config(model)
        heads = config.architectures or ["STMoEForCausalLM"]
    else:
        if not isinstance(model, PreTrainedModel) or not isinstance(model.config, STMoEConfig):
            raise ValueError(f"model: must be a mixture, a folder or a Hub name, got {type(model).__name__}")
        config, heads = model.config, [type(model).__name__]
    if "STMoEForCausalLM" not in heads:
        raise ValueError(f"model: must have a language-model head (STMoEForCausalLM), got {heads[0]}")
    return config


def load_mixture(model: STMoEForCausalLM | str | Path) -> STMoEForCausalLM:
    """A mixture as it is, or loaded in its own dtype.

    Raises:
        ValueError: when the tensors are not those of its config.
    """
    if not isinstance(model, str | Path):
        return model
    loaded: Any = STMoEForCausalLM.from_pretrained(model, dtype="auto", output_loading_info=True)
    mixture, info = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in info.get(fault) or ())
        if names:
            raise ValueError(
                f"model: the tensors of {model} must be those of its config; {fault.replace('_', ' ')}: "
                f"{', '.join(names[:5])}"
            )
    return mixture


def destination_of(destination: str | Path, source: str | Path | None, overwrite: bool) -> Path:
    """The folder to write, once it is clear that it may be written.

    Raises:
        ValueError: when it exists and must not be replaced, or holds the source.
    """
    target = Path(destination).resolve()
    # A model in memory is no folder that could be overwritten.
    _check_destination(target, target / "no source" if source is None else source, overwrite)
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
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


def write_folder(
    model: PreTrainedModel,
    target: Path,
    source: str | Path | None,
    card: str,
    check: Callable[[Path], IdentityProof] | None = None,
) -> IdentityProof | None:
    """Save a model with what travels with its source and a card; the folder appears whole and checked, or not at all.

    Args:
        check: gets the folder before it takes its place; what it returns is returned, and told in the card.
    """
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        copy_companions(source, folder)
        proof = check(folder) if check else None
        line = "" if proof is None else f"\n\nLargest relative logit difference: {proof.max_relative_difference:.1e}."
        (folder / "README.md").write_text(f"# {target.name}\n\n{card}{line}\n", encoding="utf-8")
    return proof


def copy_companions(source: str | Path | None, folder: Path) -> None:
    """Copy tokenizer, chat template, licence and the like; what the folder already holds stays as it is."""
    if source is None:
        return
    place = Path(source)
    if not place.is_dir():
        place = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(_COMPANION_FILES)))
    for path in sorted(path for pattern in _COMPANION_FILES for path in place.glob(pattern)):
        copied = folder / path.relative_to(place)
        inside = place.resolve() in path.resolve().parents or place.parent.name == "snapshots"
        if path.is_file() and inside and not copied.exists():
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)
    has_tokenizer = any(True for _ in folder.glob("tokenizer*"))
    if has_tokenizer and not _names_its_class(folder / "tokenizer_config.json"):
        # The class would be looked up by the model's type, which is another one now.
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
