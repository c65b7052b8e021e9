"""``sortserve generate``: one question, and its answer as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sortserve.commands.asking import (
    add_budget_flags,
    add_server_flags,
    budget_of,
    client_errors,
    first_key,
)
from sortserve.commands.story import story
from sortserve.commands.terminal import print_dim, printable
from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser, finite_number, integer

if TYPE_CHECKING:
    from sortserve_client import BudgetReport, Client

__all__ = ["generate_command", "generate_parser"]


def generate_parser() -> Parser:
    """The command line of ``sortserve generate``."""
    parser = Parser(
        prog="sortserve generate", description="Ask a running server, and stream its answer."
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask; - reads standard input")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    budget = add_budget_flags(parser)
    budget.add_argument(
        "--priority", type=integer, metavar="P", help="less goes before others; default: 0"
    )
    budget.add_argument(
        "--service-tier", choices=("flex", "default", "priority"), help="what the request is worth"
    )
    sampling = parser.add_argument_group("sampling", "the server's defaults unless given")
    sampling.add_argument("--model", metavar="NAME", help="served name, or NAME@EXIT")
    sampling.add_argument(
        "--max-tokens", type=integer, default=256, metavar="N", help="default: 256"
    )
    sampling.add_argument("--temperature", type=finite_number, metavar="T", help="0 is greedy")
    sampling.add_argument("--seed", type=integer, metavar="SEED", help="repeat an answer")
    server = add_server_flags(parser)
    server.add_argument("--no-stream", action="store_true", help="print the answer in one piece")
    return parser


def generate_command(arguments: Sequence[str]) -> int:
    """Ask, and print; returns the exit code.

    Raises:
        ConfigError: the request was the user's mistake.
        CommandFailedError: the server failed, or is not there.
    """
    from sortserve_client import Client

    options = generate_parser().parse_args(arguments)
    try:
        with client_errors(options.url), Client(options.url, first_key(options.api_key)) as client:
            report = _print_answer(client, options)
    except KeyboardInterrupt:
        print()  # the shell's prompt starts on a line of its own
        raise
    if report is not None:
        print_dim(story(report))
    return 0


def _print_answer(client: Client, options: argparse.Namespace) -> BudgetReport | None:
    """Print the answer as it comes; returns what became of the budget.

    A terminal is given nothing that moves its cursor; a file or a pipe gets the text as it is.
    """
    shown = printable if sys.stdout is not None and sys.stdout.isatty() else str
    text = _read_prompt(options.prompt)
    request: dict[str, Any] = {
        "budget": budget_of(options),
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "priority": options.priority,
        "service_tier": options.service_tier,
    }
    if options.raw:
        request["prompt"] = text
    else:
        request["messages"] = [{"role": "user", "content": text}]
    if options.no_stream:
        generation = client.generate(**request)
        print(shown(generation.text))
    else:
        with client.stream(**request) as stream:
            for event in stream:
                print(shown(event.text), end="", flush=True)
            print()
            generation = stream.result()
    return generation.budget or (generation.choices[0].budget if generation.choices else None)


def _read_prompt(prompt: str) -> str:
    """The prompt, from standard input if it is ``-``.

    Raises:
        ConfigError: it is no text, or cannot be read.
    """
    try:
        if prompt == "-":
            if sys.stdin is None:
                raise ConfigError("PROMPT - reads standard input, which is closed.")
            prompt = sys.stdin.read()
        prompt.encode()
    except UnicodeError as error:
        raise ConfigError("PROMPT is no text: it is not valid UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"PROMPT -: standard input cannot be read: {error.strerror}.") from error
    return prompt
