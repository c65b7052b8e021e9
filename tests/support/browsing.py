"""A real browser where there is one, and pages in it of a scripted server.

It takes Chromium, and Playwright to drive it (the extra `browser`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from sortserve.cost.model import CostModel
from support.http_service import HttpService, listening, make_service
from support.scripted import FakeClock, next_letter

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, LocatorAssertions, Page

__all__ = ["Site", "Visit", "open_browser", "open_site"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 60_000
"""For what should come at once: a machine may be busy."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium without a window; the test is skipped where there is none."""
    reason = "the extra `browser` is not installed"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on the PATH, and no variable CHROMIUM that names one")
    with playwright.sync_playwright() as driver:
        # A sandbox cannot be had as root or in most containers; all pages here are our own.
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=WAIT_MS
        )
        playwright.expect.set_options(timeout=WAIT_MS)
        yield browser
        browser.close()


def open_site(stack: ExitStack, **options: Any) -> Site:
    """A server on loopback over the scripted model, which takes a millisecond a layer.

    Args:
        stack: ends it.
        options: of ``make_service``.
    """
    clock = FakeClock()

    def rule(tokens: Sequence[int], exit_layer: int) -> int:
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


@dataclass
class Site:
    """A running server."""

    service: HttpService
    url: str
    stack: ExitStack
    """What ends with the test, before the server does."""

    def visit(
        self, browser: Browser, *, ready: bool = True, path: str = "/", **context: Any
    ) -> Visit:
        """Open the page in a fresh profile; ``ready``: wait until it knows the exits."""
        options = {"viewport": {"width": 1280, "height": 860}, **context}
        page = self.page(browser, **options)
        page.set_default_timeout(WAIT_MS)
        visit = Visit(self, page)
        page.on("request", lambda request: visit.requests.append(request.url))
        page.on("pageerror", lambda error: visit.errors.append(str(error)))
        page.goto(self.url + path)
        if ready:
            page.wait_for_selector(".example")
        return visit

    def page(self, browser: Browser, **context: Any) -> Page:
        """An empty page in a fresh profile, which closes before the server waits for it."""
        profile = browser.new_context(**context)
        self.stack.callback(profile.close)
        return profile.new_page()


class Visit:
    """One open page, what it has asked for, and what went wrong in its scripts."""

    def __init__(self, site: Site, page: Page) -> None:
        self.site = site
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []

    def expect(self, selector: str) -> LocatorAssertions:
        """What must come true of an element in time."""
        from playwright.sync_api import expect  # only where there is a browser

        return expect(self.page.locator(selector))

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def wait_until_over(self) -> None:
        self.page.wait_for_selector("#send-button:not([hidden])")

    def answer(self, prompt: str) -> Locator:
        """Ask, and the element of the answer once it is over."""
        self.ask(prompt)
        self.wait_until_over()
        return self.page.locator(".answer").last

    def compare(self) -> None:
        self.page.check("input[name=mode][value=compare]", force=True)

    def has_no_sideways_scroll(self) -> bool:
        """Whether nothing is wider than the window: neither the page nor what scrolls in it."""
        return bool(
            self.page.evaluate(
                """() => [document.documentElement, document.querySelector("#scroller"),
                          document.querySelector("#panel")]
                    .every((element) => element.scrollWidth <= element.clientWidth)"""
            )
        )
