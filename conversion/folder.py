"""Upcycling on disk: a dense checkpoint's folder in, a mixture's folder out, without ever holding the model."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor
from transformers.utils import logging

from st_moe.configuration import ROUTER_TYPES, STMoEConfig, check_own_code
from st_moe.conversion.card import faults_of, model_card
from st_moe.conversion.checkpoint import check_checkpoint, dense_config
from st_moe.conversion.processes import Steps, in_a_child_if_light, only_run, steps_in_a_child_if_light
from st_moe.conversion.streaming import Journal, Plan, write_shards
from st_moe.conversion.writing import checkpoint_of_progress, sync_folder

if TYPE_CHECKING:
    # Model classes would take more memory than the conversion itself.
    from transformers import PreTrainedTokenizerBase

    from st_moe.conversion.proof import IdentityProof
    from st_moe.conversion.router_init import Text

logger = logging.get_logger(__name__)

# What a checkpoint's folder holds beside weights and config, and what the mixture's folder should keep.
_COMPANION_FILES = (
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*processor*.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_WORKSHOP_FILES = {"model", "fresh", "journal.jsonl", "journal.new", "offload", "computed", "replaced"}


def upcycle_checkpoint(
    source: str | Path | Sequence[str | Path],
    destination: str | Path,
    *,
    recipe: str = "copy",
    recipe_options: Mapping[str, Any] | None = None,
    router_std: float = 0.02,
    router_init: str = "normal",
    router_options: Mapping[str, Any] | None = None,
    router_texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    verify: bool = True,
    proof_text: str | None = None,
    require_identity: float | None = None,
    bundle_code: bool = False,
    push_to_hub: str | None = None,
    **mixture_fields: Any,
) -> IdentityProof | None:
    """Write the mixture that a dense checkpoint becomes, with its tokenizer, generation config, chat template and card.

    Weights are read and written tensor by tensor; one layer's experts are in memory at most. Everything is written to
    `<destination>.partial`, which takes the destination's place when it is complete. A run that was stopped in any way
    goes on when it is called again with the same arguments, and ends in the same bytes.

    Tensors that a family's checkpoints hold otherwise than its models do, such as experts one by one, are computed
    first, one at a time, and lie in `<destination>.partial` for a while.

    For the proof both models run on the same tokens, one after the other and module by module, so that it takes no more
    memory than the conversion and the model classes. So does the dense model for routers that start from text.

    Args:
        source: a local folder or the name of a model on the Hub; for the recipe `"merge"` a list of them.
        destination: the folder to write; must not exist, unless `overwrite`.
        recipe, recipe_options, router_std, router_init, router_options, router_texts, seed, mixture_fields: as for
            `upcycle`.
        tokenizer: for texts; None takes the source's.
        overwrite: whether an existing destination is replaced, once the new folder is complete.
        max_shard_size: largest weight file, such as `"5GB"`.
        verify: whether step 0 is compared with the dense model.
        proof_text: text to compare on, at most its first 512 tokens; None takes a text of this package, or random
            tokens where the source has no tokenizer.
        require_identity: largest relative difference that is accepted; None accepts any where none is promised.
        bundle_code: also write the code that the mixture runs on, so that the folder loads where this package is not
            installed, with `trust_remote_code=True`.
        push_to_hub: name of the repository on the Hub to upload the folder to.

    Returns:
        The proof of step-0 identity, or None without `verify`.

    Raises:
        ValueError: when an argument or the source is at fault, or the difference is larger than `require_identity`;
            the destination is untouched then.
        OSError: when the disk is full, or a step is killed, as for want of memory; calling again goes on.
        RuntimeError: when the mixture should compute the dense function and does not.
    """
    target = Path(destination).resolve()
    sources = [source] if isinstance(source, str | Path) else list(source)
    workshop = target.with_name(f"{target.name}.partial")
    if require_identity is not None and not (verify and require_identity >= 0):
        raise ValueError(
            f"require_identity: must not be negative, and needs verify=True, got {require_identity!r} and {verify}"
        )
    if proof_text is not None and not verify:
        raise ValueError("proof_text: needs verify=True, got verify=False")
    if bundle_code:
        _check_code(sources[0], mixture_fields)
    with only_run(target), _explaining_a_full_disk(workshop):
        _tidy(workshop, target)
        for one in sources:
            _check_destination(target, one, overwrite)
        request = _request(
            sources,
            recipe=recipe,
            recipe_options=recipe_options,
            router_std=router_std,
            router_init=router_init,
            router_options=router_options,
            router_texts=router_texts,
            tokenizer=tokenizer,
            seed=seed,
            max_shard_size=max_shard_size,
            verify=verify,
            proof_text=proof_text,
            **mixture_fields,
        )
        with (
            _clearing(workshop / "offload"),
            steps_in_a_child_if_light(_steps_with_models, sources, workshop, request) as steps,
        ):
            plan = next(steps)
            workshop.mkdir(parents=True, exist_ok=True)
            journal = Journal(workshop, plan.digest + (" with code" if bundle_code else ""))
            _check_room(plan, workshop, journal)
            if not verify:
                steps.close()
            elif not plan.computed:  # which the dense model would need once more, on the disk and in memory
                steps.begin()
            journal.non_finite = in_a_child_if_light(_write_weights, plan, workshop, journal)
            (workshop / "computed").unlink(missing_ok=True)
            folder = workshop / "model"
            _write_texts(plan, folder)
            proof = _proof(steps) if verify else None
        if proof is not None:
            print(proof)  # noqa: T201 -- the proof is part of what the caller asked for
            with _keeping_nothing(workshop):
                _judge(proof, plan, journal, require_identity)
        card = model_card(sources, plan, seed, proof, journal.non_finite, bundle_code)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if bundle_code:
            _write_code(folder)
        _exchange(workshop, target)
        checkpoint_of_progress("tidy")
        shutil.rmtree(workshop)
    if push_to_hub:
        _push(target, push_to_hub)
    return proof


def plan_checkpoint(source: str | Path | Sequence[str | Path], **settings: Any) -> Plan:
    """What `upcycle_checkpoint` would write, after every check of its arguments and of the source; writes nothing.

    Args:
        source: as there.
        settings: those arguments of it that say how experts and routers are made and written, and `verify`.

    Raises:
        ValueError: when an argument or the source is at fault.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    return in_a_child_if_light(_plan, sources, None, _request(sources, **settings))


def _request(
    sources: Sequence[str | Path],
    *,
    recipe: str = "copy",
    recipe_options: Mapping[str, Any] | None = None,
    router_std: float = 0.02,
    router_init: str = "normal",
    router_options: Mapping[str, Any] | None = None,
    router_texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    max_shard_size: str = "5GB",
    verify: bool = True,
    proof_text: str | None = None,
    **mixture_fields: Any,
) -> dict[str, Any]:
    """What a plan is made of, after the checks that need no model classes."""
    if not sources or (len(sources) > 1 and recipe != "merge"):
        raise ValueError(f"source: must be one model with recipe {recipe!r}, got {len(sources)}; 'merge' takes several")
    for one in sources:
        check_checkpoint(one)
    return {
        "recipe": recipe,
        "recipe_options": recipe_options or {},
        "router_std": router_std,
        "router": (router_init, router_options or {}, router_texts, tokenizer),
        "verify": verify,
        "proof_text": proof_text,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "fields": mixture_fields,
    }


def _steps_with_models(sources: Sequence[str | Path], workshop: Path, request: Mapping[str, Any]) -> Iterator[Any]:
    """What needs model classes: the plan; nothing, when the dense model has run; the proof, of what is written then."""
    plan = _plan(sources, workshop / "fresh", request)
    yield plan
    from st_moe.conversion.from_disk import compare_folder, run_dense

    reference = run_dense(plan.sources[0], workshop, request["proof_text"])
    yield None
    yield compare_folder(reference, workshop / "model")


def _plan(sources: Sequence[str | Path], fresh: Path | None, request: Mapping[str, Any]) -> Plan:
    """The plan, and in a file beside it, if one is given, the parts that no recipe makes, see `make_plan`."""
    from st_moe.conversion.plan import Models, make_plan
    from st_moe.conversion.router_init import RouterStart, check_router_init

    others = dict(request)
    start = RouterStart(*others.pop("router"))
    check_router_init(*start[:3])
    folders = []
    for source in sources:
        if not Path(source).exists():
            # What can be wrong with the request shows before gigabytes are fetched.
            Models(source, request["recipe"], request["recipe_options"], request["fields"])
            patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *_COMPANION_FILES]
            source = huggingface_hub.snapshot_download(str(source), allow_patterns=patterns)
            check_checkpoint(Path(source))
        folders.append(Path(source).absolute())
    if start.tokenizer is None and not all(isinstance(text, Tensor) for text in start.texts or ()):
        start = start._replace(tokenizer=_tokenizer(folders[0]))
    return make_plan(folders, fresh, router_start=start, **others)


def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; code that it brings is never run.

    Raises:
        ValueError: when there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"source: must hold a tokenizer that can be read, but {source} does not: {reason}") from None


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


def _tidy(workshop: Path, target: Path) -> None:
    """Put right what a run left that was killed during its very last steps; refuse a workshop that is none."""
    if not workshop.exists():
        return
    if not workshop.is_dir() or {path.name for path in workshop.iterdir()} - _WORKSHOP_FILES:
        raise ValueError(f"destination: {workshop} is needed for work and holds something else; move it away")
    shutil.rmtree(workshop / "offload", ignore_errors=True)
    if (workshop / "replaced").exists() and not target.exists():
        (workshop / "replaced").rename(target)
    if target.exists() and not (workshop / "model").exists():
        shutil.rmtree(workshop)


@contextmanager
def _explaining_a_full_disk(workshop: Path) -> Iterator[None]:
    """Say in one line what to do about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"destination: the disk of {workshop} is full; make room and run the same command again, which goes on "
            "from what is complete"
        ) from None


@contextmanager
def _clearing(folder: Path) -> Iterator[None]:
    """Remove a folder after the block, in which a process that fills it may be killed."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _keeping_nothing(workshop: Path) -> Iterator[None]:
    """Remove the workshop if the block fails: what is not wanted is not gone on with."""
    try:
        yield
    except BaseException:
        shutil.rmtree(workshop)
        raise


def _check_room(plan: Plan, workshop: Path, journal: Journal) -> None:
    """Refuse to start what the disk cannot hold."""
    needed = plan.num_bytes - sum(line["size"] for line in journal.finished.values())
    free = shutil.disk_usage(workshop).free
    if needed > free:
        raise OSError(f"destination: {needed:,} bytes are to be written, but the disk of {workshop} has {free:,} free")


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar with bytes, rate and remaining time on a terminal; yields the function that moves it on."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=total)
        yield lambda count: progress.advance(task, count)


def _write_weights(plan: Plan, workshop: Path, journal: Journal) -> dict[str, int]:
    """Write the files of weights tensor by tensor; what comes back is `Journal.non_finite`."""
    with _progress(plan.num_bytes) as advance:
        write_shards(plan, workshop, journal, advance)
    if journal.non_finite:
        logger.warning(f"{', '.join(plan.sources)}: weights are NaN or infinite: {faults_of(journal.non_finite)}.")
    return journal.non_finite


def _write_texts(plan: Plan, folder: Path) -> None:
    """Write the configs, and keep the tokenizer and what else travels with a checkpoint."""
    for path in folder.iterdir():
        if path.name not in {shard.name for shard in plan.shards}:  # left by a run that was stopped
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, text in plan.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    _copy_companions(plan.sources[0], folder)


def _check_code(source: str | Path, fields: Mapping[str, Any]) -> None:
    """Refuse code that could not travel; what else is wrong with the request is for the plan to say."""
    router_type = fields.get("router_type", STMoEConfig.router_type)
    if router_type in tuple(ROUTER_TYPES):
        check_own_code(router_type, dense_config(source).model_type)


def _write_code(folder: Path) -> None:
    from st_moe.modeling.bundle import write_bundle

    write_bundle(folder)


def _copy_companions(source: str | Path, target: Path) -> None:
    """Keep the tokenizer and what else travels with a checkpoint's folder as it is."""
    folder = Path(source).absolute()
    homes = {folder.resolve(), folder.parent.parent.resolve() / "blobs"}
    for path in sorted(path for pattern in _COMPANION_FILES for path in folder.glob(pattern)):
        if path.is_file() and homes & set(path.resolve().parents):
            copied = target / path.relative_to(folder)
            copied.parent.mkdir(exist_ok=True)
            checkpoint_of_progress("copy")
            shutil.copyfile(path, copied)
    if not any(True for pattern in _TOKENIZER_FILES for _ in target.glob(pattern)):
        logger.warning(f"No tokenizer in {source}, so none is written.")
    elif not _names_its_class(target / "tokenizer_config.json"):
        # The class would be looked up by the model's type, which is another one now.
        in_a_child_if_light(_keep_tokenizer, source, target)


def _keep_tokenizer(source: str | Path, target: Path) -> None:
    _tokenizer(source).save_pretrained(target)


def _names_its_class(config: Path) -> bool:
    """Whether a tokenizer's config says which class it is for."""
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class"))
    except (OSError, ValueError, AttributeError):
        return False


def _proof(steps: Steps) -> IdentityProof:
    """The last two of `_steps_with_models`: how far the written mixture is from the dense model."""
    console = Console(stderr=True)
    with console.status("proof: both models, from the disk") if console.is_terminal else nullcontext():
        next(steps)
        return next(steps)


def _judge(proof: IdentityProof, plan: Plan, journal: Journal, most: float | None) -> None:
    """Refuse a mixture that is further from the dense model than was asked for, or than can be.

    Raises:
        ValueError: when the difference is larger than `most`.
        RuntimeError: when the mixture should compute the dense function and does not.
    """
    difference = proof.max_relative_difference
    if most is not None and not difference <= most:  # NaN is not either
        raise ValueError(f"require_identity: must be at most {most:g}, but {proof}")
    if plan.facts["exact"] and not proof.holds and not journal.non_finite:
        raise RuntimeError(
            f"The mixture should compute the dense function and does not ({proof}). The FFN of {plan.facts['family']!r}"
            " is not what its layout says; please report this family."
        )


def _exchange(workshop: Path, target: Path) -> None:
    """Let the folder `model` of the workshop take the target's place, in one step where there was none."""
    sync_folder(workshop / "model")
    checkpoint_of_progress("exchange")
    old = workshop / "replaced"
    if target.exists():
        target.rename(old)
        checkpoint_of_progress("exchange")
    try:
        (workshop / "model").rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)


def _push(folder: Path, name: str) -> None:
    """Upload a finished folder to the Hub.

    Raises:
        ValueError: when the Hub refuses; the folder stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Mixture of experts, made with st_moe")
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"push_to_hub: {folder} is complete, but {name!r} could not be uploaded: {reason}") from None
