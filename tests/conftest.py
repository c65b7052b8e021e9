"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import settings

# Examples are searched for, not timed: a busy machine must not fail a law.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8, and some tests log half a surrogate pair."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report
