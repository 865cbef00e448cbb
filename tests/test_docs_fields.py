"""What the pages say in tables and texts is what the code says: fields, defaults, messages, and how to extend it."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from st_moe import STMoEConfig
from st_moe.configuration import LOSSES, MIXTURE_FIELDS, ROUTER_TYPES
from st_moe.conversion import RECIPES
from st_moe.conversion.recipes import check_recipe
from st_moe.conversion.router_init import ROUTER_INITS, check_router_init
from tests.families import FAMILIES
from tests.test_docs import PAGE_SECONDS, ROOT, blocks_of, run_page
from tests.test_structure import source_files

CONFIGURATION = ROOT / "docs" / "configuration.md"
ROUTERS = ROOT / "docs" / "routers.md"
UPCYCLING = ROOT / "docs" / "upcycling.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOTS = "…"


def rows_of(text: str, columns: tuple[str, ...]) -> list[list[str]]:
    """Rows of every table with these first headings, each cell as it is written."""
    rows: list[list[str]] = []
    kept = False
    row: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            kept = False
        elif token.type == "tr_open":
            row = []
        elif token.type == "inline":
            row.append(token.content)
        elif token.type == "thead_close":
            kept = tuple(row[: len(columns)]) == columns
        elif token.type == "tr_close" and kept:
            rows.append(list(row))
    return rows


def field_faults(text: str) -> list[str]:
    """Fields of the mixture that a page misses, has twice or invents, and defaults that it has wrong."""
    told: dict[str, Any] = {}
    faults = []
    for name, default, *_ in rows_of(text, ("Field", "Default")):
        name = name.strip("`")
        if name in told:
            faults.append(f"{name} is there twice")
        told[name] = ast.literal_eval(default.strip("`"))
    faults += [f"{name} is missing" for name in MIXTURE_FIELDS if name not in told]
    faults += [f"{name} is no field" for name in told if name not in MIXTURE_FIELDS]
    defaults = {name: getattr(STMoEConfig, name) for name in told if name in MIXTURE_FIELDS}
    faults += [
        f"{name} has the default {value!r}, not {told[name]!r}"
        for name, value in defaults.items()
        if (type(value), value) != (type(told[name]), told[name])
    ]
    return faults


def test_the_configuration_page_has_every_field_and_its_default() -> None:
    assert not field_faults(CONFIGURATION.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("| `num_experts` | `8` |", "| `num_experts` | `9` |", "num_experts has the default 8, not 9"),
        ("| `num_experts` | `8` |", "| `number` | `8` |", "num_experts is missing"),
        ("| `min_capacity` | `4` |", "| `num_experts` | `8` |", "num_experts is there twice"),
        ("| `ffn_after` | `False` |", "| `ffn_behind` | `False` |", "ffn_behind is no field"),
        ("| `router_jitter_noise` | `0.0` |", "| `router_jitter_noise` | `False` |", "not False"),
    ],
)
def test_a_wrong_table_is_seen(before: str, after: str, fault: str) -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert before in text
    assert any(fault in found for found in field_faults(text.replace(before, after)))


def test_the_configuration_page_has_every_other_name() -> None:
    rows = rows_of(CONFIGURATION.read_text(encoding="utf-8"), ("Name", "Field"))
    assert {name.strip("`"): field.strip("`") for name, field in rows} == STMoEConfig.attribute_map


def test_the_upcycling_page_has_every_recipe_and_family() -> None:
    text = UPCYCLING.read_text(encoding="utf-8")
    rows = {row[0].strip('`"'): row for row in rows_of(text, ("Recipe", "Experts"))}
    assert set(rows) == set(RECIPES)
    for name, row in rows.items():
        assert (row[3] == "yes") == RECIPES[name].keeps_function({}, STMoEConfig())
        options = {} if row[2] == "none" else {o.split("=")[0].strip(" `"): None for o in row[2].split(",")}
        check_recipe(name, options)
    told = text[text.index("They are llama") :].split(".")[0].replace("They are ", "").replace(" and ", ", ")
    assert [name.strip() for name in told.split(",")] == list(FAMILIES)


def router_faults(text: str) -> list[str]:
    """Routers that a page misses, and rows that say other than the registry."""
    rows = {row[0].strip('`"'): row for row in rows_of(text, ("`router_type`", "How it chooses"))}
    faults = [f"{name} is in one place only" for name in set(rows) ^ set(ROUTER_TYPES)]
    for name in set(rows) & set(ROUTER_TYPES):
        _, _, causal, _, losses, keeps_function, _ = rows[name]
        told = {loss: float(value) for loss, value in re.findall(r"`(\w+)` \(([\d.]+)\)", losses)}
        router = ROUTER_TYPES[name]
        if told != dict(router.losses):
            faults.append(f"{name} has the losses {dict(router.losses)}, not {told}")
        for cell, fact in ((causal, router.causal), (keeps_function, router.keeps_function)):
            if cell.startswith("yes") != fact:
                faults.append(f"{name}: {cell!r} should be {fact}")
    return faults


def test_the_routers_page_has_every_router_and_loss() -> None:
    text = ROUTERS.read_text(encoding="utf-8")
    assert not router_faults(text)
    rows = rows_of(text, ("Loss", "Field"))
    told = {row[0].strip("`"): row[1].strip("`") for row in rows if row[0].startswith("`")}
    assert told == {loss: f"{loss}_coef" for loss in LOSSES}


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ('| `"hash"` |', '| `"hashed"` |', "hash is in one place only"),
        ("`load_loss` (0.01)", "`load_loss` (0.1)", "noisy_top_k has the losses"),
        ("| no | yes | none | no |", "| yes | yes | none | no |", "soft: 'yes' should be False"),
    ],
)
def test_a_wrong_router_is_seen(before: str, after: str, fault: str) -> None:
    text = ROUTERS.read_text(encoding="utf-8")
    assert text.count(before) == 1
    assert any(fault in found for found in router_faults(text.replace(before, after)))


def test_the_upcycling_page_has_every_router_initialisation() -> None:
    rows = {
        row[0].strip('`"'): row for row in rows_of(UPCYCLING.read_text(encoding="utf-8"), ("`router_init`", "Rows"))
    }
    assert set(rows) == set(ROUTER_INITS)
    for name, row in rows.items():
        assert (row[3] == "yes") is ROUTER_INITS[name].reads_text
        options = {} if row[2] == "none" else {o.split("=")[0].strip(" `"): 1.0 for o in row[2].split(",")}
        check_router_init(name, options, ["a text"] if row[3] == "yes" else None)


def texts_of(source: str) -> list[str]:
    """Every text in a module's source, with dots in the place of what is filled in."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else DOTS for part in node.values]
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def unknown_messages(page: str, sources: list[str]) -> list[str]:
    """Messages on a page that no text of the sources begins or continues with."""
    known = [text for source in sources for text in texts_of(source)]
    shown = [block.text.strip() for block in blocks_of(page) if block.language == "text"]
    return [message for message in shown if not any(message.rstrip(DOTS) in text for text in known)]


def test_every_message_on_the_troubleshooting_page_is_the_codes() -> None:
    sources = [path.read_text(encoding="utf-8") for path in source_files().values()]
    page = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert not unknown_messages(page, sources)
    assert len([block for block in blocks_of(page) if block.language == "text"]) > 30


def test_an_invented_message_is_seen() -> None:
    source = 'raise ValueError(f"{name}: must not be negative, " f"got {value!r}")'
    assert not unknown_messages("```text\n…: must not be negative, got …\n```", [source])
    assert unknown_messages("```text\n…: must be positive, got …\n```", [source])


@pytest.mark.slow
@pytest.mark.timeout(PAGE_SECONDS + 60)
def test_the_examples_of_the_contributing_page_run(tmp_path: Path) -> None:
    run = run_page(CONTRIBUTING, tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
