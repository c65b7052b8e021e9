"""The command line: exit codes, one line per mistake, and answers from a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sortserve import __version__
from sortserve.cli import main

BUDGET = {
    "exit_layer": 9,
    "tokens_by_exit": {"18": 1, "9": 2},
    "predicted_ms": 760,
    "actual_ms": 741.2,
    "ttft_ms": 62.0,
    "met": True,
}


class FakeServer(BaseHTTPRequestHandler):
    """Answers ``/generate`` as a sortserve does, and remembers what it was asked."""

    asked: ClassVar[list[dict[str, Any]]]
    keys: ClassVar[list[str | None]]
    status: ClassVar[int]
    error: ClassVar[dict[str, Any]]
    texts: ClassVar[tuple[str, ...]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.keys.append(self.headers["Authorization"])
        if self.status != 200:
            self._reply("application/json", json.dumps({"error": self.error}))
        elif body.get("stream"):
            self._reply("text/event-stream", "".join(f"data: {e}\n\n" for e in self._events()))
        else:
            choice = {
                "index": 0,
                "text": "".join(self.texts),
                "finish_reason": "stop",
                "budget": BUDGET,
            }
            answer = {"id": "g-1", "model": "tiny", "choices": [choice]}
            self._reply("application/json", json.dumps(answer))

    def _events(self) -> Iterator[str]:
        for text in self.texts:
            yield json.dumps({"id": "g-1", "choices": [{"index": 0, "text": text}]})
        last = {"index": 0, "text": "", "finish_reason": "stop", "budget": BUDGET}
        yield json.dumps({"id": "g-1", "choices": [last]})
        yield "[DONE]"

    def _reply(self, content_type: str, body: str) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeServer]]:
    handler = type(
        "Handler",
        (FakeServer,),
        {"asked": [], "keys": [], "status": 200, "error": {}, "texts": ("It ", "falls", ".")},
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("SORTSERVE_URL", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.delenv("SORTSERVE_API_KEY", raising=False)
        yield handler
        http.shutdown()
        thread.join()


# generate


def test_an_answer_streams_to_the_terminal_and_its_story_goes_to_stderr(
    server: type[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "What is gravity?", "--budget-ms", "800"]) == 0

    shown = capsys.readouterr()
    assert shown.out == "It falls.\n"
    assert shown.err == (
        "exit 9 (2 tokens), 18 (1 tokens) | 741 ms, predicted 760 | first token 62 ms "
        "| budget met\n"
    )
    assert server.asked[0]["stream"] is True


def test_an_answer_may_come_in_one_piece(
    server: type[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "What is gravity?", "--no-stream"]) == 0

    assert capsys.readouterr().out == "It falls.\n"
    assert "stream" not in server.asked[0]


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "\ufffd[2J\n"), (False, "\033[2J\n")])
@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_model_cannot_move_the_cursor_of_a_terminal(
    server: type[FakeServer],
    is_terminal: bool,
    shown: str,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    server.texts = ("\033[2J",)

    assert main(["generate", "Hi", *flags]) == 0

    assert capsys.readouterr().out == shown


def test_flags_become_fields_of_the_request(server: type[FakeServer]) -> None:
    arguments = ["--budget-ms=800", "--ttft-ms=100", "--tpot-ms=20", "--compute=0.5"]
    arguments += ["--min-exit-layer=9", "--min-quality=0.8", "--on-miss=reject", "--seed=3"]
    arguments += ["--max-tokens=7", "--temperature=0", "--model=tiny@9", "--api-key=k1,k2"]
    arguments += ["--priority=-2", "--service-tier=flex"]

    main(["generate", "Hi", *arguments])

    assert server.asked[0] == {
        "stream": True,
        "messages": [{"role": "user", "content": "Hi"}],
        "budget": {
            "latency_ms": 800,
            "ttft_ms": 100,
            "tpot_ms": 20,
            "compute": 0.5,
            "min_exit_layer": 9,
            "min_quality": 0.8,
            "on_miss": "reject",
        },
        "model": "tiny@9",
        "max_tokens": 7,
        "temperature": 0,
        "seed": 3,
        "priority": -2,
        "service_tier": "flex",
    }
    assert server.keys == ["Bearer k1"]


def test_a_schedule_is_typed_as_parts_and_sent_as_pairs(server: type[FakeServer]) -> None:
    main(["generate", "Hi", "--schedule", "0:30,32:27,96:24"])

    assert server.asked[0]["budget"] == {"schedule": [[0, 30], [32, 27], [96, 24]]}


@pytest.mark.parametrize("typed", ["0:30,32", "1:30", "0:18,5:30", "0:30,32:1e1"])
def test_a_schedule_that_cannot_be_is_refused_before_anything_is_sent(
    server: type[FakeServer], typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hi", "--schedule", typed]) == 2

    assert f"argument --schedule: '{typed}' is not a schedule: " in capsys.readouterr().err
    assert server.asked == []


def test_a_raw_prompt_is_sent_without_a_conversation_around_it(server: type[FakeServer]) -> None:
    main(["generate", "Once upon", "--raw", "--exit", "18"])

    assert server.asked[0]["prompt"] == "Once upon"
    assert server.asked[0]["budget"] == {"exit_layer": 18}


def test_a_field_that_the_server_refuses_is_the_users_mistake(
    server: type[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 400
    server.error = {"message": "budget.exit_layer=5 is not an exit: choose one of [9, 30]."}

    assert main(["generate", "Hi", "--exit", "5"]) == 2
    assert capsys.readouterr().err == (
        "sortserve: error: budget.exit_layer=5 is not an exit: choose one of [9, 30].\n"
    )


def test_a_budget_that_cannot_be_is_refused_before_anything_is_sent(
    server: type[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hi", "--budget-ms", "-1"]) == 2

    assert server.asked == []
    assert "budget.latency_ms=-1.0 is not allowed" in capsys.readouterr().err


def test_a_failing_server_is_exit_code_1(
    server: type[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server.status, server.error = 500, {"message": "The engine has failed."}

    assert main(["generate", "Hi"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_is_exit_code_130(
    server: type[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sortserve.commands.generate._print_answer", interrupt)

    assert main(["generate", "Hi"]) == 130


# serve, version, mistakes


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert main(["--version"]) == 0

    assert capsys.readouterr().out == f"{__version__}\n" * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sreve"], "'sreve' is not a command: choose one of serve, chat, generate, exits, bench"),
        (["selfdata", "--outptu=o"], "unrecognized arguments: --outptu=o. Did you mean --output?"),
        (["serve", "--prot=1"], "unrecognized arguments: --prot=1. Did you mean --port?"),
        (["serve", "--port", "x"], "--port: 'x' is not allowed"),
        (["generate"], "PROMPT"),
        (["generate", "Hi", "--exit", "deep"], "--exit: 'deep' is not an integer"),
        (["generate", "Hi", "--seed", "9" * 400], "--seed: '999"),
        (["generate", "Hi", "--seed", "9" * 5000], "--seed: '999"),
        (["generate", "Hi", "--max-tokens", "1e3"], "--max-tokens: '1e3' is not an integer"),
        (["generate", "Hi", "--temperature", "nan"], "--temperature: 'nan' is not a finite number"),
        (["generate", "Hi", "--budget-ms", "1e999"], "--budget-ms: '1e999' is not a finite number"),
        (["generate", "Hi", "--on-miss", "x\ny"], "--on-miss"),
        (["generate", "Hi", "--url", "http://h:x"], "base_url='http://h:x'"),
        (["generate", "Hi", "--url", "nowhere\n"], "base_url='nowhere"),
        (["generate", "Hi", "--api-key", "sk secret"], "api_key"),
        (["generate", "Hi", "two\nlines"], "unrecognized arguments: two\\nlines"),
        (["serve", "a\0b"], "NUL"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2

    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("sortserve: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--api-keys", "sk-secret"],
        ["serve", "--api-keys=sk-secret"],
        ["serve", "--apikey=sk-secret"],
        ["serve", "--api-key", "a", "sk-secret", "--api-key-fil", "sk-secret"],
        ["generate", "Hi", "--api-keys", "sk-secret"],
        ["generate", "Hi", "--api-key", "sk-secret\tx"],
        ["serve", "--api-key", "sk-secret\tx"],
        ["serve", "--api-key", "\udcffsk-secret"],
        ["serve", "--api-key", "sk-secret", "--port", "x"],
        ["serve", "--api-key", "sk-secret", "--print-config"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]).encode("ascii", "replace").decode(),
)
def test_a_key_is_shown_by_no_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments)

    shown = capsys.readouterr()
    assert shown.out + shown.err
    assert "sk-secret" not in shown.out + shown.err


def test_a_password_in_the_servers_variable_is_not_in_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SORTSERVE_URL", "http://ann:pass-word@h")

    with pytest.raises(SystemExit):
        main(["generate", "--help"])

    assert "pass-word" not in capsys.readouterr().out


def test_keys_from_the_environment_lose_their_line_ends(
    server: type[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_API_KEY", " sk-1\n,sk-2\n")

    assert main(["generate", "Hi"]) == 0
    assert server.keys == ["Bearer sk-1"]


def test_a_server_on_this_machine_is_asked_without_a_proxy(
    server: type[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")

    assert main(["generate", "Hi"]) == 0
    assert len(server.asked) == 1


def test_print_config_shows_what_was_resolved_and_starts_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "some/model", "--port", "9", "--print-config"]) == 0

    printed = capsys.readouterr().out
    assert "model: some/model\n" in printed
    assert "port: 9\n" in printed


def test_help_names_every_flag_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])

    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--max-num-seqs SEQS" in printed
    assert "env: SORTSERVE_MAX_NUM_SEQS" in printed


@pytest.mark.parametrize("missing", ["pydantic_settings", "uvicorn", "torch"])
def test_serving_without_the_server_extra_says_which_one_to_install(missing: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; import sortserve.cli as c"
    run = f"{hide}; sys.exit(c.main(['serve', '--port', '0']))"

    ended = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, env=_plain_environment()
    )

    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"sortserve: error: `sortserve serve` needs {missing}, which is not installed: "
        "pip install 'sortserve[server]'"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("matplotlib", ["eval", "tiny", "--data", "dev.jsonl", "--output", "out"]),
        ("torch", ["selfdata", "prompts.jsonl", "--output", "out"]),
        ("rich", ["selfdata", "prompts.jsonl", "--output", "out"]),
        ("torch", ["export", "tiny", "--exit", "1", "--output", "out"]),
    ],
)
def test_the_trainers_commands_without_its_extra_say_which_one_to_install(
    missing: str, arguments: list[str], tmp_path: Path
) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; import sortserve.cli as c"
    run = f"{hide}; sys.exit(c.main({arguments!r}))"

    ended = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path
    )

    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"sortserve: error: `sortserve {arguments[0]}` needs {missing}, which is not installed: "
        "pip install 'sortserve[train]'"
    )


def test_python_dash_m_is_the_same_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sortserve", "version"], capture_output=True, text=True
    )

    assert (ended.returncode, ended.stdout) == (0, f"{__version__}\n")


def test_an_address_that_is_taken_is_exit_code_2(
    server: type[FakeServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = os.environ.pop("SORTSERVE_URL").rpartition(":")[2]

    assert main(["serve", str(tmp_path), "--port", port]) == 2
    assert f"cannot listen on --host 127.0.0.1 --port {port}" in capsys.readouterr().err


def _plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("SORTSERVE_")}
