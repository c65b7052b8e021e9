"""Calibrations: kept between starts, checked before they are believed, printed and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sortserve.cli import main
from sortserve.engine.calibration_cache import cache_path, read_samples, write_samples
from sortserve.profiling import chart, table
from sortserve.scheduling.cost_model import CostModel, RowShape, StepShape
from sortserve.svg import Series, line_chart
from support.tiny_models import make_tiny_checkpoint

KEY = {"machine": "one", "dtype": "bf16", "threads": 2}


def samples() -> list[tuple[StepShape, float]]:
    shapes = [
        StepShape.of([RowShape(layers, 1, 10, samples=True)] * rows)
        for layers in (2, 6)
        for rows in (1, 8, 64)
    ]
    return [(shape, 1e-3 * (1 + shape.num_layers + shape.num_tokens / 10)) for shape in shapes]


def test_a_calibration_comes_back_as_it_was(tmp_path: Path) -> None:
    path = cache_path(tmp_path, KEY)

    write_samples(path, samples(), KEY)

    assert read_samples(path) == samples()
    assert json.loads(path.read_text())["key"]["machine"] == "one"


@pytest.mark.parametrize("change", [{"machine": "two"}, {"dtype": "fp32"}, {"threads": 4}])
def test_another_machine_dtype_or_thread_count_has_its_own(
    tmp_path: Path, change: dict[str, object]
) -> None:
    assert cache_path(tmp_path, {**KEY, **change}) != cache_path(tmp_path, KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"format_version": 0}',
        '{"format_version": 1}',
        '{"format_version": 1, "samples": []}',
        '{"format_version": 1, "samples": [[[1], 2]]}',
    ],
)
def test_a_file_that_cannot_be_used_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)

    assert read_samples(path) is None


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    write_samples(tmp_path / "file" / "calibration.json", samples(), KEY)


def test_the_table_and_the_chart_show_each_sample() -> None:
    model = CostModel.fit(samples())

    text, drawing = table(samples(), model), ElementTree.fromstring(chart(samples(), model, "a<b"))

    assert len(text.splitlines()) == 1 + 6 + 4
    dots = [e for e in drawing.iter() if e.tag.endswith("circle")]
    assert len(dots) == 6 + 2  # and their keys in the legend


def test_an_empty_chart_is_a_drawing_too() -> None:
    drawing = line_chart("nothing", "x", "y", [Series("none", [])])

    assert ElementTree.fromstring(drawing).tag.endswith("svg")


def test_a_profile_is_printed_drawn_and_used_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))
    plot = tmp_path / "profile.svg"

    for name, value in (("REPEATS", 1), ("DECODE_ROWS", (1, 2)), ("PREFILL_TOKENS", (16, 60))):
        monkeypatch.setattr(f"sortserve.engine.calibration.{name}", value)
    small = ["--max-model-len=64", "--max-num-seqs=4"]

    code = main(["profile", str(checkpoint), *small, "--plot", str(plot)])

    assert code == 0
    assert "95th percentile" in capsys.readouterr().out
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")
    (kept,) = (tmp_path / "cache" / "calibration").iterdir()
    assert read_samples(kept) is not None
