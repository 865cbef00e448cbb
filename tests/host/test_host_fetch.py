"""Fetching the host's tests: what is refused, what the messages say, and that ranks cannot fail in silence."""

import hashlib
import io
import json
import operator
import tarfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import fetch
from .stubs import distributed

VERSION = "1.2.3"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """An index of one release, as url -> answer; the cache is an empty folder."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in (*fetch.TEST_FILES, "test_other.py"):
            member = tarfile.TarInfo(f"transformers-{VERSION}/tests/{name}")
            content = f"name = {name!r}\n".encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = archive.getvalue()
    entry = {"filename": f"transformers-{VERSION}.tar.gz", "url": "../../files/a.tar.gz"}
    listing = {"files": [{**entry, "hashes": {"sha256": hashlib.sha256(content).hexdigest()}}]}
    answers = {
        "https://index.test/simple/transformers/": json.dumps(listing).encode(),
        "https://index.test/files/a.tar.gz": content,
    }

    def read(request: urllib.request.Request) -> bytes:
        if request.full_url not in answers:
            raise OSError("no route to host")
        return answers[request.full_url]

    monkeypatch.setenv("PIP_INDEX_URL", "https://index.test/simple")
    monkeypatch.setattr(fetch, "_read", read)
    monkeypatch.setattr(fetch, "CACHE", tmp_path)
    monkeypatch.setattr(fetch, "installed_version", lambda: VERSION)
    monkeypatch.setattr(fetch, "sys", SimpleNamespace(path=[]))
    return answers


@pytest.mark.host
def test_only_the_needed_files_and_our_stubs_are_kept(index: dict[str, bytes], tmp_path: Path) -> None:
    package = fetch.install()
    kept = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert kept == {*fetch.TEST_FILES, *fetch.STUB_FILES}
    assert (package / "test_fsdp_mixin.py").read_text() == "name = 'test_fsdp_mixin.py'\n"
    assert (tmp_path / ".gitignore").read_text() == "*\n"
    assert fetch.sys.path == [str(package.parent)]
    index.clear()
    assert fetch.install() == package, "the second time needs no network"


@pytest.mark.host
def test_a_changed_stub_replaces_the_old_one(index: dict[str, bytes]) -> None:
    package = fetch.install()
    (package / "distributed_testing_utils.py").write_text("old")
    fetch.install()
    assert (package / "distributed_testing_utils.py").read_text() == (fetch.STUBS / "distributed.py").read_text()


@pytest.mark.host
def test_offline_says_what_to_do(index: dict[str, bytes], tmp_path: Path) -> None:
    index.clear()
    with pytest.raises(fetch.HostTestsUnavailableError, match=r"no route to host.*ST_MOE_HOST_TESTS=skip"):
        fetch.install()
    assert not list(tmp_path.iterdir())


@pytest.mark.host
def test_another_content_than_the_index_states_is_refused(index: dict[str, bytes], tmp_path: Path) -> None:
    index["https://index.test/files/a.tar.gz"] += b"!"
    with pytest.raises(fetch.HostTestsUnavailableError, match="sha256"):
        fetch.install()
    assert not list(tmp_path.iterdir())


@pytest.mark.host
def test_a_version_that_the_index_lacks_is_named(index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "installed_version", lambda: "9.9.9.dev0")
    with pytest.raises(fetch.HostTestsUnavailableError, match=r"lists no transformers-9\.9\.9\.dev0\.tar\.gz"):
        fetch.install()


@pytest.mark.host
def test_a_release_without_the_tests_is_named(index: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TEST_FILES", ("test_new_mixin.py",))
    with pytest.raises(fetch.HostTestsUnavailableError, match=r"has no test_new_mixin\.py"):
        fetch.install()


@pytest.mark.host
@pytest.mark.parametrize(("value", "expected"), [("", False), ("skip", True)])
def test_leaving_out(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv(fetch.LEFT_OUT, value)
    assert fetch.left_out() is expected


@pytest.mark.host
def test_leaving_out_by_a_wrong_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fetch.LEFT_OUT, "no")
    with pytest.raises(ValueError, match="ST_MOE_HOST_TESTS: must be unset or 'skip', got 'no'"):
        fetch.left_out()


@pytest.mark.host
@pytest.mark.distributed
def test_a_rank_that_fails_fails_the_run() -> None:
    distributed.run_distributed(2)(operator.floordiv)(1)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError"):
        distributed.run_distributed(2)(operator.floordiv)(0)


@pytest.mark.host
@pytest.mark.distributed
def test_a_rank_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "RUN_TIMEOUT_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="2 ranks of sleep_long did not end in 1 s"):
        distributed._start_rank_processes(sleep_long, (), 2)
    assert time.monotonic() - start < 30


def sleep_long(rank: int) -> None:
    """Longer than any test may take."""
    time.sleep(600)
