"""The playground and its files as a browser asks for them. `tests/browser` uses the page itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import sortserve.api
from support.http_service import HttpService

FOLDER = Path(sortserve.api.__file__).parent / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PATHS = ["/", *(f"/playground/{name}" for name in FILES)]
MAX_PAGE_BYTES = 100_000
MAX_LINES = 350


async def test_the_page_is_html(shared: HttpService) -> None:
    reply = await shared.get("/")

    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>sortserve playground</title>" in reply.text


@pytest.mark.parametrize("name", FILES)
async def test_each_file_has_its_type(shared: HttpService, name: str) -> None:
    reply = await shared.get(f"/playground/{name}")

    assert reply.status_code == 200
    assert reply.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_may_load_from_this_server_alone(shared: HttpService, path: str) -> None:
    headers = (await shared.get(path)).headers

    policy = dict(
        part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", PATHS)
async def test_a_browser_keeps_a_file_and_asks_whether_it_has_changed(
    shared: HttpService, path: str
) -> None:
    first = await shared.get(path)
    again = await shared.get(path, **{"if-none-match": first.headers["etag"]})
    other = await shared.get(path, **{"if-none-match": '"another"'})

    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert (other.status_code, other.content) == (200, first.content)


async def test_head_is_answered(shared: HttpService) -> None:
    async with shared.client() as client:
        reply = await client.head("/")

    assert (reply.status_code, reply.content) == (200, b"")


async def test_all_that_the_page_names_is_there_and_relative(shared: HttpService) -> None:
    texts = {path: (await shared.get(path)).text for path in PATHS}

    page = re.findall(r'(?:src|href)="(?!#|docs)([^"]+)"', texts["/"])
    modules = re.findall(r'from "\./([^"]+)"', "".join(texts.values()))
    named = {*page, *(f"playground/{name}" for name in modules)}
    assert {f"/{name}" for name in named} == set(PATHS) - {"/"}
    # Names of namespaces are no addresses.
    elsewhere = [
        url
        for text in texts.values()
        for url in re.findall(r"https?://[^\s\"'`<>]+", text)
        if not url.startswith("http://www.w3.org/")
    ]
    assert elsewhere == []


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_PAGE_BYTES


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_scripts_stay_short_and_read_nothing_as_html(name: str) -> None:
    text = (FOLDER / name).read_text()

    assert len(text.splitlines()) <= MAX_LINES
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.mark.parametrize(
    "path", ["/playground/index.htm", "/playground/..%2fapp.py", "/playground/", "/playground"]
)
async def test_there_is_nothing_else_in_its_folder(shared: HttpService, path: str) -> None:
    reply = await shared.get(path)

    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "not_found_error"


async def test_it_can_be_switched_off(make: Callable[..., HttpService]) -> None:
    service = make(playground=False)

    assert [(await service.get(path)).status_code for path in PATHS] == [404] * len(PATHS)


async def test_the_page_needs_no_key_and_what_it_asks_of_the_api_does(
    make: Callable[..., HttpService],
) -> None:
    service = make(api_keys=("k",), root_path="/llm")

    pages = [(await service.get(path)).status_code for path in (*PATHS, "/llm/")]
    asked = [(await service.get(path)).status_code for path in ("/exits", "/status", "/x/")]

    assert pages == [200] * len(pages)
    assert asked == [401] * 3


async def test_a_page_that_is_off_is_no_open_door(make: Callable[..., HttpService]) -> None:
    service = make(api_keys=("k",), playground=False, enable_docs=False)

    replies = [(await service.get(path)).status_code for path in (*PATHS, "/docs")]

    assert replies == [401] * len(replies)
