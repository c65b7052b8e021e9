"""Whatever is given to a command of the trainer's: a setting, or one line and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve.process.console import MAX_LINE
from sortserve_trainer.evaluation.settings import EvalSettings, load_eval_settings
from sortserve_trainer.run.selfdata_settings import SelfdataSettings, load_selfdata_settings
from sortserve_trainer.run.settings import TrainSettings, load_train_settings

TEXTS = [
    *("", " ", ",", "0", "-1", "1", "true", "nan", "inf", "-inf", "1e400", "1e300", "0x10", "1.5"),
    *("9" * 30, "9" * 401, "9" * 5000, str(2**63), "é", "a\nb", "\x1b[2J", "\udcff", "a\0b"),
    *("x" * 10_000, "/dev/null", "..", ":", "a:0", "a:nan", "[1]"),
]
TRAIN = {"data": ("rows.jsonl",), "output": "out", "exits": "2,4"}
EVAL = {"model": "tiny", "data": ("rows.jsonl",)}
SELFDATA = {"prompts": ("rows.jsonl",), "output": "out"}


def refusal(load: Any, flags: dict[str, Any]) -> str | None:
    try:
        load(flags)
    except ConfigError as error:
        return error.message
    return None


@pytest.mark.parametrize(
    ("load", "given", "field"),
    [(load_train_settings, TRAIN, field) for field in TrainSettings.model_fields]
    + [(load_eval_settings, EVAL, field) for field in EvalSettings.model_fields]
    + [(load_selfdata_settings, SELFDATA, field) for field in SelfdataSettings.model_fields],
)
def test_any_text_as_a_flag_is_a_setting_or_one_line(
    load: Any, given: dict[str, Any], field: str
) -> None:
    for text in TEXTS:
        message = refusal(load, {**given, field: text})
        assert message is None or (0 < len(message) < MAX_LINE and "\n" not in message)


@pytest.mark.parametrize(
    "arguments",
    [
        "train --data rows.jsonl --output out --exits 2 --seed -1",
        "train --data rows.jsonl --output out --exits 2 --seed 4294967296",
        "train --data rows.jsonl --output out --exits 2 --epochs 1e300",
        "train --data rows.jsonl --output out --exits 2 --lora-rank 9999999999",
        "eval tiny --data rows.jsonl --seed 99999999999999999999",
        "eval tiny --data rows.jsonl --limit-rows 0",
        "selfdata rows.jsonl --output out --exit deep",
        "selfdata rows.jsonl --output out --seed -1",
        "selfdata rows.jsonl --output out --limit 0",
        "selfdata rows.jsonl --output out --max-tokens 9999999999",
        "selfdata rows.jsonl --output out --temperature nan",
        "selfdata rows.jsonl --output out --temperature 101",
        "selfdata rows.jsonl --output out --top-p 1.5",
        "selfdata rows.jsonl --output out --max-repetition -1",
        "selfdata rows.jsonl --output out",
        "selfdata rows.jsonl",
        "selfdata --output out",
        "export tiny --exit deep --output out",
        "export tiny --exit 99999999999999999999 --output out",
        "export tiny --output out",
        "export /no/such --exit 1 --output out",
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(arguments.split()) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sortserve: error: ")
    assert list(tmp_path.iterdir()) == []
