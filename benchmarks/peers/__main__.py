"""Other servers beside ours: sets them up, and measures all in turns under the same load.

    python -m benchmarks.peers setup all
    python -m benchmarks.peers run --clients 1,8,32 --repeat 2
    python -m benchmarks.peers run --peers sortserve,llamacpp-q8_0 --isa avx2

`setup` needs pip and, for llama.cpp, cmake and a C++ compiler. Everything goes into one folder
(``--root``); what is done is not done again. `run` starts one server at a time, warms it, and sends
the load: each client sends its next request when its last one is answered, prompts are random token
ids, answers stream, are greedy and ignore the end of the text. A server that does not start is left
out, and the reason stands below the table. A run that was cut off goes on where it stopped: give
the same command again. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.peers.catalogue import CONFIGURATIONS, ISAS, PEERS, choose
from benchmarks.peers.layout import DEFAULT_ROOT, Layout

__all__ = ["main", "parse_arguments"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="install, build and convert")
    setup.add_argument(
        "peers", nargs="+", choices=["all", *PEERS], help="sortserve: the model alone"
    )
    setup.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    run.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        default=["all"],
        help=f"of all, {', '.join(PEERS)}, {', '.join(CONFIGURATIONS)}",
    )
    run.add_argument("--clients", type=_numbers, default=[1, 8, 32], metavar="1,8,32")
    run.add_argument("--repeat", type=int, default=2, help="turns")
    run.add_argument("--isa", choices=ISAS, default="native", help="force an instruction set")
    run.add_argument("--cores", type=int, default=2, help="for servers and load generator together")
    run.add_argument("--prompt-tokens", type=int, default=128)
    run.add_argument("--output-tokens", type=int, default=128)
    run.add_argument("--max-seconds", type=float, default=60.0, help="of one load; then it is cut")
    run.add_argument("--max-minutes", type=float, default=15.0, help="no server starts after these")
    run.add_argument("--ready-seconds", type=float, default=300.0, help="of one start")
    run.add_argument("--fresh", action="store_true", help="measure again what was measured")
    run.add_argument("--journal", type=Path, help="where measurements are kept at once")
    run.add_argument("--output", type=Path, help="a file for the results, beside standard output")
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        try:
            choose(arguments.peers)
        except ValueError as error:
            parser.error(str(error))
    return arguments


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give numbers above 0.")
    return numbers


def main(argv: list[str] | None = None) -> int:
    """Sets up or measures; 1 if something could not be set up, or nothing could be measured."""
    arguments = parse_arguments(argv)
    if arguments.command == "run":
        from benchmarks.peers.run import run

        return run(arguments)
    from benchmarks.peers.install import install

    wanted = PEERS if "all" in arguments.peers else arguments.peers
    os.umask(0o022)
    return 0 if install(Layout(arguments.root.resolve()), wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
