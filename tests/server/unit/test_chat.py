"""A chat in the terminal, against the real HTTP service over a scripted engine.

Its tokenizer makes each character a token, and its model goes on with the next letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sortserve.cli import main
from sortserve.commands.chat import Chat
from sortserve.commands.chat_state import ChatState
from sortserve.commands.talkers import Piece
from sortserve.commands.terminal import PLAIN, has_colours, printable, tints
from sortserve_client import BudgetReport, ExitInfo
from support.http_service import HttpService, listening, make_service

EXITS = (2, 4, 6)


@pytest.fixture(scope="module")
def service() -> Iterator[HttpService]:
    service = make_service(engine_options={"min_quality": 0.5})
    yield service
    service.worker.stop()


@pytest.fixture(scope="module")
def url(service: HttpService) -> Iterator[str]:
    with listening(service.app) as url:
        yield url


def typing(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    left = iter(lines)

    def read() -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("sortserve.commands.chat._read_line", read)


def test_a_question_is_answered_at_the_exit_that_was_typed(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "/exit 4", "abc", "", "/quit", "never read")

    assert main(["chat", "--url", url, "--max-tokens", "3", "--temperature", "0"]) == 0

    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"tiny at {url}, exits 2 4 6. /help lists commands."
    assert shown.out.splitlines()[1:] == ["def"]
    assert "budget: exit_layer=4" in shown.err
    assert "exit 4 (3 tokens)" in shown.err


def test_what_the_server_refuses_is_a_line_and_the_chat_goes_on(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "/exit 5", "abc", "/budget soon", "/again", "/exit auto", "x")

    assert main(["chat", "--url", url, "--max-tokens", "2", "--temperature", "0"]) == 0

    shown = capsys.readouterr()
    refused, mistaken, nothing = re.findall(r"^! (.*)$", shown.err, re.MULTILINE)
    assert "budget.exit_layer=5" in refused
    assert "'soon' is not a time" in mistaken
    assert "no question to ask again" in nothing  # the refused one was forgotten
    assert shown.out.splitlines()[1:] == ["yz"]


def test_flags_set_what_the_chat_begins_with(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "abc")

    main(["chat", "--url", url, "--exit", "2", "--max-tokens", "4", "--temperature", "0"])

    assert "exit 2 (4 tokens)" in capsys.readouterr().err


def test_the_exits_are_shown_as_a_table(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "/exits", "/help")

    main(["chat", "--url", url])

    shown = capsys.readouterr().out
    assert re.search(r"^ +2 +0\.0 M +0\.50 .*only for who names it$", shown, re.MULTILINE)
    assert "  /budget 800ms" in shown


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1"]) == 1

    assert capsys.readouterr().err.count("\n") == 1


# with a scripted talker


class ScriptedTalker:
    """Answers with what it is told; remembers what it was asked."""

    name = "scripted"

    def __init__(self, pieces: Sequence[Piece | BaseException]) -> None:
        self.pieces = pieces
        self.asked: list[dict[str, Any]] = []
        self.num_closed = 0

    def exits(self) -> list[ExitInfo]:
        return [ExitInfo(exit_layer=layer) for layer in EXITS]

    def answer(self, messages: Any, budget: Any, options: Any) -> Iterator[Piece]:
        self.asked.append({"messages": messages, "budget": dict(budget)})
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.num_closed += 1


def chat(talker: ScriptedTalker, *lines: str, has_colours: bool = False) -> Chat:
    left = iter(lines)

    def read() -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    chat = Chat(talker, ChatState(), read, has_colours=has_colours)
    chat.run()
    return chat


def test_a_conversation_grows_by_question_and_answer() -> None:
    talker = ScriptedTalker([Piece("So", 4), Piece(".", 6), Piece(report=BudgetReport())])

    chat(talker, "Why?", "And?", "//exit is a word")

    contents = [[turn["content"] for turn in asked["messages"]] for asked in talker.asked]
    assert contents == [
        ["Why?"],
        ["Why?", "So.", "And?"],
        ["Why?", "So.", "And?", "So.", "/exit is a word"],
    ]


def test_again_asks_the_last_question_with_what_is_set_now() -> None:
    talker = ScriptedTalker([Piece("So.", 6)])

    chat(talker, "Why?", "/exit 4", "/again")

    assert talker.asked[1] == {
        "messages": [{"role": "user", "content": "Why?"}],
        "budget": {"exit_layer": 4},
    }


def test_an_interrupt_ends_the_answer_and_keeps_what_came(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talker = ScriptedTalker([Piece("Half", 6), KeyboardInterrupt()])

    ended = chat(talker, "Why?")

    assert talker.num_closed == 1
    assert ended.state.turns[-1] == {"role": "assistant", "content": "Half"}
    assert "[stopped]" in capsys.readouterr().err


def test_every_token_has_the_colour_of_its_exit(capsys: pytest.CaptureFixture[str]) -> None:
    colours = tints(EXITS)

    chat(ScriptedTalker([Piece("a", 2), Piece("b", 6)]), "Why?", has_colours=True)

    shown = capsys.readouterr().out
    assert f"{colours[2]}a{PLAIN}{colours[6]}b{PLAIN}" in shown
    assert f"exits {colours[2]}2{PLAIN} " in shown


def test_without_colours_nothing_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    chat(ScriptedTalker([Piece("a", 2), Piece("b", 6)]), "Why?")

    assert "\033" not in capsys.readouterr().out


def test_a_model_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    chat(ScriptedTalker([Piece("a\033[2Jb\r\n\tc", 2)]), "Why?")

    assert "a\ufffd[2Jb\ufffd\n\tc" in capsys.readouterr().out
    assert printable("plain \u00fcber \u6f22\n") == "plain \u00fcber \u6f22\n"


class Terminal:
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm-256color"}, True),
    ],
)
def test_colours_are_for_terminals_whose_users_want_them(
    environ: dict[str, str], expected: bool
) -> None:
    terminal: Any = Terminal()

    assert has_colours(terminal, environ) is expected
    assert not has_colours(None, environ)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_the_ramp_of_colours_ends_with_the_full_depth_at_any_number_of_exits(count: int) -> None:
    colours = list(tints(range(1, count + 1)).values())

    assert len(colours) == count
    assert colours[-1] == tints([30])[30]
    assert len(set(colours)) == min(count, 5)
