"""A server under load for minutes, and under faults: the programs that check it, as they are run.

``SOAK_MINUTES`` says for how long; without it ten minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(sys.platform != "linux", reason="they read /proc"),
]
ROOT = Path(__file__).parents[2]
MINUTES = os.environ.get("SOAK_MINUTES", "10")


def results_of(program: str, *arguments: str) -> dict[str, Any]:
    """The results of a benchmark's last line; what it printed where there are none."""
    command = [sys.executable, "-m", f"benchmarks.{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["results"]
    return results


def test_nothing_grows_and_nothing_is_left_of_a_mixed_load() -> None:
    results = results_of("soak", "--tiny", "--minutes", MINUTES)

    assert results["problems"] == []
    assert results["answers"]["HTTP 200"] > 100


def test_every_fault_costs_what_it_may_and_no_more() -> None:
    results = results_of("chaos", "--attempts", "3")

    wrong = {name: f["problems"] for name, f in results["faults"].items() if f["problems"]}
    assert wrong == {}
    assert results["num_faults"] >= 30
