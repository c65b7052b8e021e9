"""The figure of the README: quality-weighted goodput, and what share of latency budgets is met.

python -m benchmarks.plot_promises

It reads the JSON line of ``benchmarks.goodput`` in the newest committed result and writes a PNG;
nothing is measured. The same result gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.lib.goodput_page import draw

__all__ = ["newest_result", "read_results"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "images" / "promises.png"


def newest_result() -> Path:
    """The page of the latest measurement; their names begin with their dates."""
    return max(RESULTS.glob("*-promises.md"))


def read_results(result: Path) -> dict[str, Any]:
    """What the first goodput line of a page holds.

    Raises:
        ValueError: it has none.
    """
    for line in result.read_text(encoding="utf-8").splitlines():
        if line.startswith('{"benchmark": "goodput"'):
            results: dict[str, Any] = json.loads(line)["results"]
            return results
    raise ValueError(f"{result} has no JSON line of benchmarks.goodput.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="a page with a goodput line; default: newest")
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the PNG goes")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(draw(read_results(arguments.result or newest_result()), "png"))
    print(f"plot: {arguments.output}")


if __name__ == "__main__":
    main()
