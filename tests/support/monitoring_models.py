"""Objects of the Prometheus operator, held against models made from its own definitions.

    python -m support.monitoring_models < manifests.json

Prints a line for each fault. Unknown fields are faults, though the models themselves skip them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cloudcoil import pydantic as cloudcoil_pydantic

cloudcoil_pydantic.BaseModel.model_config["extra"] = "forbid"  # the models inherit it

from cloudcoil.models.prometheus_operator import v1  # noqa: E402
from pydantic import ValidationError  # noqa: E402


def faults(manifest: dict[str, Any]) -> list[str]:
    model = getattr(v1, manifest["kind"])
    try:
        model.model_validate(manifest)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return []


if __name__ == "__main__":
    for given in json.load(sys.stdin):
        print(*faults(given), sep="\n", end="")
