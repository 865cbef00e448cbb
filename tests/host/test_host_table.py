"""The table of skips fits the host's tests: no line without a test, no test with two lines, no class without tests."""

import inspect
import unittest
from fnmatch import fnmatchcase

import pytest

from . import test_host_common, test_host_distributed
from .harness import HostCase
from .skips import FAMILIES, SKIPS, Skip, complaint

pytestmark = pytest.mark.host

CASES = [
    value
    for module in (test_host_common, test_host_distributed)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, HostCase) and issubclass(value, unittest.TestCase)
]


def names_of_tests(family: str) -> set[str]:
    """Names of all test methods that run on a family."""
    return {name for case in CASES if case.family == family for name in unittest.TestLoader().getTestCaseNames(case)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_class_brings_tests(case: type[unittest.TestCase]) -> None:
    assert not inspect.isabstract(case), "pytest passes over abstract classes without a word"
    assert unittest.TestLoader().getTestCaseNames(case)


def test_every_family_has_a_class() -> None:
    assert {case.family for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("skip", SKIPS, ids=lambda skip: skip.tests[0])
def test_every_line_is_needed_and_complete(skip: Skip) -> None:
    assert skip.reason
    assert skip.says != ""
    assert skip.families
    for family in skip.families:
        for pattern in skip.tests:
            assert any(fnmatchcase(name, pattern) for name in names_of_tests(family)), (
                f"{pattern} names no test of {family}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_test_has_two_lines(family: str) -> None:
    for name in names_of_tests(family):
        assert sum(skip.covers(name, family) for skip in SKIPS) <= 1, name


@pytest.mark.parametrize(
    ("test", "outcome", "said", "problem"),
    [
        ("test_vision_axial_rope", "skipped", "X has no axial RoPE layer defined.", None),
        ("test_vision_axial_rope", "skipped", "out of memory", "another reason"),
        ("test_vision_axial_rope", "passed", "", "stale"),
        ("test_training", "skipped", "whatever", "without a line"),
        ("test_training", "passed", "", None),
    ],
)
def test_complaints(test: str, outcome: str, said: str, problem: str | None) -> None:
    found = complaint(test, "llama", outcome, said)
    assert found is None if problem is None else problem in found


def test_a_line_is_lifted_where_its_package_is_installed() -> None:
    lifted, kept = (Skip(("test_x",), "needs a package", says="", unless=name) for name in ("torch", "no_such_package"))
    assert not lifted.covers("test_x", "llama")
    assert kept.covers("test_x", "llama")
