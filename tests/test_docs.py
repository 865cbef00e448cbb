"""The documentation is true: its code runs, its links lead somewhere, the paths and modules it names exist."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
ALSO_LINKED = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
ROOMS = {"configuration", "modeling", "conversion", "finetune", "st_moe"}
TOP_FOLDERS = ROOMS | {"benchmarks", "docs", "examples", "tests"}
TOP_FILE = re.compile(r"Makefile|[\w.-]+\.(md|toml|cff)|constraints[\w-]*\.txt")
PYTHON = ("python",)
SHELL = ("bash", "sh", "console")
PAGE_SECONDS = 240


class Block(NamedTuple):
    """A fenced code block: where its first line of code is (from 1), its language, its reason not to run, its text."""

    line: int
    language: str
    no_run: str | None
    text: str


def flat(tokens: list[Token]) -> list[Token]:
    """All tokens of a page, the inline ones too."""
    return [inner for token in tokens for inner in (token, *flat(token.children or []))]


def parse(text: str) -> list[Token]:
    return flat(MarkdownIt("commonmark").enable("table").parse(text))


def blocks_of(text: str) -> list[Block]:
    """The code blocks of a page in order; ValueError on a fence without language or a no-run without reason."""
    blocks = []
    for token in parse(text):
        if token.type != "fence":
            continue
        line = (token.map or [0])[0] + 2
        language, *options = shlex.split(token.info) or [""]
        reasons = [option.partition("=")[2] for option in options if option.partition("=")[0] == "no-run"]
        if not language:
            raise ValueError(f"line {line - 1}: a fence needs a language (text, if it is none)")
        if reasons and not reasons[0]:
            raise ValueError(f'line {line - 1}: no-run needs a reason: no-run="needs the Hub"')
        blocks.append(Block(line, language, reasons[0] if reasons else None, token.content))
    return blocks


def shell_text(block: Block) -> str:
    """The commands of a shell block; a console block shows its commands after `$ ` and their output below."""
    if block.language != "console":
        return block.text
    lines = block.text.splitlines()
    return "\n".join(line[2:] for line in lines if line.startswith(("$ ", "> ")))


# The blocks of a page share one folder, those in Python also one namespace: the real __main__, so that classes pickle.
RUN_PAGE = """
import json, subprocess, sys
page, blocks = sys.argv[1], json.loads(sys.argv[2])
for kind, line, text in blocks:
    print(f"--- {page}:{line}", file=sys.stderr, flush=True)
    if kind == "shell":
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
    else:
        exec(compile("\\n" * (line - 1) + text, page, "exec"), sys.modules["__main__"].__dict__)
"""


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run every block of a page that can run, in order, in the given folder and without network."""
    blocks = [
        ("python", block.line, block.text) if block.language in PYTHON else ("shell", block.line, shell_text(block))
        for block in blocks_of(page.read_text(encoding="utf-8"))
        if block.no_run is None and block.language in PYTHON + SHELL
    ]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "HF_HOME": str(folder / ".hf"), "PYTHONPATH": ""}
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, "-c", RUN_PAGE, str(page), json.dumps(blocks)]
    return subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=PAGE_SECONDS, check=False
    )


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_readme_exists() -> None:
    assert README.is_file()


@pytest.mark.slow
@pytest.mark.timeout(PAGE_SECONDS + 60)
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    run = run_page(page, tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_does_not_run_is_still_python(page: Path) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language in PYTHON:
            ast.parse(block.text, f"{page.name}:{block.line}")


def missing_path(quoted: str) -> bool:
    """Whether text in backticks looks like a path of this repository and is none; a pattern must match something."""
    path = re.sub(r"(::\S+|:\d+(-\d+)?)$", "", quoted)
    if not re.fullmatch(r"[\w.*/-]+", path):
        return False
    top = path.split("/")[0]
    if not ("/" in path and top in TOP_FOLDERS) and not TOP_FILE.fullmatch(path):
        return False
    return not any(ROOT.glob(path.rstrip("/")))


def missing_module(quoted: str) -> bool:
    """Whether text in backticks is a dotted name under st_moe that cannot be imported."""
    if not re.fullmatch(r"st_moe(\.[A-Za-z_]\w*)+", quoted):
        return False
    parts = quoted.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[depth:]:
            if not hasattr(found, attribute):
                return True
            found = getattr(found, attribute)
        return False
    return True


@pytest.mark.parametrize("page", [*PAGES, *ALSO_LINKED], ids=name_of)
def test_named_paths_and_modules_exist(page: Path) -> None:
    quoted = {token.content for token in parse(page.read_text(encoding="utf-8")) if token.type == "code_inline"}
    missing = sorted(text for text in quoted if missing_path(text) or missing_module(text))
    assert not missing, f"{page.name} names {missing}"


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    tokens = parse(page.read_text(encoding="utf-8"))
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links_of(text: str) -> set[str]:
    """Targets of the links and pictures of a page, those in HTML too."""
    targets = set()
    for token in parse(text):
        if token.type in ("link_open", "image"):
            targets.add(str(token.attrs.get("href") or token.attrs.get("src") or ""))
        elif token.type in ("html_block", "html_inline"):
            targets.update(re.findall(r'(?:href|src)="([^"]*)"', token.content))
    return targets


def broken_link(page: Path, target: str) -> bool:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return False
    file = (page.parent / unquote(parts.path)) if parts.path else page
    if not file.exists() or ROOT not in (file.resolve(), *file.resolve().parents):
        return True
    return bool(parts.fragment) and file.suffix == ".md" and unquote(parts.fragment) not in anchors_of(file)


@pytest.mark.parametrize("page", [*PAGES, *ALSO_LINKED], ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = sorted(target for target in links_of(page.read_text(encoding="utf-8")) if broken_link(page, target))
    assert not broken, f"{page.name} links to {broken}"


# The checks themselves: each must be able to fail.


@pytest.mark.parametrize(
    "text",
    [
        "```python\nraise SystemExit(3)\n```",
        "```bash\nfalse\n```",
        "```bash\nfalse | true\n```",
        "```console\n$ false\noutput\n```",
        "```python\nx = 1\n```\n\n```python\nassert x == 2\n```",
    ],
)
def test_failing_block_is_seen(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert run_page(page, tmp_path).returncode != 0


def test_blocks_share_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "- in a list:\n\n  ```python\n  import pathlib, pickle\n  class A: pass\n  pickle.dumps(A())\n  ```\n\n"
        '```python no-run="never"\nraise SystemExit(1)\n```\n\n'
        "```console\n$ echo one > file\nsome output\n$ cat file\n```\n\n"
        "```python\nassert pathlib.Path('file').read_text() == 'one\\n'\nA()\n```\n",
        encoding="utf-8",
    )
    run = run_page(page, tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("text", ["```\nx\n```", "```python no-run\nx\n```", '```bash no-run=""\nx\n```'])
def test_vague_fence_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"fence needs a language|no-run needs a reason"):
        blocks_of(text)


@pytest.mark.parametrize("quoted", ["modeling/nowhere.py", "docs/none*.md", "NOWHERE.md", "tests/none.py::test_a"])
def test_missing_path_is_seen(quoted: str) -> None:
    assert missing_path(quoted)


@pytest.mark.parametrize("quoted", ["tests/test_docs.py:12", "tests/", "Makefile", "a/b", "x"])
def test_other_text_is_no_missing_path(quoted: str) -> None:
    assert not missing_path(quoted)


def test_missing_module_is_seen() -> None:
    assert missing_module("st_moe.nowhere")
    assert not missing_module("torch.nowhere")


def test_broken_link_is_seen(tmp_path: Path) -> None:
    assert broken_link(README, "docs/nowhere.md")
    assert broken_link(ROOT / "CHANGELOG.md", "CHANGELOG.md#nowhere")
    assert broken_link(README, str(Path("..") / ROOT.name / ".." / "outside"))
    assert not broken_link(ROOT / "CHANGELOG.md", "CHANGELOG.md#unreleased")
    assert not broken_link(README, "https://example.org/x")
    assert links_of('[a](b.md) ![p](c.png) <img src="d.png">') == {"b.md", "c.png", "d.png"}
