"""Whether the host's tests are here at all: without them this fails, unless they were left out knowingly."""

import pytest

from .fetch import LEFT_OUT, left_out, unavailable

pytestmark = pytest.mark.host


def test_host_tests_are_available() -> None:
    if left_out():
        pytest.skip(f"{LEFT_OUT}=skip leaves the host's tests out")
    reason = unavailable()
    assert reason is None, reason
