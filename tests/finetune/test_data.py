"""Reading, tokenising and packing of training text; every fault of the input as one message."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, default_data_collator

from st_moe.finetune.data import IGNORED_LABEL, load_text_dataset, pack_blocks, split_dataset

EOS = 256
PAD = 257
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packed blocks of a test are kept out of the user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def make_tokenizer(*, eos: str | None = "<eos>", pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token per byte: ids 0..255 in the order of `ByteLevel.alphabet`, so expected ids need no tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)


def ids_of(text: str) -> list[int]:
    return make_tokenizer().convert_tokens_to_ids(list(text))


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def plain_blocks(documents: list[list[int]], length: int) -> list[dict[str, list[int]]]:
    """The law that packing must follow, token by token."""
    stream = [token for document in documents if document for token in [*document, EOS]]
    blocks = []
    for start in range(0, len(stream), length):
        real = stream[start : start + length]
        if len(real) == 1:
            continue
        missing = length - len(real)
        blocks.append(
            {
                "input_ids": real + [PAD] * missing,
                "attention_mask": [1] * len(real) + [0] * missing,
                "labels": real + [IGNORED_LABEL] * missing,
            }
        )
    return blocks


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=12), max_size=8),
    length=st.integers(min_value=2, max_value=9),
)
def test_packing_equals_plain_reference(documents: list[list[int]], length: int) -> None:
    packed = list(pack_blocks(documents, length, eos_token_id=EOS, pad_token_id=PAD))
    assert packed == plain_blocks(documents, length)


def test_packing_by_hand() -> None:
    packed = list(pack_blocks([[1, 2, 3], [], [4, EOS], [5]], 4, eos_token_id=EOS))
    assert packed == [
        {"input_ids": [1, 2, 3, EOS], "attention_mask": [1, 1, 1, 1], "labels": [1, 2, 3, EOS]},
        # A document that closes itself gets no second eos.
        {"input_ids": [4, EOS, 5, EOS], "attention_mask": [1, 1, 1, 1], "labels": [4, EOS, 5, EOS]},
    ]


def test_last_block_is_padded_and_a_single_token_dropped() -> None:
    padded = list(pack_blocks([[1, 2, 3, 4]], 3, eos_token_id=EOS))[-1]
    assert padded == {"input_ids": [4, EOS, EOS], "attention_mask": [1, 1, 0], "labels": [4, EOS, IGNORED_LABEL]}
    assert len(list(pack_blocks([[1, 2, 3]], 3, eos_token_id=EOS))) == 1


def test_jsonl_text_and_messages(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    file = write_jsonl(
        tmp_path / "a.jsonl",
        {"text": "one"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": ""},
        {"text": "two", "messages": []},
    )
    dataset = load_text_dataset(file, tokenizer, max_length=8)
    expected = plain_blocks([ids_of(text) for text in ("one", "user:ĠhiĊassistant:ĠhoĊ", "two")], 8)
    assert dataset.to_list() == expected
    batch = default_data_collator([dataset[0], dataset[len(dataset) - 1]])
    assert [batch[name].shape for name in ("input_ids", "attention_mask", "labels")] == [(2, 8)] * 3
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_special_tokens_of_the_tokenizer_are_kept(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", PAD)])
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "c"})
    dataset = load_text_dataset(file, tokenizer, max_length=7)
    assert dataset[0]["input_ids"] == [PAD, *ids_of("ab"), EOS, PAD, *ids_of("c"), EOS]


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.md").write_text("B", encoding="utf-8")
    (tmp_path / "c.PY").write_bytes(b"\xef\xbb\xbfC")
    (tmp_path / "a.txt").write_text("A", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "d.jsonl", {"text": "D"})
    (tmp_path / "settings.json").write_text("{}", encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"\0")
    (tmp_path / ".hidden" / "y.txt").write_text("Y", encoding="utf-8")
    dataset = load_text_dataset(str(tmp_path), make_tokenizer(), max_length=8)
    expected = plain_blocks([ids_of(letter) for letter in "ABCD"], 8)
    assert dataset.to_list() == expected


def test_single_text_file_and_its_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\r\nb")
    assert load_text_dataset(file, make_tokenizer(), max_length=5)[0]["input_ids"] == [*ids_of("ačĊb"), EOS]


def test_more_documents_than_one_tokenizer_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("st_moe.finetune.data.TOKENIZER_BATCH", 3)
    texts = [f"text{index}" for index in range(10)]
    file = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    dataset = load_text_dataset(file, make_tokenizer(), max_length=16)
    assert dataset.to_list() == plain_blocks([ids_of(text) for text in texts], 16)


def test_cache_follows_file_tokenizer_and_length(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "aaaa"})
    first = load_text_dataset(file, make_tokenizer(), max_length=5)
    again = load_text_dataset(file, make_tokenizer(), max_length=5)
    assert again.cache_files == first.cache_files
    assert len(load_text_dataset(file, make_tokenizer(), max_length=2)) == 2
    other_pad = load_text_dataset(file, make_tokenizer(pad=None), max_length=8)
    assert other_pad[0]["input_ids"][-1] == EOS
    write_jsonl(file, {"text": "bbbb"})
    os.utime(file, (1, 1))
    assert load_text_dataset(file, make_tokenizer(), max_length=5)[0]["input_ids"] == [*ids_of("bbbb"), EOS]


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []

    def load(name: str, configuration: str | None, **options: object) -> datasets.Dataset:
        calls.append((name, configuration, options))
        return datasets.Dataset.from_dict({"body": ["one", "two"], "other": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = load_text_dataset("owner/name:en", make_tokenizer(), max_length=4, split="train[:2]", text_field="body")
    assert calls == [("owner/name", "en", {"split": "train[:2]"})]  # above all no trust_remote_code
    assert dataset.to_list() == plain_blocks([ids_of("one"), ids_of("two")], 4)
    with pytest.raises(ValueError, match=r"must have a column 'text' or 'messages', has \['body', 'other'\]"):
        load_text_dataset("name", make_tokenizer(), max_length=4)


def test_hub_failure_is_one_error() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' is neither a file or folder here nor a data set"):
        load_text_dataset("nobody/nothing", make_tokenizer(), max_length=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"data\.jsonl, line 2: must be one JSON object per line, .*got '\{\"text\":'"),
        (b'{"text": "a"}\n\n[1]\n', r"line 3: must be a JSON object, got list \[1\]"),
        (b'{"body": 1}\n', r"line 1: field 'text' or 'messages' is missing, found \['body'\]"),
        (b'{"text": 7}\n', r"line 1: field 'text' must be a string, got int 7"),
        (b'{"text": null}\n', r"line 1: field 'text' must be a string, got NoneType None"),
        (b'{"messages": []}\n', r"line 1: field 'messages' must be a list with at least one message, got \[\]"),
        (b'{"messages": [{"role": 1}]}\n', r"line 1: messages\[0\] must be an object with 'role'"),
        (
            b'{"messages": [{"role": "critic", "content": ""}]}\n',
            r"line 1: the chat template refuses these messages: no critics",
        ),
        (b'{"text": "\\ud800"}\n', r"line 1: must be valid Unicode, got half a surrogate pair, '\\ud800'"),
        (b'{"text": "a"}\n\xff\n', r"line 2: must be UTF-8 text, got byte 0xff at byte 0"),
        (b"\x00\x01", r"line 1: must be text, got binary data \(NUL at byte 0\)"),
        (b"[" * 200_000, r"line 1: must be one JSON object per line, .*recursion"),
        (b"", r"data\.jsonl: must hold at least one text that is not empty, found none"),
        (b'\n{"text": ""}\n', r"data\.jsonl: must hold at least one text that is not empty, found none"),
    ],
)
def test_broken_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text_dataset(file, tokenizer, max_length=4)


def _missing(folder: Path) -> Path:
    return folder / "nowhere"


def _empty_folder(folder: Path) -> Path:
    return folder


def _binary_text(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"ab\0")
    return folder


def _latin_text(folder: Path) -> Path:
    (folder / "a.txt").write_bytes("grün".encode("latin-1"))
    return folder


def _other_suffix(folder: Path) -> Path:
    (folder / "a.parquet").touch()
    return folder / "a.parquet"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, r"nowhere' does not exist: no such file or folder"),
        (_empty_folder, r"folder holds no text file \(looked for \.jsonl \.ndjson \.txt"),
        (_binary_text, r"a\.txt: must be text, got binary data \(NUL at byte 2\)"),
        (_latin_text, r"a\.txt: must be UTF-8 text, got byte 0xfc at byte 2"),
        (_other_suffix, r"a\.parquet: file name must end with one of \.jsonl .* got '\.parquet'"),
    ],
)
def test_broken_sources(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_text_dataset(make(tmp_path), make_tokenizer(), max_length=4)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "nowhere.jsonl", "no where", ""])
def test_a_missing_path_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=r"does not exist|empty string"):
        load_text_dataset(source, make_tokenizer(), max_length=4)


@pytest.mark.parametrize("max_length", [1, 0, -3, True, 2.0, None])
def test_max_length_rule(tmp_path: Path, max_length: object) -> None:
    with pytest.raises(ValueError, match=r"max_length must be a whole number >= 2 .*, got "):
        load_text_dataset(tmp_path, make_tokenizer(), max_length=max_length)  # type: ignore[arg-type]


def test_tokenizer_rules(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token must be set, .* has eos_token=None"):
        load_text_dataset(file, make_tokenizer(eos=None), max_length=4)
    with pytest.raises(ValueError, match=r"line 1: 'messages' needs a tokenizer with a chat template"):
        load_text_dataset(file, make_tokenizer(), max_length=4)


def test_local_text_has_one_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match=r"split='test': local text .* has only 'train'"):
        load_text_dataset(file, make_tokenizer(), max_length=4, split="test")


def test_split_is_disjoint_complete_and_repeatable() -> None:
    dataset = datasets.Dataset.from_dict({"row": list(range(50))})
    train, evaluation = split_dataset(dataset, 0.1, seed=3)
    assert len(evaluation) == 5
    assert sorted([*train["row"], *evaluation["row"]]) == list(range(50))
    assert split_dataset(dataset, 0.1, seed=3)[1]["row"] == evaluation["row"]
    assert split_dataset(dataset, 0.1, seed=4)[1]["row"] != evaluation["row"]
    assert [len(part) for part in split_dataset(dataset.select(range(2)), 0.99, seed=0)] == [1, 1]
    assert [len(part) for part in split_dataset(dataset, 0.001, seed=0)] == [49, 1]


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan"), True, "0.1"])
def test_split_fraction_rule(fraction: object) -> None:
    dataset = datasets.Dataset.from_dict({"row": [1, 2, 3]})
    with pytest.raises(ValueError, match="eval_fraction must be a number between 0 and 1"):
        split_dataset(dataset, fraction, seed=0)  # type: ignore[arg-type]


def test_split_other_rules() -> None:
    dataset = datasets.Dataset.from_dict({"row": [1]})
    with pytest.raises(ValueError, match=r"at least 2 rows .* got 1"):
        split_dataset(dataset, 0.5, seed=0)
    with pytest.raises(ValueError, match="seed must be a whole number >= 0, got -1"):
        split_dataset(dataset, 0.5, seed=-1)
