"""The demo's text and tokenizer, and the whole demo at its fast size."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from st_moe import demo_text
from st_moe.demo_text import Document, is_held_out, load_documents, train_tokenizer

if TYPE_CHECKING:
    from st_moe.demo import DemoResult

REFERENCE_TOPICS = {"reference: compound", "reference: import", "reference: strings"}


@pytest.fixture(scope="module")
def documents() -> tuple[list[Document], list[Document]]:
    return load_documents()


def paragraphs(documents: list[Document]) -> list[str]:
    found = (" ".join(part.split()) for document in documents for part in document.text.split("\n\n"))
    return [paragraph for paragraph in found if len(paragraph) >= demo_text.MIN_SHARED_PARAGRAPH]


def test_text_has_both_sources_and_enough_of_them(documents: tuple[list[Document], list[Document]]) -> None:
    training, held_out = documents
    topics = {document.topic for document in training + held_out}
    assert topics >= REFERENCE_TOPICS | {"library: argparse", "library: json.decoder", "library: email.message"}
    assert sum(len(document.text) for document in training) > 1_000_000
    assert 0.05 < len(held_out) / len(topics) < 0.2
    argparse = next(document.text for document in training + held_out if document.topic == "library: argparse")
    assert "argparse.ArgumentParser\n\nObject for parsing command line strings into Python objects." in argparse


def test_split_is_by_topic_and_shares_no_paragraph(documents: tuple[list[Document], list[Document]]) -> None:
    training, held_out = documents
    assert [document.topic for document in training] == sorted(document.topic for document in training)
    assert not any(is_held_out(document.topic) for document in training)
    assert all(is_held_out(document.topic) for document in held_out)
    ours, theirs = paragraphs(training), paragraphs(held_out)
    assert len(set(ours)) == len(ours)
    assert not set(ours) & set(theirs)


def test_split_hash_is_fixed() -> None:
    # Known values: a topic that changed sides would make losses of two versions incomparable.
    assert [is_held_out(f"reference: {name}") for name in ("strings", "while", "for", "with")] == [
        True,
        True,
        False,
        False,
    ]
    assert 0.08 < np.mean([is_held_out(str(number)) for number in range(2000)]) < 0.12
    assert not is_held_out("anything", 0.0)
    assert is_held_out("anything", 1.0)


def test_repeated_paragraphs_stay_on_the_held_out_side() -> None:
    shared, own = "shared words " * 50, "own words " * 50
    seen: set[str] = set()
    held_out = demo_text._without_repeated_paragraphs([Document("a", f"{shared}\n\n{own}")], seen)
    training = demo_text._without_repeated_paragraphs(
        [Document("b", f"other text {own}\n\n {shared} \n\nshort"), Document("c", shared)], seen
    )
    assert held_out == [Document("a", f"{shared}\n\n{own}")]
    assert training == [Document("b", f"other text {own}\n\nshort")]


def test_size_limit_leaves_a_sample_of_both_sources() -> None:
    training, held_out = load_documents(400_000)
    size = sum(len(document.text) for document in training + held_out)
    assert 300_000 < size < 500_000
    assert {document.topic.split(":")[0] for document in training} == {"reference", "library"}
    assert load_documents(400_000) == (training, held_out)
    with pytest.raises(ValueError, match="max_characters must be a positive number or None, got 0"):
        load_documents(0)
    with pytest.raises(ValueError, match=r"max_characters=1 gives 0 training and 1 held-out documents"):
        load_documents(1)


def test_python_without_text_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "STDLIB_MODULES", ())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="use a Python with pydoc_data and library sources"):
        load_documents()


def test_reading_text_imports_none_of_it() -> None:
    # On its own, without the package around it, whose dependencies have most of these modules loaded already.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import demo_text; before = set(sys.modules);"
        "demo_text.load_documents(); new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(set(demo_text.STDLIB_MODULES) & new), 'turtle' in demo_text.STDLIB_MODULES)"
    )
    command = [sys.executable, "-c", code, str(Path(demo_text.__file__).parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[] True"


def test_tokenizer_is_exact_and_repeatable(documents: tuple[list[Document], list[Document]]) -> None:
    training, held_out = documents
    tokenizer = train_tokenizer(training[:40], vocab_size=1024, model_max_length=128)
    assert len(tokenizer) == tokenizer.vocab_size == 1024
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == demo_text.END_OF_TEXT
    assert tokenizer.model_max_length == 128
    for text in (held_out[0].text, " two  spaces , and\ttabs\r\n", "Ünïcode 漢字 🙂 \x00"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    again = train_tokenizer(training[:40], vocab_size=1024, model_max_length=128)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_rules() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer([Document("a", "text")], vocab_size=256)
    with pytest.raises(ValueError, match="vocab_size=300 cannot be filled: the text gives 2"):
        train_tokenizer([Document("a", "text")], vocab_size=300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> "tuple[DemoResult, Path, str]":
    """One run of the fast demo: its result, its folder and what it printed."""
    from st_moe.demo import run_demo

    folder = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    result = run_demo(folder, fast=True, seed=0, console=Console(file=printed, width=120))
    return result, folder, printed.getvalue()


@pytest.mark.slow
def test_demo_proves_compares_and_reloads(demo: "tuple[DemoResult, Path, str]") -> None:
    from st_moe.demo import FAST, comparison_table

    result, _, printed = demo
    assert result.plan == FAST
    assert 0 <= result.proof.max_relative_difference < 1e-5
    assert result.reload_equal
    before, upcycled, dense, mixture = result.rows
    assert [row.model for row in result.rows] == [
        "dense, before",
        "mixture, step 0",
        "dense, fine-tuned",
        "mixture, fine-tuned",
    ]
    assert comparison_table(result.rows).row_count == 4
    assert upcycled.held_out_loss == pytest.approx(before.held_out_loss, rel=1e-5)
    # Both learn, and neither is worse than guessing among the tokens at random.
    assert max(dense.held_out_loss, mixture.held_out_loss) < before.held_out_loss < np.log(FAST.vocab_size)
    assert dense.parameters == dense.active_parameters == before.parameters
    ffn = 3 * FAST.hidden_size * FAST.intermediate_size * FAST.num_layers
    router = FAST.hidden_size * FAST.num_experts * FAST.num_layers
    assert mixture.parameters == dense.parameters + (FAST.num_experts - 1) * ffn + router
    assert mixture.active_parameters == dense.parameters + (FAST.num_experts_per_tok - 1) * ffn + router
    assert all(row.tokens_per_second for row in (before, dense, mixture))
    assert result.mixture_wins == (mixture.held_out_loss < dense.held_out_loss)
    assert ("does NOT beat" in result.verdict) == (not result.mixture_wins)
    assert result.verdict in " ".join(printed.split())
    assert str(result.proof) in " ".join(printed.split())
    assert result.sample.startswith('The "for" statement')


@pytest.mark.slow
def test_demo_writes_models_plots_and_figures(demo: "tuple[DemoResult, Path, str]") -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, folder, _ = demo
    assert [path.relative_to(folder).as_posix() for path in result.plots] == ["losses.png", "expert_load.png"]
    for path in result.plots:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5  # decodes, and is not blank
    written = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert written["rows"] == [dataclasses.asdict(row) for row in result.rows]
    for name in ("dense", "mixture"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / name))


@pytest.mark.slow
def test_verdict_says_when_the_mixture_loses() -> None:
    from st_moe.demo import FAST, ModelRow, _judge

    dense, mixture = ModelRow("d", 100, 100, 2.0, 1.0), ModelRow("m", 400, 150, 2.5, 1.0)
    words, wins = _judge(FAST, dense, mixture)
    assert not wins
    assert "does NOT beat its dense parent: it is 0.5000 nats/token worse (with 1.50x its active parameters)" in words
    words, wins = _judge(FAST, dense, dataclasses.replace(mixture, held_out_loss=1.75))
    assert wins
    assert "beats its dense parent by 0.2500 nats/token" in words
    assert not _judge(FAST, dense, dataclasses.replace(mixture, held_out_loss=2.0))[1]


@pytest.mark.slow
def test_demo_refuses_a_file_as_folder(tmp_path: Path) -> None:
    from st_moe.demo import run_demo

    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(ValueError, match=r"output_dir must be a folder, .*taken is a file"):
        run_demo(taken, fast=True)
