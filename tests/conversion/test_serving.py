"""The benchmark of served exports: which mixtures it asks for, and what it makes of an engine's answers."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import llama_cpp_side, serving
from benchmarks.measure import write_table
from benchmarks.serving import Case, Row, compared, greedy_tokens, logits_of, mixture_of
from st_moe.conversion.native_targets import TARGETS

IDS = list(range(20, 30))
#: Stands in for the other interpreter's script: says why it fails, or answers.
REFUSING = "import sys; sys.exit('Traceback\\nValueError: no such | thing')"
ANSWERING = (
    "import json, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.with_name('answer.json').write_text(p.read_text())"
)


def test_every_target_is_measured() -> None:
    found = list(serving.cases([row.name for row in TARGETS]))
    assert {case.target for case in found} == {row.name for row in TARGETS if row.name in serving.CONFIG_MAPPING}
    assert len(found) == len(set(found))
    assert Case("qwen2_moe", "qwen2", "one shared expert") in found
    assert Case("mixtral", "mistral", "one shared expert") not in found


def answer_of(model: Any) -> dict[str, Any]:
    """What an engine would say that computes this model."""
    text = serving.tokenizer().encode(serving.TEXT, add_special_tokens=False)
    return {"logits": logits_of(model, IDS).tolist(), "tokens": greedy_tokens(model, IDS), "text": text}


def test_an_engine_that_computes_the_same_is_told_from_one_that_does_not() -> None:
    case = Case("mixtral", "llama")
    mixture = mixture_of(case)
    row = compared(case, mixture, IDS, answer_of(mixture))
    assert row.equal
    assert row.tokenizer == "pre-tokenizer named"
    wrong = compared(case, mixture, IDS, answer_of(serving.swapped(mixture)))
    assert not wrong.equal
    assert wrong.difference is not None
    assert wrong.difference > 100 * serving.TOLERANCE
    broken = compared(
        case, mixture, IDS, answer_of(mixture) | {"logits": (logits_of(mixture, IDS) * torch.nan).tolist()}
    )
    assert not broken.equal
    assert compared(case, mixture, IDS, answer_of(mixture) | {"text": [1]}).tokenizer == "DIFFERENT"


@pytest.mark.parametrize(
    ("code", "expected"), [(REFUSING, (None, "ValueError: no such / thing")), (ANSWERING, ({"ids": IDS}, ""))]
)
def test_an_answer_or_the_reason_why_there_is_none(
    code: str, expected: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.setattr(llama_cpp_side, "__file__", str(script))
    request: Any = {"folder": str(tmp_path), "ids": IDS}
    answer, reason = serving.answered(request, sys.executable)
    if answer is not None:
        answer = {"ids": answer["ids"]}
    assert (answer, reason) == expected


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "no reason given"),
        ("INFO:x\nERROR:hf-to-gguf:Model Odd is not supported\n", "Model Odd is not supported"),
        ("llama_model_load: error loading model: no tensor 'x'\nValueError: Failed to load", "no tensor 'x'"),
        ("/tmp/build/src/odd.cpp:7: GGML_ASSERT(a == b) failed\nmore\n", "odd.cpp:7: GGML_ASSERT(a == b) failed"),
    ],
)
def test_the_reason_is_one_line_without_a_path(said: str, reason: str) -> None:
    assert serving.refusal(said) == reason


def test_the_page_gets_one_table_with_refusals(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    served = Row(Case("mixtral", "llama"), "pre-tokenizer named", True, 1e-6, 0.9, True)
    rows = [served, Row(Case("flex_olmo", "olmo2"), reason="Model FlexOlmoForCausalLM is not supported")]
    page.write_text("Before.\n\n", encoding="utf-8")
    for _ in range(2):
        write_table(page, "benchmarks.serving", serving.markdown(rows, "engine 1.0"))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n\n")
    assert text.count("| mixtral | llama |  | pre-tokenizer named | yes | 1.0e-06 | 9.0e-01 | equal |  |") == 1
    assert "| flex_olmo | olmo2 |  |  | no |  |  |  | Model FlexOlmoForCausalLM is not supported |" in text
    assert "`python -m benchmarks.serving`, engine 1.0;" in text
    assert "Of 2 mixtures 1 are served with equal logits and tokens, 1 are refused and 0 computed" in text
