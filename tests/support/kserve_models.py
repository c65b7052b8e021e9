"""KServe's objects, held against the models in its Python package, which are made from its CRDs.

The package is read, not imported: it needs fifty others. A model's file has a table of its fields'
types and one of their names.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.charts import KUBERNETES, TOOLS, faults

MODELS = TOOLS / "kserve" / "models"
PLAIN: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "object": object,
}
TEXTS = ("V1beta1MetricQuantity", "ResourceQuantity")
"""Written as text or number."""


@functools.cache
def fields_of(model: str) -> dict[str, str] | None:
    """Types of a model's fields by the name that is written; None: it is not KServe's own."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z0-9]+|[A-Z]+|[a-z0-9]+", model)
    path = MODELS / f"{'_'.join(words).lower()}.py"
    found = path if path.is_file() else _file_with(model)
    if found is None:
        return None
    tables = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for node in ast.walk(ast.parse(found.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == model
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    return {tables["attribute_map"][name]: kind for name, kind in tables["openapi_types"].items()}


def _file_with(model: str) -> Path | None:
    return next(
        (p for p in MODELS.glob("*.py") if f"\nclass {model}(" in p.read_text(encoding="utf-8")),
        None,
    )


def all_faults(value: Any, kind: str, path: str) -> Iterator[str]:
    """What is wrong with a value of a type, as the tables write types: ``list[V1Container]``."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: {value!r} is no list"
            return
        for i, item in enumerate(value):
            yield from all_faults(item, inner[1], f"{path}[{i}]")
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        for key, item in value.items():
            yield from all_faults(item, inner[1], f"{path}.{key}")
    elif kind in TEXTS:
        if not isinstance(value, str | int):
            yield f"{path}: {value!r} is no quantity"
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{path}: {value!r} is no {kind}"
    elif (fields := fields_of(kind)) is not None:
        for key, item in value.items():
            if key not in fields:
                yield f"{path}: {kind} has no field {key}"
            else:
                yield from all_faults(item, fields[key], f"{path}.{key}")
    elif fault := faults(value, KUBERNETES[-1], _core_definition(kind)):
        yield f"{path}: {fault}"


def _core_definition(kind: str) -> str:
    """Of Kubernetes itself: ``V1Container`` is ``io.k8s.api.core.v1.Container``."""
    name = kind.removeprefix("V1")
    if name == "ObjectMeta":
        return f"io.k8s.apimachinery.pkg.apis.meta.v1.{name}"
    assert kind.startswith("V1"), kind
    return f"io.k8s.api.core.v1.{name}"
