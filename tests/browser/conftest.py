"""A real browser where there is one: Chromium, and Playwright to drive it (extra `browser`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from sortserve.cost.model import CostModel
from support.browsing import Site
from support.http_service import listening, make_service
from support.scripted import FakeClock, next_letter

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ends with its module: Playwright's event loop must be gone when other tests start theirs."""
    reason = "the extra `browser` is not installed"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on the PATH, and no variable CHROMIUM that names one")
    with playwright.sync_playwright() as driver:
        # A sandbox cannot be had as root or in most containers; all pages here are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    """Starts servers on loopback over the scripted model, which takes a millisecond a layer."""
    with ExitStack() as stack:

        def serve(**options: Any) -> Site:
            clock = FakeClock()

            def rule(tokens: Any, exit_layer: int) -> int:
                clock.now += exit_layer / 1e3
                return next_letter(tokens, exit_layer)

            engine = {"clock": clock, "min_quality": 0.5}
            service = make_service(rule=rule, engine_options=engine, **options)
            line = (0.0, 1e-3, 0.0, 0.0, 0.0)
            service.engine.costs.use(CostModel(line, line))
            stack.callback(service.worker.stop)
            url = stack.enter_context(listening(service.app))
            stack.callback(service.runner.open)
            return Site(service, url, stack)

        yield serve
