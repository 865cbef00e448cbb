"""Registers the host's marks, and holds every outcome against the table of skips."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from .fetch import left_out, unavailable
from .skips import complaint, skip_of

HERE = Path(__file__).resolve().parent

HOST_MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
)

# They import the fetched tests. When there are none, test_host_available.py says so in their stead.
NEED_HOST_TESTS = ("test_host_common.py", "test_host_distributed.py", "test_host_table.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: the host library's own common tests (make test-host)")
    for mark in HOST_MARKS:
        config.addinivalue_line("markers", f"{mark}: carried by tests of the host")
    if all(Path(argument.partition("::")[0]).resolve().is_relative_to(HERE) for argument in config.args):
        # The suite and its table of skips are about the CPU; other rooms in the same run may need the device.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be imported without the host's tests."""
    if collection_path.name in NEED_HOST_TESTS and (left_out() or unavailable() is not None):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that the table itself leaves out."""
    for item in items:
        family = _family_of(item)
        skip = skip_of(item.name, family) if family else None
        if skip is not None and skip.says is None:
            item.add_marker(pytest.mark.skip(reason=skip.reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip without a line in the table, and a line without a skip, into a failure.

    A test that skipped a part of itself counts as skipped.
    """
    report = yield
    family = _family_of(item)
    if family is None or report.failed or (report.passed and report.when != "call"):
        return report
    partly = _partly_skipped(item) if report.passed else None
    if partly is not None:
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: in part: {partly}")
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    problem = complaint(item.name, family, "passed" if report.passed else "skipped", said)
    if problem is not None:
        report.outcome, report.longrepr = "failed", problem
    return report


def _family_of(item: pytest.Item) -> str | None:
    """The dense family of a test that came from the host, None for tests of our own."""
    return getattr(getattr(item, "cls", None), "family", None)


def _partly_skipped(item: pytest.Item) -> str | None:
    """What the test said when it skipped a part of itself, or None."""
    from .harness import PARTLY_SKIPPED  # imports the fetched tests, so not before there are any

    return PARTLY_SKIPPED.get((item.cls.__name__, item.name))
