"""Settings of the whole suite."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from sortserve.core.user_cache import user_cache_dir
from sortserve.process.garbage import freeze_what_exists

# A cache of its own that outlives the run (kernels take a while to compile), so that hundreds of
# tiny checkpoints do not push out of the user's what he serves.
if "SORTSERVE_CACHE_DIR" not in os.environ and (cache := user_cache_dir()) is not None:
    os.environ["SORTSERVE_CACHE_DIR"] = str(cache.with_name("sortserve-tests"))

# Examples are searched for, not timed: a busy machine must not fail a law. They are the same in
# every run, so that a change is judged by what it changed; `make test-search` draws new ones.
settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="SORTSERVE_TEST_EXAMPLES" not in os.environ,
)
settings.load_profile("default")


LONG_FIRST = (
    *("e2e", "browser", "laws/test_training_laws.py", "laws/test_smollm2_laws.py"),
    *("laws", "trainer", "parity", "benchmarks", "api"),
)
"""Files and folders of tests that take long, longest first."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that two processes end at about the same time.

    For ``--no-loadscope-reorder``: xdist itself begins with the files that have most tests, and
    a whole program has a file of its own with one or two.
    """

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        found = (i for i, name in enumerate(LONG_FIRST) if f"/tests/{name}" in path)
        return next(found, len(LONG_FIRST))

    items.sort(key=place)  # keeps the order within a file


def pytest_collection_finish() -> None:
    """What libraries and tests have made by now stays: no collection need look at it again.

    They are a million objects, half a second for each ``gc.collect()`` in what is tested.
    """
    freeze_what_exists()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8, and some tests log half a surrogate pair."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report
