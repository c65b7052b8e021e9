"""What is generated beside the chart is up to date: its schema, and its table of values."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from jsonschema import Draft7Validator

from sortserve.process.config import ServeSettings
from sortserve.process.sources import key_name
from support.charts import CHART


@pytest.fixture(scope="module")
def pages() -> Any:
    path = CHART.parent / "chart_pages.py"
    spec = importlib.util.spec_from_file_location("chart_pages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_up_to_date(pages: Any) -> None:
    text = (CHART / "values.schema.json").read_text(encoding="utf-8")

    assert text == pages.schema_text(), "make docs"
    Draft7Validator.check_schema(json.loads(text))


def test_the_table_of_values_is_up_to_date(pages: Any) -> None:
    text = (CHART / "README.md").read_text(encoding="utf-8")

    assert text == pages.readme_text(text), "make docs"
    assert "| `autoscaling.targetPressure` | `0.7` |" in text


def test_every_setting_is_the_charts_own_or_may_be_given(pages: Any) -> None:
    own = {key_name(field) for field in pages.CHARTS_OWN}

    assert (
        pages.settings_schema()["properties"].keys()
        == {key_name(field) for field in ServeSettings.model_fields} - own
    )


@pytest.mark.parametrize(
    ("setting", "right", "wrong"),
    [
        ("exits", [9, 18], {"9": 18}),
        ("exits", "9,18", 9.5),
        ("kv-cache-memory", "2GiB", "much"),
        ("max-num-seqs", 64, 0),
        ("min-quality", 0.5, 1.5),
        ("calibrate", False, "no"),
        ("log-level", "debug", "loud"),
        ("request-timeout", None, "never"),
    ],
)
def test_a_setting_has_the_range_that_the_server_has(
    pages: Any, setting: str, right: object, wrong: object
) -> None:
    schema = Draft7Validator(pages.settings_schema())

    assert schema.is_valid({setting: right})
    assert not schema.is_valid({setting: wrong})
