"""What is said of an audit: known faults, and above all what nobody has looked at."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "audit.py"
CLEAN = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
SKIPPED = {"name": "away", "skip_reason": "Dependency not found"}
OURS = {"name": "sortserve", "skip_reason": "Dependency not found"}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "codes", "said"),
    [
        ([CLEAN, OURS], (0, 0), "1 packages looked up, 0 known"),
        ([CLEAN, BAD], (1, 1), "bad 2: CVE-1, fixed in 2.1"),
        ([SKIPPED, OURS], (0, 1), "NOT AUDITED"),
        ([CLEAN, SKIPPED], (0, 1), "not looked up: away"),
        ([BAD, SKIPPED], (1, 1), "not looked up: away"),
    ],
)
def test_a_package_that_was_not_looked_up_is_never_called_clean(
    audit: ModuleType, packages: list[dict[str, Any]], codes: tuple[int, int], said: str
) -> None:
    for strict, code in zip((False, True), codes, strict=True):
        lines, given = audit.verdict({"dependencies": packages}, strict=strict)
        assert given == code
        assert said in "\n".join(lines)


def test_a_tool_that_fails_is_no_clean_audit(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([sys.executable, ".", "--strict"]) == 1  # Python knows no such flags
    assert "NOT AUDITED" in capsys.readouterr().out
