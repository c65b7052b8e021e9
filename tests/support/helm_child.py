"""Helm's own engine in a process of its own, since it brings Go's runtime along.

    python -m support.helm_child < requests > replies

One JSON object a line: ``{"chart": PATH, "values": {...}, "name": ..., "namespace": ...}`` gives
``{"manifests": {template: text}}``, with ``"lint": true`` ``{"lint": report}``, and in either case
``{"error": message}`` if Helm refuses.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python as helm


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request.get("lint"):
            return {"lint": helm.lint(request["chart"], request["values"], strict=True)}
        with helm.Chart.load(request["chart"]) as chart:
            chart.validate_schema(request["values"])
            names = {"name": request["name"], "namespace": request["namespace"]}
            return {"manifests": chart.render(request["values"], **names)}
    except helm.HelmError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
