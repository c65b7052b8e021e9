"""The README's first screen is true: its commands exist, its request is answered as it shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from sortserve.cli import main
from support.http_service import make_service
from support.tiny_models import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def shape(value: Any) -> Any:
    """The keys of a JSON value, without its values; maps keyed by exit count as one key."""
    if isinstance(value, dict):
        if value and all(key.isdigit() for key in value):
            return "by exit"
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else ""


async def test_the_curl_of_the_first_screen_is_answered_as_the_readme_shows() -> None:
    (curl,) = [text for text in blocks("") if text.startswith("curl ")]
    words = shlex.split(curl)
    body = json.loads(words[words.index("-d") + 1])
    shown = json.loads(blocks("json")[0])
    service = make_service()

    reply = await service.post("/generate", body)

    service.worker.stop()
    assert words[1].endswith("/generate")
    answer = reply.json()
    for choice in (*answer["choices"], *shown["choices"]):
        assert choice.pop("budget")
    assert shape(answer) == shape(shown)


def test_the_serve_commands_are_accepted_as_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "server.yaml").write_text("port: 8123\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pattern = r"^\.venv/bin/sortserve (serve [^#\n]*)"
    lines = re.findall(pattern, "\n".join(blocks("")), re.MULTILINE)

    assert len(lines) == 3
    for line in lines:
        assert main([*shlex.split(line), "--print-config"]) == 0
    assert "port: 8123" in capsys.readouterr().out


def test_the_offline_example_answers_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny checkpoint in place of the one that comes with sortserve."""
    (example,) = [text for text in blocks("python") if "from sortserve import" in text]
    make_tiny_checkpoint(tmp_path / "sorted-smollm2-135m", exits=(9, 27, 30), num_hidden_layers=30)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(example.replace('LLM("', 'LLM("./'), names)

    assert names["llm"].exits.layers == (9, 27, 30)
    names["llm"].close()
    assert capsys.readouterr().out


def test_the_make_targets_of_the_first_screen_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    targets = re.findall(r"^make ([\w-]+)", "\n".join(blocks("")), re.MULTILINE)

    assert targets[:2] == ["serve", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_every_link_of_the_readme_leads_somewhere(path: str) -> None:
    assert (ROOT / path).is_file()
