"""The ``sortserve`` command. Imports what a subcommand needs only when it runs.

Exit codes: 0 done, 1 the server failed or could not be reached, or the output could not be written,
2 a mistake on the command line, in the configuration or in the checkpoint, 130 interrupted, 141
nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import getpass
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sortserve import __version__
from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser, finite_number, integer, schedule
from sortserve.process.console import FAILED, complain, run_command

if TYPE_CHECKING:
    from sortserve_client import Budget, BudgetReport, Client

__all__ = ["main"]

DEFAULT_URL = "http://127.0.0.1:8000"
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass(frozen=True)
class _Command:
    """A subcommand: its line in the help, its extra, and what runs it."""

    help: str
    extra: str | None
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _name_user()
    return run_command(lambda: _dispatch(arguments))


def _name_user() -> None:
    """Name a user without a passwd entry, as in a container with a random uid.

    Libraries that name a folder after the user (torch among them) raise where there is no name.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def _dispatch(arguments: list[str]) -> int:
    if any("\0" in argument for argument in arguments):
        raise ConfigError("an argument holds a NUL character.")
    if arguments[:1] == ["--version"]:
        return _version([])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(f"{name!r} is not a command: choose one of {', '.join(COMMANDS)}.")
    try:
        return command.run(rest)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if command.extra is None or missing.startswith("sortserve"):
            raise
        raise ConfigError(
            f"`sortserve {name}` needs {missing}, which is not installed: "
            f"pip install 'sortserve[{command.extra}]'"
        ) from error


def _help() -> str:
    lines = ["usage: sortserve COMMAND ...", "", "commands:"]
    lines += [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`sortserve COMMAND --help` shows the flags of a command."])


def _version(arguments: Sequence[str]) -> int:
    Parser(prog="sortserve version", description="Print the version.").parse_args(arguments)
    print(__version__)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    from sortserve.process.config import load_settings, settings_yaml
    from sortserve.process.flags import add_flags

    parser = Parser(prog="sortserve serve", description="Serve a model over HTTP.")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and end"
    )
    add_flags(parser)
    flags = vars(parser.parse_args(arguments))
    print_config = flags.pop("print_config")
    settings = load_settings(flags)
    if print_config:
        print(settings_yaml(settings), end="")
        return 0
    from sortserve.process.serve import serve

    return serve(settings)


def _profile(arguments: Sequence[str]) -> int:
    from pathlib import Path

    from sortserve.process.config import load_settings
    from sortserve.process.flags import add_flags

    parser = Parser(
        prog="sortserve profile",
        description="Time the steps of a model on this machine, keep the times for the next start "
        "of a server, and print the cost model. Takes the flags of `serve`.",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as an SVG")
    add_flags(parser)
    flags = vars(parser.parse_args(arguments))
    plot = flags.pop("plot")
    settings = load_settings(flags)
    from sortserve.process.profiling import profile

    return profile(settings, plot)


def _kernels(arguments: Sequence[str]) -> int:
    from sortserve.process.kernels import kernels_command

    return kernels_command(arguments)


def _generate(arguments: Sequence[str]) -> int:
    from sortserve_client import BadRequestError, Client
    from sortserve_client import SortserveError as ClientError

    options = _generate_parser().parse_args(arguments)
    try:
        with Client(options.url, _first_key(options.api_key)) as client:
            report = _print_answer(client, options)
    except BadRequestError as error:
        raise ConfigError(error.message) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except ClientError as error:
        complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        print()  # the shell's prompt starts on a line of its own
        raise
    if report is not None:
        _print_dim(_summary(report))
    return 0


def _print_answer(client: Client, options: argparse.Namespace) -> BudgetReport | None:
    """Print the answer as it comes; returns what became of the budget."""
    text = _read_prompt(options.prompt)
    request: dict[str, Any] = {
        "budget": _budget(options),
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
        print(generation.text)
    else:
        with client.stream(**request) as stream:
            for event in stream:
                print(event.text, end="", flush=True)
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


def _budget(options: argparse.Namespace) -> Budget:
    from sortserve_client import Budget

    return Budget(
        latency_ms=options.budget_ms,
        ttft_ms=options.ttft_ms,
        tpot_ms=options.tpot_ms,
        compute=options.compute,
        exit_layer=options.exit,
        schedule=options.schedule,
        min_exit_layer=options.min_exit_layer,
        min_quality=options.min_quality,
        on_miss=options.on_miss,
    )


def _summary(report: BudgetReport) -> str:
    """``exit 18 | 741 ms, predicted 760 | first token 62 ms | budget met``."""
    by_exit = sorted(report.tokens_by_exit.items())
    used = ", ".join(f"{exit_layer} ({count} tokens)" for exit_layer, count in by_exit)
    parts = [f"exit {used or report.exit_layer}"]
    if report.actual_ms is not None:
        predicted = "" if report.predicted_ms is None else f", predicted {report.predicted_ms:.0f}"
        parts.append(f"{report.actual_ms:.0f} ms{predicted}")
    if report.ttft_ms is not None:
        parts.append(f"first token {report.ttft_ms:.0f} ms")
    if report.met is not None:
        parts.append("budget met" if report.met else "budget missed")
    if report.degraded:
        parts.append("made shallower")
    return " | ".join(parts)


def _print_dim(line: str) -> None:
    if sys.stderr is None:
        return
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"{DIM}{line}{PLAIN}" if dim else line, file=sys.stderr)


def _first_key(keys: str | None) -> str | None:
    """The variable is the server's too, and may hold several keys."""
    return keys.partition(",")[0].strip() or None if keys else None


def _generate_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sortserve generate", description="Ask a running server, and stream its answer."
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask; - reads standard input")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    budget = parser.add_argument_group("budget", "what the answer may cost; all combine")
    times: dict[str, Any] = {"type": finite_number, "metavar": "MS"}
    budget.add_argument("--budget-ms", **times, help="arrival to last token")
    budget.add_argument("--ttft-ms", **times, help="arrival to first token")
    budget.add_argument("--tpot-ms", **times, help="per token after the first")
    budget.add_argument("--exit", type=integer, metavar="LAYER", help="exactly this exit layer")
    budget.add_argument(
        "--schedule",
        type=schedule,
        metavar="K:E,...",
        help="from output token K on, exit E, as in 0:30,32:27,96:24",
    )
    budget.add_argument(
        "--compute", type=finite_number, metavar="SHARE", help="of the full model's FLOPs"
    )
    budget.add_argument("--min-exit-layer", type=integer, metavar="LAYER", help="no shallower exit")
    budget.add_argument("--min-quality", type=finite_number, metavar="SCORE", help="no worse exit")
    budget.add_argument(
        "--on-miss", choices=("degrade", "truncate", "reject"), help="if no exit fits the times"
    )
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
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        default=os.environ.get("SORTSERVE_URL") or DEFAULT_URL,
        help=f"default: {DEFAULT_URL}; env: SORTSERVE_URL",
    )
    server.add_argument(
        "--api-key", default=os.environ.get("SORTSERVE_API_KEY"), help="env: SORTSERVE_API_KEY"
    )
    server.add_argument("--no-stream", action="store_true", help="print the answer in one piece")
    return parser


def _trainer(module: str, function: str) -> Callable[[Sequence[str]], int]:
    """A command of the trainer's.

    It is found by name: the trainer builds on this package, which therefore must not import it.
    """

    def run(arguments: Sequence[str]) -> int:
        command: Callable[[Sequence[str]], int] = getattr(
            importlib.import_module(f"sortserve_trainer.{module}"), function
        )
        return command(arguments)

    return run


COMMANDS = {
    "serve": _Command("start a server", "server", _serve),
    "generate": _Command("ask a running server, and stream its answer", None, _generate),
    "train": _Command("make a sorted model", "train", _trainer("run.train", "train_command")),
    "eval": _Command(
        "measure each exit of a model",
        "train",
        _trainer("commands.eval", "eval_command"),
    ),
    "export": _Command(
        "write one exit as a plain Hugging Face folder",
        "train",
        _trainer("commands.export", "export_command"),
    ),
    "selfdata": _Command(
        "let a model write training data for its own exits",
        "train",
        _trainer("commands.selfdata", "selfdata_command"),
    ),
    "profile": _Command("time a model's steps, and print their cost", "server", _profile),
    "kernels": _Command("compile the CPU kernels ahead of time", "server", _kernels),
    "version": _Command("print the version", None, _version),
}
