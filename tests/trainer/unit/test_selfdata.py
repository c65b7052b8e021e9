"""``sortserve selfdata``: one row per prompt, going on where it was cut; mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sortserve import LLM
from sortserve.cli import main
from sortserve.core.request import FinishReason
from support.tiny_models import make_tiny_checkpoint

PROMPTS = [
    {"instruction": "Say hello.", "input": ""},
    {"question": "What is up?", "answers": ["the sky"]},
    {"instruction": "Repeat this.", "input": "twice " * 200},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", exits=None)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    return path


def write(model: Path, prompts: Path, output: Path, *more: str) -> list[dict[str, str]]:
    arguments = f"selfdata {prompts} --model {model} --output {output}"
    limits = ["--max-prompt-tokens", "64", "--max-tokens", "60"]
    assert main([*arguments.split(), *limits, *more]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_has_a_row_in_the_form_that_training_reads(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = write(model, prompts, tmp_path / "out.jsonl")

    assert [row["instruction"][:12] for row in rows] == [
        "Say hello.",
        "What is up?",
        "Repeat this.",
    ]
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)


def test_an_answer_that_was_cut_or_to_a_prompt_too_long_is_left_empty(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = write(model, prompts, tmp_path / "out.jsonl", "--max-tokens", "1")

    assert [row["output"] for row in rows] == ["", "", ""]


def test_a_whole_answer_is_kept_unless_it_goes_around_in_circles(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Hello to you.", "so it goes and " * 9]

    def scripted(self: LLM, prompts: list[list[int]], *_: object, **__: object) -> list[Any]:
        answers = [SimpleNamespace(text=t, finish_reason=FinishReason.STOP) for t in texts]
        return [SimpleNamespace(outputs=(answer,)) for answer in answers[: len(prompts)]]

    monkeypatch.setattr(LLM, "generate", scripted)

    rows = write(model, prompts, tmp_path / "out.jsonl")

    assert [row["output"] for row in rows] == ["Hello to you.", "", ""]


def test_every_answer_can_be_kept_with_how_it_ended(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = write(model, prompts, tmp_path / "out.jsonl", "--max-tokens", "1", "--keep-all")

    assert [row.get("finish_reason") for row in rows] == ["length", "length", None]
    assert rows[0]["output"]
    assert not rows[2]["output"]  # the prompt was too long


def test_a_run_that_was_cut_goes_on_after_its_last_whole_row(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    first = {"instruction": "kept", "input": "", "output": "as it is"}
    output.write_text(json.dumps(first) + '\n{"instruction": "half', encoding="utf-8")

    rows = write(model, prompts, output)

    assert rows[0] == first
    assert rows[1]["instruction"] == "What is up?"
    assert len(rows) == len(PROMPTS)


def test_how_far_it_is_goes_to_standard_output(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(model, prompts, tmp_path / "out.jsonl", "--max-tokens", "1")

    assert capsys.readouterr().out == "3 of 3\n"


def test_rows_are_taken_from_every_file_evenly_up_to_the_limit(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.json"
    more.write_text(json.dumps([{"question": f"What is {n}?"} for n in range(6)]))
    output = tmp_path / "out.jsonl"

    arguments = ["selfdata", prompts, more, "--model", model, "--output", output]
    assert main([*map(str, arguments), "--limit", "2", "--max-tokens", "1"]) == 0

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["instruction"] for row in rows] == [
        "Say hello.",
        "What is up?",
        "What is 0?",
        "What is 3?",
    ]


def test_an_exit_of_the_checkpoint_may_answer(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_checkpoint(tmp_path / "sorted", exits=(2, 6))
    budgets = []
    generate = LLM.generate

    def watched(self: LLM, *given: Any, **options: Any) -> Any:
        budgets.append(options["budget"].exit_layer)
        return generate(self, *given, **options)

    monkeypatch.setattr(LLM, "generate", watched)

    write(model, prompts, tmp_path / "shallow.jsonl", "--exit", "2", "--max-tokens", "1")
    write(model, prompts, tmp_path / "full.jsonl", "--max-tokens", "1")

    assert budgets == [2, 6]


def test_a_prompt_that_fills_the_context_is_left_empty_whatever_the_limit(
    model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"instruction": "word " * 4_000}) + "\n")

    rows = write(model, prompts, tmp_path / "out.jsonl", "--max-prompt-tokens", "100000")

    assert [row["output"] for row in rows] == [""]


def scripted_turns(monkeypatch: pytest.MonkeyPatch, *turns: list[tuple[str, str]]) -> list[Any]:
    """Let the model write these texts, with how they end; returns the prompts it is given."""
    asked: list[Any] = []
    left = list(turns)

    def generate(self: LLM, prompts: list[list[int]], *_: object, **__: object) -> list[Any]:
        asked.append([self.tokenizer.decode(prompt) for prompt in prompts])
        outputs = [
            SimpleNamespace(text=text, finish_reason=FinishReason(reason))
            for text, reason in left.pop(0)
        ]
        assert len(outputs) == len(prompts)
        return [SimpleNamespace(outputs=(output,)) for output in outputs]

    monkeypatch.setattr(LLM, "generate", generate)
    return asked


def own(model: Path, output: Path, *more: str) -> list[dict[str, str]]:
    """The rows after a run in which the model writes the prompts, too."""
    arguments = ["selfdata", "--model", model, "--output", output, "--max-tokens", "20", *more]
    assert main([*map(str, arguments)]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_a_model_writes_prompts_as_the_user_of_its_chat_template_and_answers_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted_turns(
        monkeypatch,
        [
            (" Who are you? ", "stop"),
            ("I would like to", "length"),
            ("so it goes and " * 9, "stop"),
        ],
        [("A model.", "stop")],
    )

    rows = own(model, tmp_path / "out.jsonl", "--write-prompts", "3")

    assert rows == [
        {"instruction": "Who are you?", "input": "", "output": "A model."},
        {"instruction": "", "input": "", "output": ""},
        {"instruction": "", "input": "", "output": ""},
    ]
    openings, questions = asked
    assert len(set(openings)) == 1
    (question,) = questions
    assert question.startswith(openings[0])
    assert "Who are you?" in question.removeprefix(openings[0])


def test_what_goes_around_in_circles_is_the_same_for_prompts_and_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    circle = "so it goes and " * 3 + "ends."  # 5 of its 10 4-grams have been there before
    limit = ("--write-prompts", "1", "--max-repetition")

    scripted_turns(monkeypatch, [(circle, "stop")], [])
    dropped = own(model, tmp_path / "dropped.jsonl", *limit, "0.5")
    scripted_turns(monkeypatch, [(circle, "stop")], [(circle, "stop")])
    kept = own(model, tmp_path / "kept.jsonl", *limit, "0.6")

    assert dropped == [{"instruction": "", "input": "", "output": ""}]
    assert kept == [{"instruction": circle, "input": "", "output": circle}]


def test_the_number_of_prompts_that_a_model_writes_counts_those_of_an_earlier_run(
    model: Path, tmp_path: Path
) -> None:
    first = own(model, tmp_path / "out.jsonl", "--write-prompts", "2", "--keep-all")
    rows = own(model, tmp_path / "out.jsonl", "--write-prompts", "5", "--keep-all")

    assert rows[:2] == first
    assert len(rows) == 5


def without_template(folder: Path) -> None:
    make_tiny_checkpoint(folder, exits=None)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake is answered with."""
    assert main(["selfdata", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line.removeprefix("sortserve: error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--output out", "PROMPTS is missing: name files, or let the model --write-prompts."),
        ("prompts.jsonl", "--output is missing."),
        ("--write-prompts 0 --output out", "--write-prompts: '0' is not allowed: "),
        ("prompts.jsonl --write-prompts 3 --output out", "--write-prompts takes the place of"),
        ("--limit 2 --write-prompts 3 --output out", "--write-prompts takes the place of"),
        ("prompts.jsonl --output prompts.jsonl", "--output is also one of PROMPTS"),
        ("prompts.jsonl --output no/out", "--output no/out cannot be written: no is no folder."),
        ("prompts.jsonl --output .", "--output . cannot be written: it is a folder."),
        ("none.jsonl --output out", "none.jsonl: cannot be read: No such file or directory."),
        ("empty.jsonl --output out", "empty.jsonl: there is no prompt in it."),
        (
            "prompts.jsonl --output out --model plain",
            "messages cannot be used: this checkpoint has no chat",
        ),
        ("bad.jsonl --output out", "bad.jsonl:2: not a JSON object on one line: "),
        ("text.txt --output out", "text.txt:1: a row has no `question` or `instruction`"),
        ("number.jsonl --output out", "number.jsonl:1: `instruction` is a number, not a string."),
        ("prompts.jsonl --output out --model ./none", "none does not exist"),
        ("prompts.jsonl --output out --model model --exit 1", "--exit 1 is not an exit of model: "),
        ("prompts.jsonl --output out --temp 0", "unrecognized arguments: --temp 0. Did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    arguments: str,
    said: str,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "Who?"}\n{"question": \n')
    (tmp_path / "text.txt").write_text("plain")
    (tmp_path / "empty.jsonl").write_text("")
    without_template(tmp_path / "plain")
    (tmp_path / "number.jsonl").write_text('{"instruction": 7}\n')
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    assert refused(arguments, capsys).startswith(said)

    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
