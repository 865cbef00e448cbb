"""Text that every Python carries, split by topic, and a tokenizer trained on it: the data of `st-moe demo`.

Two sources, both read without importing or running the code they document:
the language reference (`pydoc_data.topics`, one document per topic) and the docstrings of the standard library
(read with `ast` from its source files, one document per module).
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_FRACTION = 0.1
MIN_DOCUMENT_CHARACTERS = 400
# Shorter paragraphs ("Example:", "Raises ValueError.") recur everywhere and tell nothing about copied text.
MIN_SHARED_PARAGRAPH = 60

# Modules and packages found in every Python from 3.10 to 3.14; a name that one version lacks is passed over.
# Underscored names are where the standard library keeps the text of decimal, io, collections.abc and datetime.
_STDLIB_NAMES = """
    __future__ _collections_abc _pydatetime _pydecimal _pyio _strptime _threading_local abc argparse ast asyncio base64
    bdb bz2 calendar cmd code codecs codeop collections compileall concurrent configparser contextlib copy csv ctypes
    curses dataclasses datetime dbm decimal difflib dis doctest email encodings enum filecmp fileinput fractions ftplib
    functools getopt getpass gettext glob graphlib gzip heapq hmac html http imaplib importlib inspect ipaddress json
    keyword linecache locale logging lzma mailbox mimetypes multiprocessing netrc ntpath numbers operator optparse os
    pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr
    pydoc queue quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil site smtplib
    socket socketserver sqlite3 ssl stat statistics string stringprep subprocess symtable sysconfig tarfile tempfile
    textwrap threading timeit token tokenize trace traceback turtle types typing unittest urllib uuid venv warnings wave
    weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
"""
STDLIB_MODULES = tuple(_STDLIB_NAMES.split())
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One text and the topic it is about; the topic decides on which side of the held-out split it falls."""

    topic: str
    text: str


def is_held_out(topic: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether a topic is held out: a fixed hash of its name, so the same on every machine and Python version."""
    digest = hashlib.sha256(topic.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_documents(max_characters: int | None = None) -> tuple[list[Document], list[Document]]:
    """Read the documents of this Python and split them by topic.

    Args:
        max_characters: stop reading once this many characters are gathered (None: read everything, about 2 million).

    Returns:
        `(training, held_out)`, each sorted by topic. No paragraph occurs twice, and none of the held-out paragraphs
        occurs in training: the language reference repeats whole sections under several topics.

    Raises:
        ValueError: this Python carries neither topics nor library sources, or `max_characters` is not positive.
    """
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters must be a positive number or None, got {max_characters!r}")
    documents: list[Document] = []
    gathered = 0
    for document in _all_documents():
        documents.append(document)
        gathered += len(document.text)
        if max_characters is not None and gathered >= max_characters:
            break
    documents.sort(key=lambda document: document.topic)
    held_out = [document for document in documents if is_held_out(document.topic)]
    training = [document for document in documents if not is_held_out(document.topic)]
    seen: set[str] = set()
    # Held-out first: a shared paragraph stays there and leaves the training text, so the measured loss is honest.
    held_out = _without_repeated_paragraphs(held_out, seen)
    training = _without_repeated_paragraphs(training, seen)
    if not training or not held_out:
        raise ValueError(
            f"max_characters={max_characters!r} gives {len(training)} training and {len(held_out)} held-out documents; "
            "both sides need at least one (raise the limit, or use a Python with pydoc_data and library sources)"
        )
    return training, held_out


def train_tokenizer(
    documents: Iterable[Document], *, vocab_size: int = 2048, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which `<|endoftext|>` (id 0) is bos, eos, pad and unk at once.

    Args:
        documents: training documents; held-out ones must not be among them.
        vocab_size: size of the vocabulary, at least 257 (256 bytes and the special token).
        model_max_length: longest sequence of the model it is for; None leaves it unbounded.

    Raises:
        ValueError: `vocab_size` is below 257 or the text is too small to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size!r}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in documents), trainer=trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size} cannot be filled: the text gives {backend.get_vocab_size()} tokens")
    bounds = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # decode(encode(text)) must give the text back
        **bounds,
    )


def _all_documents() -> Iterator[Document]:
    """Documents in the order of a hash of their topics, so that a size limit leaves a fair sample of both sources."""
    topics = _reference_topics()
    sources = _library_sources()
    names = [f"reference: {name}" for name in topics] + [f"library: {name}" for name in sources]
    for name in sorted(names, key=lambda name: hashlib.sha256(f"order {name}".encode()).digest()):
        origin, _, key = name.partition(": ")
        text = topics[key] if origin == "reference" else _module_text(key, sources[key])
        if len(text) >= MIN_DOCUMENT_CHARACTERS:
            yield Document(name, text)


def _reference_topics() -> dict[str, str]:
    """The language reference by topic; empty in the rare Python that is packed without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: text.strip() + "\n" for name, text in topics.items()}


def _library_sources() -> dict[str, Path]:
    """Dotted module name -> source file of every module of the fixed list that this Python has as a file."""
    root = Path(sysconfig.get_path("stdlib"))
    sources: dict[str, Path] = {}
    for name in STDLIB_MODULES:
        package = root / name
        files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{name}.py"]
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            if file.is_file() and not {"test", "tests", "__pycache__"}.intersection(parts):
                sources[".".join(parts).removesuffix(".__init__")] = file
    return sources


def _module_text(name: str, file: Path) -> str:
    """All docstrings of one source file, each below its dotted name and signature; empty if it has none."""
    with tokenize.open(file) as stream:  # honours the file's own encoding line
        tree = ast.parse(stream.read())
    entries = list(_docstrings(tree, name))
    heading = ast.get_docstring(tree)
    if heading:
        entries.insert(0, f"{name}\n\n{heading}")
    return "\n\n".join(entries) + "\n" if entries else ""


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    """`name(signature)` and docstring of each class and function inside `node`, in source order."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _DOCUMENTED):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            yield f"{name}{signature}\n\n{docstring}"
        yield from _docstrings(child, name)


def _without_repeated_paragraphs(documents: list[Document], seen: set[str]) -> list[Document]:
    """Drop each long paragraph that `seen` already holds, add the others to it, and drop what is then too short."""
    kept: list[Document] = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= MIN_SHARED_PARAGRAPH:
                if key in seen:
                    continue
                seen.add(key)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text) >= MIN_DOCUMENT_CHARACTERS:
            kept.append(Document(document.topic, text))
    return kept
