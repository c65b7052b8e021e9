"""Structured outputs of the checkpoint that comes with sortserve: two hundred documents, all valid.

The figures are printed: run it with ``-s``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from sortserve import LLM, Budget, SamplingParams
from support.schemas import FIVE_FIELDS, check_document

SCHEMAS: dict[str, dict[str, Any]] = {
    "five fields": FIVE_FIELDS,
    "a list": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": {
            "type": "object",
            "properties": {
                "day": {"type": "string", "format": "date"},
                "degrees": {"type": "number", "minimum": -50, "maximum": 60},
            },
            "required": ["day", "degrees"],
            "additionalProperties": False,
        },
    },
    "one of two": {
        "anyOf": [
            {"type": "object", "properties": {"error": {"type": "string", "maxLength": 40}}},
            {"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}}},
        ]
    },
    "anything": {},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_documents_of_the_shipped_checkpoint_are_valid() -> None:
    counts: Counter[str] = Counter()
    with LLM("sorted-smollm2-135m", min_quality=0.0, max_num_seqs=32) as llm:
        exits = llm.exits.layers
        for name, schema in SCHEMAS.items():
            sampling = SamplingParams(
                format={"json": schema}, max_tokens=200, temperature=1.0, seed=17
            )
            budgets = [Budget(exit_layer=e) for e in (exits[0], exits[-1])]
            results = llm.generate(
                ["Write a JSON document about the weather in Paris:\n"] * 2,
                sampling,
                budget=budgets,
                n=25,
            )
            for output in (output for result in results for output in result.outputs):
                counts[f"{name}: {output.finish_reason}"] += 1
                if output.finish_reason == "stop":
                    check_document(output.text, schema)

    print(dict(counts))
    assert sum(counts.values()) == 200
    assert sum(n for name, n in counts.items() if name.endswith("stop")) > 120
