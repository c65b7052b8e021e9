"""The examples are short and run, here against a scripted server."""

from __future__ import annotations

import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import sortserve_client

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.py"))
OF_THE_CLIENT = [path for path in EXAMPLES if "sortserve_client" in path.read_text()]
BUDGET = {"exit_layer": 9, "actual_ms": 12.0, "tpot_ms": 3.0}


def answer(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/exits":
        return httpx.Response(200, json={"exits": [{"exit_layer": 9}, {"exit_layer": 30}]})
    body = json.loads(request.content)
    choice: dict[str, Any] = {"index": 0, "text": "Paris.\n", "finish_reason": "stop"}
    reply = {"id": "gen-1", "model": "tiny", "choices": [choice], "budget": BUDGET}
    if not body.get("stream"):
        return httpx.Response(200, json=reply)
    return httpx.Response(200, text=f"data: {json.dumps(reply)}\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("path", OF_THE_CLIENT, ids=lambda path: path.name)
def test_an_example_runs_and_prints_the_answer(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = httpx.MockTransport(answer)
    for name, http in (("Client", httpx.Client), ("AsyncClient", httpx.AsyncClient)):
        client = getattr(sortserve_client, name)
        monkeypatch.setattr(
            sortserve_client, name, partial(client, http_client=http(transport=transport))
        )

    runpy.run_path(str(path), run_name="__main__")

    assert "Paris." in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_on_a_screen(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 30
