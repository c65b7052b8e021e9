"""The score, what goes into ``sorted.json``, the table and the plot."""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from sortserve.core.schedule import DepthSchedule
from sortserve_trainer.evaluation.answering import AnswerQuality, Fluency
from sortserve_trainer.evaluation.likelihood import Likelihood
from sortserve_trainer.evaluation.plot import draw_quality
from sortserve_trainer.evaluation.report import (
    Measured,
    ModelReport,
    Report,
    Sample,
    ScheduleReport,
    details,
    summarise,
)
from sortserve_trainer.evaluation.table import quality_tables


def likelihood(loss: float, agreement: float = 1.0, kl: float = 0.0) -> Likelihood:
    return Likelihood(loss=loss, agreement=agreement, kl=kl, num_tokens=100)


def measured(*losses: float) -> Measured:
    return Measured(likelihoods={f"file-{i}": likelihood(loss) for i, loss in enumerate(losses)})


def everything() -> Measured:
    return Measured(
        likelihoods={"dev": likelihood(7.0)},
        answers={"qa": AnswerQuality(exact_match=1.0, f1=1.0, contains=1.0, num_questions=4)},
        fluencies={
            "prompts": Fluency(
                repetition=1.0, loop_rate=1.0, mean_tokens=256.0, ended=1.0, num_prompts=10
            )
        },
    )


def model_report(exit_layer: int, item: Measured, full: Measured | None) -> ModelReport:
    return ModelReport(
        exit_layer=exit_layer,
        compute=exit_layer / 6,
        num_parameters=1000 * exit_layer,
        metrics=summarise(item, full),
        by_file=details(item, has_full=full is not None),
        samples=(Sample("Hi", "Hello.", True),),
    )


def report(*files_of_exits: Measured, base: Measured | None = None) -> Report:
    full = files_of_exits[-1]
    return Report(
        model="tiny",
        base=None if base is None else "base",
        settings={"seed": 0},
        files=[],
        versions={},
        exits=tuple(model_report(2 * i + 2, m, full) for i, m in enumerate(files_of_exits)),
        base_report=None if base is None else model_report(6, base, None),
    )


# the score


def test_the_full_depth_scores_1() -> None:
    full = measured(2.0, 3.0)

    assert summarise(full, full)["score"] == 1.0


def test_the_score_is_the_ratio_of_the_perplexities() -> None:
    full, exit_ = measured(2.0), measured(2.5)

    metrics = summarise(exit_, full)

    assert metrics["score"] == pytest.approx(math.exp(-0.5))
    assert metrics["score"] == pytest.approx(math.exp(2.0) / metrics["perplexity"])


def test_several_files_count_alike_and_in_log_space() -> None:
    full, exit_ = measured(2.0, 4.0), measured(2.2, 4.8)

    metrics = summarise(exit_, full)

    assert metrics["loss"] == pytest.approx(3.5)
    assert metrics["score"] == pytest.approx(math.sqrt(math.exp(-0.2) * math.exp(-0.8)))


def test_a_lower_loss_never_scores_less() -> None:
    full = measured(2.0)
    scores = [summarise(measured(loss), full)["score"] for loss in (30.0, 9.0, 3.0, 2.1, 2.0, 1.9)]

    assert scores == sorted(scores)
    assert all(0.0 <= score <= 1.0 for score in scores)


def test_an_exit_better_than_the_full_depth_scores_1() -> None:
    assert summarise(measured(1.9), measured(2.0))["score"] == 1.0


def test_without_losses_there_is_no_score() -> None:
    answers = {"qa": AnswerQuality(exact_match=0.5, f1=0.6, contains=0.7, num_questions=2)}

    metrics = summarise(Measured(answers=answers), Measured(answers=answers))

    assert metrics == {"exact_match": 0.5, "f1": 0.6, "contains": 0.7}


def test_a_loss_beyond_what_floats_can_hold_is_still_a_number() -> None:
    metrics = summarise(measured(5000.0), measured(2.0))

    assert math.isfinite(metrics["perplexity"])
    assert metrics["score"] == 0.0


def test_the_base_has_no_score_and_no_agreement_since_it_is_another_model() -> None:
    assert summarise(measured(2.0), None).keys() == {"loss", "perplexity"}


# what sorted.json keeps


def test_quality_names_every_metric_once() -> None:
    quality = report(everything()).quality()

    assert list(quality) == [2]
    assert list(quality[2]) == [
        "score",
        "loss",
        "perplexity",
        "agreement",
        "kl",
        "exact_match",
        "f1",
        "contains",
        "repetition",
        "loop_rate",
        "mean_tokens",
        "ended",
    ]


def test_quality_has_the_loss_of_each_file_where_there_are_several() -> None:
    quality = report(measured(2.5, 3.5), measured(2.0, 3.0)).quality()

    assert quality[2]["loss"] == 3.0
    assert quality[2]["loss/file-0"] == 2.5
    assert quality[4]["loss/file-1"] == 3.0


def test_the_document_is_plain_json_with_samples_and_details() -> None:
    document = json.loads(json.dumps(report(measured(2.5), measured(2.0)).document()))

    assert document["format_version"] == 1
    assert document["exits"][0]["by_file"]["file-0"]["num_tokens"] == 100
    assert document["exits"][0]["samples"] == [{"prompt": "Hi", "text": "Hello.", "ended": True}]


# which exits are fit to be used


def fluent(repetition: float, loop_rate: float = 0.0) -> dict[str, Fluency]:
    item = Fluency(
        repetition=repetition, loop_rate=loop_rate, mean_tokens=90.0, ended=0.5, num_prompts=10
    )
    return {"prompts": item}


@pytest.mark.parametrize(
    ("exit_", "usable"),
    [
        pytest.param(measured(2.6), True, id="a little less likely"),
        pytest.param(measured(2.75), False, id="less than half as likely"),
        pytest.param(Measured(fluencies=fluent(0.2)), True, id="repeats a little more"),
        pytest.param(Measured(fluencies=fluent(0.3)), False, id="repeats itself"),
        pytest.param(Measured(fluencies=fluent(0.1, 0.2)), False, id="loops"),
        pytest.param(
            Measured(likelihoods={"file-0": likelihood(2.0)}, fluencies=fluent(0.3)),
            False,
            id="likely, but repeats itself",
        ),
    ],
)
def test_an_exit_is_usable_if_its_text_is_likely_and_repeats_itself_little_more_than_at_full_depth(
    exit_: Measured, usable: bool
) -> None:
    full = Measured(likelihoods={"file-0": likelihood(2.0)}, fluencies=fluent(0.1))

    found = report(exit_, full)

    assert found.usable() == {2: usable, 4: True}
    assert json.loads(json.dumps(found.document()))["usable"] == {"2": usable, "4": True}


def test_an_exit_of_which_nothing_tells_is_not_judged() -> None:
    answers = {"qa": AnswerQuality(exact_match=0.5, f1=0.6, contains=0.7, num_questions=2)}

    assert report(Measured(answers=answers)).usable() == {}


# table and plot


def shown(item: Report) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(*quality_tables(item))
    return captured.get()


def test_the_table_has_a_row_per_exit_and_one_for_the_base() -> None:
    text = shown(report(measured(2.5), measured(2.0), base=measured(2.1)))

    rows = [line.split() for line in text.splitlines()]
    assert ["2", "33.3", "%", "0.607", "2.500", "12.18", "100.0", "%", "0.000"] in rows
    assert ["base", "100.0", "%", "2.100", "8.17"] in rows


def test_the_table_leaves_out_what_was_not_measured() -> None:
    assert "repetition" not in shown(report(measured(2.0)))


def test_everything_fits_80_columns() -> None:
    text = shown(report(everything(), everything(), base=everything()))

    assert "perplexity" in text
    assert "exact match" in text
    assert "ended" in text
    assert "\u2026" not in text, "nothing is cut short"


def test_the_plot_is_a_valid_svg_and_a_valid_png() -> None:
    files = draw_quality(report(measured(2.5, 3.5), measured(2.0, 3.0), base=measured(2.1, 3.1)))

    root = ElementTree.fromstring(files["svg"])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"score", "exit layer", "file-0", "file-1", "base, full depth", "2", "4"} <= texts
    assert files["png"].startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", files["png"][16:24])
    assert width > height > 300


def with_schedules(item: Report, *texts: str) -> Report:
    full = measured(2.0, 3.0)
    entries = [
        ScheduleReport(
            schedule=DepthSchedule.parse(text),
            compute=0.8,
            metrics=summarise(measured(2.1, 3.1), full),
            by_file=details(measured(2.1, 3.1), has_full=True),
        )
        for text in texts
    ]
    return replace(item, schedules=tuple(entries))


def test_schedules_stand_below_the_exits_in_table_plot_and_document() -> None:
    item = report(measured(2.5, 3.5), measured(2.0, 3.0))
    both = with_schedules(item, "0:4,32:2", ",".join(f"{64 * i}:{90 - i}" for i in range(9)))

    rows = [line.split() for line in shown(both).splitlines()]
    assert ["0:4,32:2", "80.0", "%", "0.905", "2.600", "13.46", "100.0", "%", "0.000"] in rows
    assert "\u2026" not in shown(both), "nothing is cut short"
    assert draw_quality(both)["svg"] != draw_quality(item)["svg"]
    document = json.loads(json.dumps(both.document()))
    assert document["schedules"][0]["schedule"] == [[0, 4], [32, 2]]
    [kept, _] = both.schedule_quality()
    assert kept.metrics["loss/file-1"] == 3.1


def test_the_same_report_gives_the_same_plot() -> None:
    item = report(measured(2.5), measured(2.0))

    assert draw_quality(item) == draw_quality(item)


def test_a_report_of_answers_alone_can_be_drawn() -> None:
    answers = {"qa": AnswerQuality(exact_match=0.5, f1=0.6, contains=0.7, num_questions=2)}

    assert draw_quality(report(Measured(answers=answers)))["svg"]
