"""Text to training blocks: jsonl, text files or a Hub data set, tokenised and packed for causal language modelling."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts")
# A folder's .json files are far more often settings than records, so only the first two are read from folders.
FOLDER_SUFFIXES = JSONL_SUFFIXES[:2] + TEXT_SUFFIXES
IGNORED_LABEL = -100
TOKENIZER_BATCH = 256  # documents handed to a fast tokenizer at once, so that it can use its threads

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class _Document:
    """One text, or one conversation, and where it came from (for messages to the user)."""

    place: str
    content: str | list[dict[str, Any]]


def load_text_dataset(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    split: str = "train",
    text_field: str = "text",
) -> Dataset:
    """Load text, tokenise it and pack it into blocks of `max_length` tokens.

    `source` is one of
    - a jsonl file (`.jsonl`, `.ndjson`, `.json`): each line an object with `text_field`, or with `messages`, a list of
      `{"role", "content"}` that goes through the tokenizer's chat template;
    - a text file, one document, or a folder, read recursively in sorted order: `.jsonl`/`.ndjson` files and the text
      files named in `TEXT_SUFFIXES`; names that start with a dot are passed over;
    - the name of a data set on the Hugging Face Hub, `owner/name` or `owner/name:configuration`, with a column
      `text_field` or `messages`. Code that a data set brings is never run.

    Every document ends with one eos token; the stream of documents is cut into blocks, so a block may hold the end of
    one document and the start of the next. All tokens are trained on. Empty documents are left out. The packed blocks
    are cached where `datasets` keeps its cache, under a fingerprint of files, tokenizer and `max_length`.

    Args:
        source: file, folder or Hub name; what exists on disk is never looked up on the Hub.
        tokenizer: tokenizer with an eos token; its special tokens (for instance bos) are added to each text.
        max_length: tokens per block, at least 2.
        split: split of a Hub data set, for instance `"train"` or `"train[:1%]"`; local text has only `"train"`.
        text_field: name of the field or column that holds the text.

    Returns:
        Data set with `input_ids`, `attention_mask` and `labels`, each `[max_length]`; see `pack_blocks`.

    Raises:
        ValueError: an argument or the data breaks a rule; the message names file, line, rule and value.
    """
    _check_arguments(tokenizer, max_length, text_field)
    path = _local_path(source)
    if path is None:
        return _load_from_hub(str(source), tokenizer, max_length, split, text_field)
    if split != "train":
        raise ValueError(f"split={split!r}: local text ({path}) has only 'train'; splits are for Hub data sets")
    files = _text_files(path)
    documents = _file_documents(files, text_field)
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _packed(documents, tokenizer, max_length, origin=str(path), fingerprint_parts=[state, text_field])


def split_dataset(dataset: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split blocks at random into a training and an evaluation part, neither of them empty.

    Args:
        dataset: at least 2 rows.
        eval_fraction: share of the rows that goes to the evaluation part, between 0 and 1 (both excluded).
        seed: seed of the permutation; the same seed gives the same split.

    Raises:
        ValueError: a value is outside its range.
    """
    if isinstance(eval_fraction, bool) or not isinstance(eval_fraction, (int, float)) or not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction must be a number between 0 and 1 (both excluded), got {eval_fraction!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
    rows = len(dataset)
    if rows < 2:
        raise ValueError(f"dataset must have at least 2 rows to be split into training and evaluation, got {rows}")
    parts = dataset.train_test_split(test_size=min(max(1, round(rows * eval_fraction)), rows - 1), seed=seed)
    return parts["train"], parts["test"]


def pack_blocks(
    documents: Iterable[Sequence[int]], max_length: int, *, eos_token_id: int, pad_token_id: int | None = None
) -> Iterator[dict[str, list[int]]]:
    """Join documents of token ids, each closed by eos, and cut the stream into blocks of `max_length`.

    The last block is padded with `pad_token_id` (eos if None) where `attention_mask` is 0 and `labels` is -100.
    A last block of one single token is dropped: nothing in it could be predicted, and its mean loss would be NaN.

    Yields:
        `{"input_ids", "attention_mask", "labels"}`, three lists of `max_length` integers.
    """
    waiting: list[int] = []
    for document in documents:
        if not document:
            continue
        waiting.extend(document)
        if document[-1] != eos_token_id:
            waiting.append(eos_token_id)
        whole = len(waiting) - len(waiting) % max_length
        for start in range(0, whole, max_length):
            block = waiting[start : start + max_length]
            yield {"input_ids": block, "attention_mask": [1] * max_length, "labels": list(block)}
        del waiting[:whole]
    if len(waiting) > 1:
        missing = max_length - len(waiting)
        pad = eos_token_id if pad_token_id is None else pad_token_id
        yield {
            "input_ids": waiting + [pad] * missing,
            "attention_mask": [1] * len(waiting) + [0] * missing,
            "labels": waiting + [IGNORED_LABEL] * missing,
        }


# ------------------------------------------------------------------------------------------------ where the text is


def _check_arguments(tokenizer: PreTrainedTokenizerBase, max_length: int, text_field: str) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(
            f"max_length must be a whole number >= 2 (one token to read, one to predict), got {max_length!r}"
        )
    if not isinstance(text_field, str) or not text_field:
        raise ValueError(f"text_field must be the name of a field, got {text_field!r}")
    if tokenizer is None:
        raise ValueError("tokenizer must be given, got None")
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            f"tokenizer.eos_token must be set, since it separates documents; {type(tokenizer).__name__} has "
            "eos_token=None (set tokenizer.eos_token to a token of its vocabulary)"
        )


def _local_path(source: str | Path) -> Path | None:
    """The path if `source` is on disk, None if it can be the name of a Hub data set; anything else is an error."""
    if not str(source):
        raise ValueError("source must be a file, a folder or a Hub data set name, got an empty string")
    path = Path(source).expanduser()
    if path.exists():
        return path
    is_file_name = path.suffix.lower() in JSONL_SUFFIXES + TEXT_SUFFIXES
    if isinstance(source, Path) or is_file_name or not _HUB_ID.fullmatch(source):
        raise ValueError(f"source {str(source)!r} does not exist: no such file or folder")
    return None


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the readable files below a folder in sorted order."""
    if path.is_file():
        if path.suffix.lower() not in JSONL_SUFFIXES + TEXT_SUFFIXES:
            accepted = " ".join(JSONL_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"{path}: file name must end with one of {accepted}; got {path.suffix!r}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: must be a regular file or a folder")
    files: list[Path] = []
    for folder, subfolders, names in os.walk(path):  # does not follow links to folders, which may run in circles
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = (Path(folder, name) for name in names if not name.startswith("."))
        files.extend(file for file in visible if file.suffix.lower() in FOLDER_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path}: folder holds no text file (looked for {' '.join(FOLDER_SUFFIXES)}, recursively)")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _load_from_hub(
    source: str, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str, text_field: str
) -> Dataset:
    """Download (or take from the cache) one split of a Hub data set and pack it."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        table = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, unknown split or configuration
        raise ValueError(
            f"source {source!r} is neither a file or folder here nor a data set that the Hub gives (split {split!r}): "
            f"{error}"
        ) from error
    field = next((field for field in (text_field, "messages") if field in table.column_names), None)
    if field is None:
        raise ValueError(
            f"data set {source!r}: must have a column {text_field!r} or 'messages', has {sorted(table.column_names)}"
        )
    rows = table.select_columns([field])
    documents = (_record(row, f"{source}, row {index}", text_field) for index, row in enumerate(rows))
    return _packed(documents, tokenizer, max_length, origin=source, fingerprint_parts=[rows._fingerprint, text_field])


# ------------------------------------------------------------------------------------------------ reading documents


def _file_documents(files: list[Path], text_field: str) -> Iterator[_Document]:
    for file in files:
        if file.suffix.lower() in JSONL_SUFFIXES:
            yield from _jsonl_documents(file, text_field)
        else:
            yield _Document(str(file), _decoded(file.read_bytes(), str(file)))


def _jsonl_documents(file: Path, text_field: str) -> Iterator[_Document]:
    """One document per line; blank lines are passed over."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            place = f"{file}, line {number}"
            line = _decoded(raw, place).strip()
            if not line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: must be one JSON object per line, {error}: got {_shown(line)}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{place}: must be a JSON object, got {type(record).__name__} {_shown(record)}")
            yield _record(record, place, text_field)


def _decoded(raw: bytes, place: str) -> str:
    """UTF-8 text, without a byte-order mark."""
    if b"\0" in raw:
        raise ValueError(f"{place}: must be text, got binary data (NUL at byte {raw.index(0)})")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        value = raw[error.start]
        raise ValueError(f"{place}: must be UTF-8 text, got byte 0x{value:02x} at byte {error.start}") from None


def _record(record: dict[str, Any], place: str, text_field: str) -> _Document:
    """Check one record; `text_field` wins where a record has both."""
    if text_field in record:
        text = record[text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: field {text_field!r} must be a string, got {type(text).__name__} {_shown(text)}"
            )
        return _Document(place, text)
    if "messages" not in record:
        raise ValueError(f"{place}: field {text_field!r} or 'messages' is missing, found {_shown(sorted(record))}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: field 'messages' must be a list with at least one message, got {_shown(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(
                f"{place}: messages[{index}] must be an object with 'role' (a string) and 'content', "
                f"got {_shown(message)}"
            )
    return _Document(place, messages)


def _shown(value: Any) -> str:
    """The value as Python writes it, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------ tokens and blocks


def _packed(
    documents: Iterable[_Document],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    origin: str,
    fingerprint_parts: list[Any],
) -> Dataset:
    """Run the pipeline through `datasets`, which shows its progress and keeps the blocks on disk, memory-mapped."""
    import datasets

    def blocks() -> Iterator[dict[str, list[int]]]:
        packed = pack_blocks(
            _token_ids(documents, tokenizer),
            max_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        first = next(packed, None)
        if first is None:
            raise ValueError(f"{origin}: must hold at least one text that is not empty, found none")
        yield first
        yield from packed

    numbers = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({"input_ids": numbers, "attention_mask": numbers, "labels": numbers})
    fingerprint = _fingerprint([*fingerprint_parts, max_length, *_tokenizer_state(tokenizer)])
    try:
        return datasets.Dataset.from_generator(blocks, features=features, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _token_ids(documents: Iterable[_Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each document, in order; texts are tokenised in batches, conversations one by one."""
    stream = iter(documents)
    while batch := list(islice(stream, TOKENIZER_BATCH)):
        texts = []
        for document in batch:
            if isinstance(document.content, str):
                _check_characters(document.content, document.place)
                texts.append(document.content)
        # verbose=False: a document longer than the model's limit is no fault here, it is cut into blocks.
        tokenised = iter(tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else [])
        for document in batch:
            if not isinstance(document.content, str):
                yield _conversation_ids(document.content, document.place, tokenizer)
            else:
                ids = next(tokenised)
                # An empty text would become a block of special tokens and teach nothing.
                yield ids if document.content else []


def _check_characters(text: str, place: str) -> None:
    found = _LONE_SURROGATE.search(text)
    if found:
        raise ValueError(f"{place}: must be valid Unicode, got half a surrogate pair, {found.group()!a}")


def _conversation_ids(messages: list[dict[str, Any]], place: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{place}: 'messages' needs a tokenizer with a chat template, {type(tokenizer).__name__} has none "
            "(set tokenizer.chat_template, or write the conversation out in a text field)"
        )
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError) as error:  # the template's own rules, for instance that roles take turns
        raise ValueError(f"{place}: the chat template refuses these messages: {error}") from None
    _check_characters(text, place)
    # The template writes the special tokens itself; adding them again would double the bos token.
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Everything that decides which ids a text becomes, as strings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        return [Hasher.hash(tokenizer)]
    specials = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.special_tokens_map]
    return [type(tokenizer).__qualname__, backend.to_str(), str(specials), str(tokenizer.chat_template)]


def _fingerprint(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:32]
