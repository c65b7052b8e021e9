"""Known vulnerabilities of what is installed, by pip-audit; what could not be looked up is said.

``python .ci/audit.py TOOL SITE_PACKAGES`` ends with 0 if nothing is known, with 1 if something is.
pip-audit itself finds "no known vulnerabilities" in packages that it could not ask about, as where
the advisory service is not to be reached. That is told as what it is, and is no failure: whether to
publish without an audit is for people to say (``--strict`` makes it one).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

OWN = frozenset({"sortserve", "sortserve-smollm2"})
"""Not on the registry, so nobody can know anything of it."""


def verdict(report: Mapping[str, Any], *, strict: bool) -> tuple[list[str], int]:
    """Lines to print and the exit code.

    Args:
        report: of ``pip-audit --format json``.
        strict: whether a package that could not be looked up is a failure.
    """
    packages = [p for p in report["dependencies"] if p["name"].lower() not in OWN]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    lines = [
        f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for p in packages
        for v in p.get("vulns", ())
    ]
    found, looked_up = len(lines), len(packages) - len(skipped)
    if not looked_up:
        lines.append("NOT AUDITED: the advisory service knows none of the packages, or is away.")
    else:
        lines.append(f"{looked_up} packages looked up, {found} known vulnerabilities.")
        lines += [f"not looked up: {', '.join(skipped)}"] * bool(skipped)
    return lines, int(bool(found) or (strict and bool(skipped)))


def main(arguments: list[str]) -> int:
    """Run pip-audit and say what came of it; returns the exit code."""
    strict = "--strict" in arguments
    tool, folder = (a for a in arguments if a != "--strict")
    command = [tool, "--path", folder, "--format", "json", "--progress-spinner", "off"]
    run = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(run.stdout)
    except json.JSONDecodeError:
        last = run.stderr.strip().splitlines()[-1:]
        print(f"NOT AUDITED: pip-audit gave no report: {' '.join(last)}")
        return int(strict)
    lines, code = verdict(report, strict=strict)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
