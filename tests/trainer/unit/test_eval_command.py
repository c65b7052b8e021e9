"""``sortserve eval`` from the command line to ``sorted.json``, on a tiny model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sortserve.checkpoint.load import load_checkpoint
from sortserve.checkpoint.quantize import QUANTIZERS
from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve.cli import main
from sortserve.core.sampling_params import SamplingParams
from sortserve.core.schedule import DepthSchedule
from sortserve_trainer.evaluation.evaluate import evaluate
from sortserve_trainer.evaluation.settings import EvalSettings
from support.serving import offline_tokens
from support.serving import serve as serve_tiny
from support.tiny_models import (
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    read_exit_module,
    write_sorted_json,
)
from support.toy_quantizer import TOY

EXITS = (2, 4, 6)
KINDS = {2: "affine", 4: "mlp"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "tiny", exits=EXITS, exit_kinds=KINDS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"instruction": f"Say {n}.", "output": f"The {n}."} for n in ("one", "two", "three")]
    return write(folder / "dev.jsonl", rows)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "qa.jsonl", [{"question": "Who?", "answers": ["You", "Thou"]}] * 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"instruction": "Sing.", "input": "a song"}, {"turns": ["Dance.", "Again."]}]
    return write(tmp_path / "prompts.jsonl", rows)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments), "--device", "cpu", "--dtype", "float32"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake is answered with."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("sortserve: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("sortserve: error: ").rstrip("\n")


def test_everything_is_measured_printed_and_kept(
    model: Path,
    data: Path,
    questions: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ["--data", data, "--qa", questions, "--prompts", prompts]
    lengths = ["--max-tokens", 20, "--qa-max-tokens", 5, "--max-length", 100]

    assert run(model, *files, *lengths, "--output", tmp_path / "out", "--json") == 0

    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "exact match" in printed
    document = json.loads(printed.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "quality.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "quality.png",
        "quality.svg",
        "report.json",
    ]
    info = SortedInfo.read(model)
    assert info is not None
    assert tuple(info.quality) == EXITS
    assert info.quality[6]["score"] == 1.0
    assert info.quality[6]["kl"] == 0.0
    for exit_ in document["exits"]:
        own = info.quality[exit_["exit_layer"]]
        assert own == pytest.approx(exit_["metrics"], abs=1e-6)
        assert len(exit_["samples"]) == 2
    assert info.usable == {int(e): usable for e, usable in document["usable"].items()}
    assert info.usable[6] is True
    assert info.exit_modules  # and nothing else was lost
    assert info.recipe == {"method": "random"}
    assert not list(model.glob(".writing-*"))


def test_the_report_says_what_it_was_measured_on(model: Path, data: Path, questions: Path) -> None:
    report = evaluate(
        EvalSettings(
            model=str(model), data=(str(data),), qa=(questions,), limit_rows=1, dtype="float32"
        )
    )

    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert report.files[0] == {"name": "set-dev", "kind": "data", "sha256": digest}
    assert report.files[1]["rows"] == 1
    assert report.settings["limit_rows"] == 1
    assert report.settings["dtype"] == "float32"
    assert report.versions["transformers"]


def test_answers_are_those_the_server_gives_at_that_exit(model: Path, prompts: Path) -> None:
    settings = EvalSettings(model=str(model), prompts=(prompts,), max_tokens=12, dtype="float32")

    report = evaluate(settings)

    served = serve_tiny(model)
    prompt = served.tokenizer.apply_chat_template([{"role": "user", "content": "Sing.\n\na song"}])
    eos = served.tokenizer.eos_token_ids
    for exit_ in report.exits:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        depth = [exit_.exit_layer] * 12
        expected = offline_tokens(model, prompt, params, depth, eos_token_ids=eos)
        assert exit_.samples[0].prompt == "Sing.\n\na song"
        assert exit_.samples[0].text == served.tokenizer.decode(expected)


def test_schedules_are_measured_as_exits_are_and_kept(
    model: Path, data: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--schedule", "0:6,2:4,5:2", "--schedule", "0:4,3:2"]

    assert (
        run(model, "--data", data, "--prompts", prompts, "--max-tokens", 8, *named, "--json") == 0
    )

    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["0:6,2:4,5:2"] for line in lines)
    assert "has the result as quality and schedules." in lines[-2]
    info = SortedInfo.read(model)
    assert info is not None
    entries = json.loads(lines[-1])["schedules"]
    assert [entry["schedule"] for entry in entries] == [[[0, 6], [2, 4], [5, 2]], [[0, 4], [3, 2]]]
    for entry, kept in zip(entries, info.schedules, strict=True):
        assert kept.schedule.document == entry["schedule"]
        assert kept.metrics == pytest.approx(entry["metrics"], abs=1e-6)
        assert set(kept.metrics) == set(info.quality[4])
        loss = kept.metrics["loss"] - info.quality[6]["loss"]
        assert kept.metrics["score"] == pytest.approx(min(1.0, math.exp(-loss)), abs=1e-5)
        assert 0.0 < entry["compute"] < 1.0
        assert len(entry["samples"]) == 2
    first, second = load_checkpoint(str(model)).exits.schedules
    assert (first.score, second.score) == tuple(m.metrics["score"] for m in info.schedules)


def test_answers_under_a_schedule_are_those_the_server_gives(model: Path, prompts: Path) -> None:
    schedule = DepthSchedule(((0, 6), (2, 4), (5, 2)))
    settings = EvalSettings(
        model=str(model), prompts=(prompts,), max_tokens=9, dtype="float32", schedule=(schedule,)
    )

    [entry] = evaluate(settings).schedules

    served = serve_tiny(model)
    prompt = served.tokenizer.apply_chat_template([{"role": "user", "content": "Sing.\n\na song"}])
    params = SamplingParams(max_tokens=9, temperature=0.0)
    depths = [schedule.exit_at(k) for k in range(9)]
    eos = served.tokenizer.eos_token_ids
    expected = offline_tokens(model, prompt, params, depths, eos_token_ids=eos)
    assert entry.samples[0].text == served.tokenizer.decode(expected)
    assert "score" not in entry.metrics


def test_an_evaluation_without_schedules_leaves_none_of_an_earlier_one(
    model: Path, data: Path
) -> None:
    """Their scores are beside the full depth of that run, on its files."""
    assert run(model, "--data", data, "--schedule", "0:6,2:4") == 0
    assert run(model, "--data", data) == 0

    info = SortedInfo.read(model)
    assert info is not None
    assert info.schedules == ()


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            "0:6,2:5",
            "--schedule: 0:6,2:5 names exit 5, which is not measured: the exits are 2, 4, 6.",
        ),
        (
            "0:2,2:4",
            "--schedule: '0:2,2:4' is not allowed: its exits must descend, but 4 follows 2.",
        ),
        ("6", "--schedule: '6' is not allowed: '6' should be K:E"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(
    model: Path, data: Path, schedule: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, model, "--data", data, "--schedule", schedule).startswith(words)


def test_an_exit_with_a_head_of_its_own_answers_through_it(tmp_path: Path, prompts: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "ict", "llama-untied", (4, 6), {4: "head"})
    hf = load_hf(folder)
    module = read_exit_module(folder, 4)

    report = evaluate(
        EvalSettings(model=str(folder), prompts=(prompts,), max_tokens=8, dtype="float32")
    )

    served = serve_tiny(folder)
    prompt = served.tokenizer.apply_chat_template([{"role": "user", "content": "Sing.\n\na song"}])
    for exit_, own in zip(report.exits, (module, None), strict=True):
        tokens: list[int] = []
        while len(tokens) < 8 and tokens[-1:] != [2]:
            logits_TV = hf_logits(hf, [*prompt, *tokens], exit_.exit_layer, own)
            tokens.append(int(logits_TV[-1].argmax()))
        assert exit_.samples[0].text == served.tokenizer.decode(tokens)
    assert [exit_.exit_layer for exit_ in report.exits] == [4, 6]


def test_the_base_is_measured_at_full_depth_for_comparison(tmp_path: Path, data: Path) -> None:
    make_tiny_checkpoint(tmp_path / "base", exits=None)
    own = tmp_path / "own"
    own.mkdir()
    write_sorted_json(own, EXITS, base="../base")

    report = evaluate(EvalSettings(model=str(own), data=(str(data),), dtype="float32"))

    assert report.base == "base"
    assert report.base_report is not None
    assert report.base_report.exit_layer == 6
    assert report.base_report.metrics["loss"] == report.exits[-1].metrics["loss"]


@pytest.mark.parametrize("flag", [["--no-base"], ["--base", "none"]])
def test_the_base_can_be_left_out(
    tmp_path: Path, data: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_checkpoint(tmp_path / "base", exits=None)
    own = tmp_path / "own"
    own.mkdir()
    write_sorted_json(own, EXITS, base="../base")

    assert run(own, "--data", data, "--json", *flag) == 0

    assert json.loads(capsys.readouterr().out.splitlines()[-1])["base_report"] is None


def test_another_model_can_be_the_base(model: Path, data: Path, tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", "qwen3-tied", exits=EXITS)

    report = evaluate(
        EvalSettings(model=str(model), data=(str(data),), base=str(other), dtype="float32")
    )

    assert report.base == "other"
    assert report.base_report is not None
    assert report.base_report.metrics["loss"] != report.exits[-1].metrics["loss"]


def test_a_folder_without_sorted_json_is_measured_and_left_as_it_is(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_tiny_checkpoint(tmp_path / "plain", exits=None)

    assert run(plain, "--data", data, "--exits", "2,4") == 0

    assert "plain has no sorted.json here" in capsys.readouterr().out
    assert not (plain / "sorted.json").exists()


@pytest.mark.parametrize("flags", [["--no-write"], ["--exits", "4,6"]])
def test_sorted_json_stays_as_it_was_if_asked_or_if_an_exit_is_left_out(
    model: Path, data: Path, flags: list[str]
) -> None:
    before = (model / "sorted.json").read_bytes()

    assert run(model, "--data", data, *flags) == 0

    assert (model / "sorted.json").read_bytes() == before


def test_quantised_weights_are_told_apart_and_never_written_into_sorted_json(
    model: Path,
    data: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", TOY)
    before, output = (model / "sorted.json").read_bytes(), tmp_path / "report"
    given = ["--data", data, "--prompts", prompts, "--max-tokens", "4", "--output", output]

    assert run(model, *given, "--quantize", "toy") == 0

    printed = capsys.readouterr().out
    assert "tiny in toy, held-out text" in printed
    assert "Measured with --quantize toy: not written into sorted.json." in printed
    assert json.loads((output / "report.json").read_text())["settings"]["quantize"] == "toy"
    assert (model / "sorted.json").read_bytes() == before


def test_an_unknown_quantiser_is_refused(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, model, "--data", data, "--quantize", "int5")

    assert error.startswith("--quantize='int5' is not one of none")


def test_two_files_of_one_name_are_told_apart(model: Path, data: Path) -> None:
    report = evaluate(
        EvalSettings(model=str(model), data=(str(data), str(data)), limit_rows=1, dtype="float32")
    )

    assert list(report.exits[0].by_file) == ["set-dev", "set-dev#2"]


def test_a_model_without_a_chat_template_is_asked_in_the_form_it_is_trained_in(
    model: Path, prompts: Path
) -> None:
    (model / "chat_template.jinja").unlink()

    report = evaluate(
        EvalSettings(model=str(model), prompts=(prompts,), max_tokens=3, dtype="float32")
    )

    assert report.exits[-1].metrics["mean_tokens"] > 0


# mistakes


def test_nothing_to_measure_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, model) == "there is nothing to measure: give --data, --qa or --prompts."


def test_a_model_must_be_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--data", data) == "MODEL is missing."


@pytest.mark.parametrize("flag", ["--data", "--qa", "--prompts"])
def test_a_missing_file_is_named(
    model: Path, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere.jsonl"

    assert str(missing) in refused(capsys, model, flag, missing)


@pytest.mark.parametrize(
    ("flag", "row", "said"),
    [
        ("--data", {"instruction": "Say it."}, "`instruction`"),
        ("--data", {"instruction": "Say it.", "output": 3}, "`output`"),
        ("--qa", {"question": "Who?"}, "a row of --qa has `question` and `answers`"),
        ("--qa", {"question": "Who?", "answers": []}, "`answers` is an empty list"),
        ("--qa", {"question": "Who?", "answers": [1]}, "`answers[0]` is a number"),
        ("--prompts", {"output": "Hm."}, "a row of --prompts has `instruction` or `turns`"),
        ("--prompts", {"turns": []}, "`turns` is an empty list"),
        ("--prompts", {"instruction": None}, "`instruction` is null"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    model: Path,
    tmp_path: Path,
    flag: str,
    row: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"instruction": "Go.", "output": "Gone.", "question": "Who?", "answers": ["I"]}
    path = write(tmp_path / "rows.jsonl", [good, row])

    error = refused(capsys, model, flag, path)

    assert error.startswith(f"{path}:2: ")
    assert said in error


def test_a_line_that_is_no_json_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Who?", "answers": ["I"]}\n\n{"question": \n')

    assert refused(capsys, model, "--qa", path).startswith(f"{path}:3: ")


def test_an_empty_file_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "empty.jsonl", [])

    assert refused(capsys, model, "--prompts", path) == f"{path}: there is no row in it."


@pytest.mark.parametrize("exits", ["7", "0", "4,2"])
def test_exits_that_the_model_does_not_have_are_refused(
    model: Path, data: Path, exits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, model, "--data", data, "--exits", exits).startswith("--exits")


def test_a_prompt_longer_than_the_context_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "long.jsonl", [{"instruction": "x " * 300}])

    error = refused(capsys, model, "--prompts", path)

    assert "leaves no room for an answer: the context of tiny is 256 tokens" in error


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    error = refused(capsys, model, "--data", data, "--output", tmp_path / "file" / "out")

    assert "cannot be written" in error


def test_a_base_asked_for_by_name_must_be_there(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--data", data, "--base", tmp_path / "nowhere") == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_mistyped_flag_gets_a_hint(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Did you mean --data?" in refused(capsys, model, "--dat", data)


def test_weights_that_give_no_number_are_refused(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    before = (model / "sorted.json").read_bytes()

    assert run(model, "--data", data) == 2

    assert "the loss of exit 6 on set-dev is nan" in capsys.readouterr().err
    assert (model / "sorted.json").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "exit_modules.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_weights_that_are_not_whole_are_refused_and_never_measured(
    model: Path, data: Path, name: str, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = model / name, (model / "sorted.json").read_bytes()
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[: len(content) // 2])

    assert name in refused(capsys, model, "--data", data)
    assert (model / "sorted.json").read_bytes() == before


def test_a_sorted_json_that_cannot_be_written_is_one_line(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    before = (model / "sorted.json").read_bytes()
    monkeypatch.setattr(os, "fsync", disk_full)

    assert run(model, "--data", data) == 2

    assert "sorted.json cannot be written: No space left on device." in capsys.readouterr().err
    assert (model / "sorted.json").read_bytes() == before
