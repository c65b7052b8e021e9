"""The playground in a real browser, over the scripted model: what a reader sees and can do.

The model answers with the letters of the alphabet that follow the prompt's last one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from sortserve.core.budget import Budget
from support.browsing import Site, Visit, open_browser, open_site

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Serve = Callable[..., Site]

pytestmark = pytest.mark.browser

MAX_FIRST_BYTES = 100_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ends with its module: Playwright's event loop must be gone when other tests start theirs."""
    with open_browser() as browser:
        yield browser


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers, which end with the test."""
    with ExitStack() as stack:
        yield partial(open_site, stack)


@pytest.fixture
def visit(browser: Browser, serve: Serve) -> Visit:
    return serve().visit(browser)


def run_colours(visit: Visit) -> list[str]:
    return [
        run.evaluate("e => getComputedStyle(e).borderBottomColor")
        for run in visit.page.locator(".run").all()
    ]


# ---- an answer ----


def test_tokens_are_shown_as_they_come(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    page, runner = visit.page, site.service.runner
    runner.gated = True
    page.fill("#max_tokens", "5")

    visit.ask("a")
    for _ in range(2):
        runner.permits.release()
    visit.expect(".tokens").to_have_text("bc")
    assert page.get_attribute(".answer", "aria-busy") == "true"
    assert page.text_content(".state") == "Exit 6, 2 tokens"
    runner.open()
    visit.wait_until_over()

    assert page.text_content(".tokens") == "bcdef"
    assert page.get_attribute(".answer", "aria-busy") == "false"
    assert "5 tokens, exit 6" in (page.text_content("#announcer") or "")
    assert visit.errors == []


def test_an_answer_says_what_was_predicted_what_it_took_and_what_it_saved(visit: Visit) -> None:
    visit.page.fill("#max_tokens", "4")
    visit.page.fill("#latency_ms", "20")
    visit.page.fill("#ttft_ms", "10")

    answer = visit.answer("a")

    # At a millisecond a layer, with a safety factor of 1.2, exit 6 is predicted to take 28.8 ms.
    assert answer.locator(".badge").text_content() == "✓ Budget met"
    assert answer.locator(".metrics").inner_text().split("\n") == [
        *("First token", "4 ms", "predicted 4.8 ms", "limit 10 ms"),
        *("Each token", "4 ms", "predicted 4.8 ms"),
        *("Total", "16 ms", "predicted 19.2 ms", "limit 20 ms"),
        *("Compute saved", "25 %", "of full depth"),
    ]


def test_a_missed_budget_is_told(visit: Visit) -> None:
    visit.page.fill("#max_tokens", "4")
    visit.page.fill("#latency_ms", "7")

    answer = visit.answer("a")

    assert answer.locator(".badge").text_content() == "✕ Budget missed"
    assert "16 ms" in answer.locator(".metrics .late").inner_text()


def test_each_token_has_the_colour_of_its_exit(browser: Browser, serve: Serve) -> None:
    site = serve(default_budget=Budget.from_mapping({"schedule": [[0, 6], [3, 4], [5, 2]]}))
    visit = site.visit(browser)
    visit.page.fill("#max_tokens", "8")
    visit.answer("a")

    runs = visit.page.locator(".run")
    colours = run_colours(visit)
    legend = visit.page.locator("#legend .swatch").all()
    swatches = [s.evaluate("e => getComputedStyle(e).backgroundColor") for s in legend]
    assert [run.text_content() for run in runs.all()] == ["bcd", "ef", "ghi"]
    assert [run.get_attribute("data-exit") for run in runs.all()] == ["6", "4", "2"]
    assert colours == swatches[::-1]
    assert len(set(colours)) == 3
    # Not by colour alone: where the exit changes, it is written.
    assert visit.page.locator(".change").all_text_contents() == ["exit 4", "exit 2"]
    assert visit.page.get_attribute(".answer .depthbar", "aria-label") == (
        "Tokens by exit: 3 at exit 6, 2 at exit 4, 3 at exit 2"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_of_the_exits_are_a_scale_of_lightness(
    browser: Browser, serve: Serve, scheme: str
) -> None:
    """So that they can be told apart, and ranked, in every kind of colour blindness and in grey."""
    visit = serve().visit(browser, color_scheme=scheme)

    lightness = visit.page.evaluate(
        """() => [0, 1, 2, 3, 4].map((i) => {
            const hex = getComputedStyle(document.documentElement).getPropertyValue(`--ramp-${i}`);
            const [r, g, b] = hex.trim().match(/[0-9a-f]{2}/gi).map((h) => {
                const c = parseInt(h, 16) / 255;
                return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            return 116 * Math.cbrt(0.2126 * r + 0.7152 * g + 0.0722 * b) - 16;
        })"""
    )

    steps = [a - b for a, b in pairwise(lightness)]
    assert min(steps) > 4


def test_an_answer_can_be_stopped(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    page, runner = visit.page, site.service.runner
    runner.gated = True

    visit.ask("a")
    runner.permits.release()
    page.wait_for_selector(".run")
    page.click("#stop-button")
    visit.wait_until_over()
    runner.open()

    assert page.text_content(".state") == "Stopped after 1 token"
    assert site.service.ended.run_until(1, lambda: None)[0].finish_reason == "abort"


def test_the_next_turn_knows_the_last_ones_and_the_system_prompt(visit: Visit) -> None:
    page = visit.page
    page.fill("#max_tokens", "2")
    page.click("summary:has-text('System prompt')")
    page.fill("#system", "s")
    visit.answer("a")
    with page.expect_request("**/generate") as second:
        visit.ask("q")
    visit.wait_until_over()

    body = second.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "q"},
    ]
    assert page.locator(".tokens").all_text_contents() == ["bc", "rs"]

    page.click("#new-button")
    assert page.is_visible("#welcome")


def test_the_fields_become_the_request(visit: Visit) -> None:
    page = visit.page
    page.click("summary:has-text('More sampling')")
    fields = {
        **{"latency_ms": "900", "ttft_ms": "200", "tpot_ms": "25.5", "compute": "80"},
        **{"min_quality": "0.6", "max_tokens": "3", "temperature": "0.5", "top_p": "0.9"},
        **{"top_k": "40", "min_p": "0.05", "repetition_penalty": "1.1", "seed": "7"},
        **{"presence_penalty": "0.1", "frequency_penalty": "-0.1", "stop": "END"},
    }
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.select_option("#min_exit_layer", "4")
    page.select_option("#on_miss", "truncate")

    with page.expect_request("**/generate") as request:
        visit.ask("a")
    visit.wait_until_over()

    sampling = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert request.value.post_data_json == {
        "messages": [{"role": "user", "content": "a"}],
        **{name: float(fields[name]) for name in sampling},
        **{"presence_penalty": 0.1, "frequency_penalty": -0.1, "seed": 7, "stop": ["END"]},
        "budget": {
            **{"latency_ms": 900, "ttft_ms": 200, "tpot_ms": 25.5, "compute": 0.8},
            **{"min_quality": 0.6, "min_exit_layer": 4, "on_miss": "truncate"},
        },
        "stream": True,
    }


def test_a_schedule_is_written_in_pairs(visit: Visit) -> None:
    page = visit.page
    page.fill("#max_tokens", "8")
    page.fill("#schedule", "0:6, 3:4 5:2")
    assert page.text_content("#budget-summary") == "exit 6, then 4, then 2"
    # As predicted a token takes 7.2, 4.8 and 2.4 ms at exits 6, 4 and 2.
    assert page.text_content("#forecast") == "By the schedule: about 38.4 ms for 8 tokens."

    with page.expect_request("**/generate") as request:
        visit.ask("a")
    visit.wait_until_over()

    assert request.value.post_data_json["budget"] == {"schedule": [[0, 6], [3, 4], [5, 2]]}
    assert page.locator(".run").all_text_contents() == ["bcd", "ef", "ghi"]


def test_a_schedule_that_is_none_is_refused_as_the_api_says(visit: Visit) -> None:
    visit.page.fill("#schedule", "deep, then shallow")

    visit.answer("a")

    assert "budget.schedule" in (visit.page.text_content(".error") or "")


def test_the_slider_says_which_exit_a_time_would_buy(visit: Visit) -> None:
    page = visit.page
    page.fill("#max_tokens", "10")
    # Exit 4 takes 48 ms for ten tokens as predicted, exit 6 takes 72.
    said = {}
    for latency in ("60", "80", "20"):
        page.fill("#latency_ms", latency)
        said[latency] = page.text_content("#forecast")

    assert said == {
        "60": "Likely exit 4: about 48 ms for 10 tokens.",
        "80": "Likely exit 6 (full depth): about 72 ms for 10 tokens.",
        "20": "No exit fits now: the answer comes late.",
    }


def test_a_newcomer_has_three_things_to_click(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    page = visit.page
    page.fill("#max_tokens", "4")
    page.click(".example >> nth=1")  # 128 tokens at exit 4 are predicted to take 614 ms
    visit.wait_until_over()
    assert page.locator(".example").all_inner_texts()[1].startswith("At most 620 ms")
    assert site.service.ended.reports[0].budget.latency_ms == 620

    page.click("#new-button")
    page.click(".example >> nth=2")
    visit.wait_until_over()
    assert page.locator(".lane .run").count() == 3
    assert len(site.service.ended.reports) == 1 + 3


# ---- comparing ----


def test_four_budgets_run_side_by_side_in_one_batch(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    page, service = visit.page, site.service
    page.fill("#max_tokens", "6")
    visit.compare()
    while page.is_visible("#add-lane"):
        page.click("#add-lane")
    for lane, exit_layer in enumerate(("", "6", "4", "2")):
        page.click(f"#lane-{lane}")
        page.fill("#latency_ms", "")
        page.select_option("#exit_layer", exit_layer)
    service.runner.gated = True

    with page.expect_response(lambda reply: reply.request.method == "POST"):
        visit.ask("a")
    visit.expect(".state").to_have_text([re.compile("^Starts")] * 4)
    service.runner.open()
    visit.wait_until_over()

    lanes = page.locator(".lane").all()
    assert [lane.locator(".tokens").text_content() for lane in lanes] == ["bcdefg"] * 4
    exits = [lane.locator(".run").get_attribute("data-exit") for lane in lanes]
    assert exits == ["6", "6", "4", "2"]
    assert max(len(plan.rows) for plan in service.runner.plans) == 4
    tops = {round(lane.bounding_box()["y"]) for lane in lanes}
    assert len(tops) <= 2, "two by two, or all in a row"
    shares = [
        float(bar.evaluate("e => getComputedStyle(e).getPropertyValue('--share')"))
        for bar in page.locator(".timebar").all()
    ]
    assert max(shares) == 1


def test_lanes_have_budgets_of_their_own(visit: Visit) -> None:
    page = visit.page
    visit.compare()
    num_lanes = page.locator(".lane").count()
    page.click("#lane-1")
    page.fill("#latency_ms", "1234")
    page.click("#lane-0")

    assert page.input_value("#latency_ms") == ""
    assert "1,234 ms" in page.inner_text("#lane-1")
    page.click("[aria-label='Remove budget B']")
    assert page.locator(".lane").count() == num_lanes - 1


# ---- errors and keys ----


def test_an_error_is_shown_as_the_api_said_it(visit: Visit) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}],
        "budget": {"exit_layer": 4, "compute": 0.5},
    }
    said = httpx.post(f"{visit.site.url}/generate", json=body).json()["error"]
    visit.page.select_option("#exit_layer", "4")
    visit.page.fill("#compute", "50")

    visit.answer("a")

    box = visit.page.locator(".error[role=alert]")
    assert box.locator("p").first.text_content() == said["message"]
    assert box.locator(".facts").text_content() == f"HTTP 400 · {said['param']} · {said['type']}"


def test_a_refused_budget_says_when_to_come_back(visit: Visit) -> None:
    visit.page.fill("#latency_ms", "1")
    visit.page.select_option("#on_miss", "reject")

    visit.answer("a")

    facts = visit.page.text_content(".error .facts") or ""
    assert facts.startswith("HTTP 429 · ")
    assert "budget_unattainable" in facts


def test_an_error_in_mid_stream_is_shown_beside_what_came(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    runner = site.service.runner
    runner.gated = True
    visit.ask("a")
    runner.permits.release()
    visit.page.wait_for_selector(".run")
    site.service.worker.fail("the test says so")
    runner.open()
    visit.wait_until_over()

    assert visit.page.text_content(".tokens") == "b"
    assert visit.page.is_visible(".error")


def test_a_server_that_is_gone_is_told(visit: Visit) -> None:
    visit.page.route("**/generate", lambda route: route.abort())

    visit.answer("a")

    assert (visit.page.text_content(".error p") or "").startswith("No answer came from ")


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(
    browser: Browser, serve: Serve
) -> None:
    visit = serve(api_keys=("right",)).visit(browser, ready=False)
    page = visit.page
    page.wait_for_selector("#key-dialog[open]")
    assert (page.text_content("#key-message") or "").startswith("An API key is needed.")

    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    visit.expect("#key-message").to_contain_text("The API key is wrong.")
    page.fill("#key", "right")
    page.press("#key", "Enter")
    page.wait_for_selector(".example")
    page.fill("#max_tokens", "2")

    assert visit.answer("a").locator(".tokens").text_content() == "bc"
    kept = "[sessionStorage.getItem('sortserve.key'), JSON.stringify(localStorage)]"
    session, local = page.evaluate(kept)
    assert session == "right"
    assert "right" not in local


# ---- for everybody ----


def focused(visit: Visit) -> str:
    return str(visit.page.evaluate("document.activeElement.id || document.activeElement.name"))


def tab_to(visit: Visit, name: str) -> None:
    for _ in range(60):
        if focused(visit) == name:
            return
        visit.page.keyboard.press("Tab")
    raise AssertionError(f"the Tab key never comes to {name}")


def test_all_can_be_done_with_the_keyboard_alone(visit: Visit) -> None:
    page, keys = visit.page, visit.page.keyboard
    tab_to(visit, "skip-link")
    keys.press("Enter")
    assert focused(visit) == "prompt"

    tab_to(visit, "latency-slider")
    for _ in range(3):
        keys.press("ArrowLeft")
    assert page.inner_text("#budget-summary") != "no limit"
    tab_to(visit, "max_tokens")
    keys.type("2")  # Tab has selected what was there
    tab_to(visit, "prompt")
    keys.type("a")
    keys.press("Enter")
    visit.wait_until_over()
    assert page.text_content(".tokens") == "bc"

    tab_to(visit, "mode")
    keys.press("ArrowRight")
    assert page.is_visible("#lanes")
    tab_to(visit, "lane-1")
    keys.press("Enter")
    assert focused(visit) == "lane-1"
    assert page.get_attribute("#lane-1", "aria-pressed") == "true"
    tab_to(visit, "code-button")
    keys.press("Enter")
    page.wait_for_selector("#code-dialog[open]")
    keys.press("Escape")
    assert focused(visit) == "code-button"


def test_escape_stops_an_answer(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    site.service.runner.gated = True
    visit.ask("a")
    site.service.runner.permits.release()
    visit.page.wait_for_selector(".run")

    visit.page.keyboard.press("Escape")
    visit.wait_until_over()

    assert (visit.page.text_content(".state") or "").startswith("Stopped")


def test_nothing_scrolls_sideways_at_360_pixels(browser: Browser, serve: Serve) -> None:
    visit = serve().visit(browser, viewport={"width": 360, "height": 740}, has_touch=True)
    page = visit.page
    fits = {"first": visit.has_no_sideways_scroll()}
    page.click("#budget-button")
    fits["panel"] = visit.has_no_sideways_scroll() and page.is_visible("#latency_ms")
    page.click("summary:has-text('More sampling')")
    fits["sampling"] = visit.has_no_sideways_scroll()
    page.click("#close-panel")
    assert page.is_hidden("#latency_ms")
    visit.answer("w" * 200)
    fits["answer"] = visit.has_no_sideways_scroll()
    visit.compare()
    visit.answer("a")
    fits["compare"] = visit.has_no_sideways_scroll()

    assert fits == dict.fromkeys(fits, True)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_no_serious_fault(
    browser: Browser, serve: Serve, scheme: str, width: int
) -> None:
    pytest.importorskip("axe_playwright_python", reason="the extra `browser` is not installed")
    axe = (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
    visit = serve().visit(
        browser,
        color_scheme=scheme,
        viewport={"width": width, "height": 860},
        bypass_csp=True,  # or axe itself could not run in the page
        reduced_motion="reduce",
    )
    page = visit.page
    page.evaluate(axe)

    def faults(stage: str) -> list[str]:
        found = page.evaluate("axe.run()")["violations"]
        return [
            f"{stage}: {fault['id']}: {fault['nodes'][0]['html'][:200]}"
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]

    found = faults("first")
    page.fill("#max_tokens", "4", force=True)
    visit.answer("a")
    found += faults("answer")
    if width < 900:
        page.click("#budget-button")
    for summary in page.locator("summary").all():
        summary.click()
    page.select_option("#exit_layer", "4")
    page.fill("#compute", "50")
    found += faults("panel")
    if width < 900:
        page.click("#close-panel")
    visit.answer("a")
    found += faults("error")
    visit.compare()
    visit.answer("a")
    found += faults("compare")
    page.click("#code-button")
    found += faults("code")

    assert found == []


def test_colours_follow_the_system_until_the_reader_chooses(browser: Browser, serve: Serve) -> None:
    visit = serve().visit(browser, color_scheme="dark")
    page = visit.page
    theme = "document.documentElement.dataset.theme"

    before = page.evaluate(theme)
    page.click("[aria-label='Switch to light colours']")
    page.reload()

    assert (before, page.evaluate(theme)) == ("dark", "light")
    assert page.is_visible("[aria-label='Switch to dark colours']")


# ---- what goes over the wire ----


def test_the_first_paint_is_small_and_all_of_it_comes_from_this_server(
    browser: Browser, serve: Serve
) -> None:
    site = serve()
    page = site.page(browser)
    replies: list[Any] = []
    page.on("response", lambda reply: replies.append(reply))
    page.goto(site.url, wait_until="networkidle")
    sizes = [reply.request.sizes() for reply in replies]

    num_bytes = sum(size["responseBodySize"] + size["responseHeadersSize"] for size in sizes)
    assert 10_000 < num_bytes < MAX_FIRST_BYTES
    assert len(replies) > 10
    assert {httpx.URL(reply.url).host for reply in replies} == {"127.0.0.1"}


def test_no_request_ever_goes_elsewhere(visit: Visit) -> None:
    visit.page.fill("#max_tokens", "2")
    visit.answer("a")
    visit.compare()
    visit.answer("a")

    assert {url for url in visit.requests if not url.startswith(visit.site.url)} == set()
    assert visit.errors == []


def test_the_page_works_below_a_proxys_prefix(browser: Browser, serve: Serve) -> None:
    visit = serve(root_path="/llm").visit(browser, path="/llm/")
    visit.page.fill("#max_tokens", "2")

    assert visit.answer("a").locator(".tokens").text_content() == "bc"
    assert all("/llm/" in url for url in visit.requests)


def test_the_strip_shows_what_the_server_does(browser: Browser, serve: Serve) -> None:
    site = serve()
    visit = site.visit(browser)
    page = visit.page
    page.fill("#max_tokens", "4")
    page.fill("#latency_ms", "100")
    page.select_option("#exit_layer", "4")
    visit.answer("a")
    visit.expect("#s-met-of").to_have_text("1 of 1")

    assert page.text_content("#model") == "tiny"
    assert page.text_content("#s-met") == "100 %"
    assert page.text_content("#s-saved") == "33 %"

    site.service.runner.gated = True
    visit.ask("a")
    site.service.runner.permits.release()
    visit.expect("#s-running").to_have_text("1")
    assert page.get_attribute("#s-rows", "aria-label") == "Running rows: 1 at exit 4"


# ---- code ----


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_copied_code_asks_the_same(browser: Browser, serve: Serve, language: str) -> None:
    if shutil.which("curl") is None and language == "curl":
        pytest.skip("there is no curl here")
    visit = serve(api_keys=("k'1",)).visit(browser, ready=False)
    page = visit.page
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "k'1")
    page.press("#key", "Enter")
    page.wait_for_selector(".example")
    page.fill("#max_tokens", "3")
    page.fill("#latency_ms", "1000")
    page.fill("#prompt", 'it\'s "a"\\ a')
    page.click("#code-button")
    page.check(f"input[name=language][value={language}]", force=True)
    code = page.text_content("#code-text") or ""

    command = ["sh", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    environment = {**os.environ, "SORTSERVE_API_KEY": "k'1"}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=True
    )

    assert "k'1" not in code
    if language == "curl":
        assert run.stdout.count('"exit_layer":6,"text":') == 3
        assert run.stdout.endswith("data: [DONE]\n\n")
    else:
        assert run.stdout.startswith("bcd")
        assert "tokens_by_exit={6: 3}" in run.stdout
    [report, *_] = visit.site.service.ended.reports
    assert report.budget.latency_ms == 1000


# ---- the API's own page ----


def test_the_documentation_takes_a_key_and_sends_what_it_fills_in(
    browser: Browser, serve: Serve
) -> None:
    visit = serve(api_keys=("right",)).visit(browser, ready=False, path="/docs")
    page = visit.page
    visit.expect("#key-message").to_contain_text("An API key is needed.")

    page.fill("#key", "right")
    page.press("#key", "Enter")
    page.click("#operations-sortserve-generate_generate_post .opblock-summary-control")
    with page.expect_response("**/generate") as reply:
        page.click("#operations-sortserve-generate_generate_post .execute")

    assert reply.value.status == 200
    assert reply.value.json()["budget"]["exit_layer"] == 6
    assert {url for url in visit.requests if not url.startswith(visit.site.url)} == set()
    assert visit.errors == []
