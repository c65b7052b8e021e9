"""``--data`` arguments and data files: what is read, and that a bad file is named with its line."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sortserve.core.errors import ConfigError
from sortserve_trainer.data import (
    DataSource,
    Example,
    file_digest,
    load_examples,
    parse_source,
)
from support.tiny_models import tiny_tokenizer

ROW = '{"instruction": "Say hi.", "output": "hi"}'


def load(reference: Path | str, **options: Any) -> list[Example]:
    options = {"max_length": 200, "train_on_prompts": False, **options}
    return load_examples(DataSource(str(reference)), tiny_tokenizer(), **options)


def refusal(reference: Path | str, **options: Any) -> str:
    """The message with which a source is refused; it must be one line."""
    with pytest.raises(ConfigError) as caught:
        load(reference, **options)
    assert "\n" not in caught.value.message
    assert caught.value.param == "data"
    return caught.value.message


def answers(examples: list[Example]) -> list[str]:
    return [tiny_tokenizer().decode(e.token_ids[e.is_target][:-1]) for e in examples]


def provide_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    """Put a module in place of the package ``datasets``, which the dev extra has not."""
    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


# ---- --data ----


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("train.jsonl", DataSource("train.jsonl", 1.0)),
        ("train.jsonl:0.5", DataSource("train.jsonl", 0.5)),
        ("org/name", DataSource("org/name", 1.0)),
        ("org/name:2", DataSource("org/name", 2.0)),
        ("a:b/train.jsonl", DataSource("a:b/train.jsonl", 1.0)),
        ("a:b/train.jsonl:3", DataSource("a:b/train.jsonl", 3.0)),
    ],
)
def test_a_number_after_the_last_colon_is_the_weight(text: str, source: DataSource) -> None:
    assert parse_source(text) == source


def test_a_file_with_a_colon_in_its_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data:2").touch()

    assert parse_source("data:2") == DataSource("data:2", 1.0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "half", "", "1e300"])
def test_a_bad_weight_is_refused_by_name(weight: str) -> None:
    with pytest.raises(ConfigError, match=f"--data a.jsonl:{weight}: '{weight}' is not a weight"):
        parse_source(f"a.jsonl:{weight}")


@pytest.mark.parametrize("text", ["", ":2"])
def test_a_source_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no data"):
        parse_source(text)


# ---- files ----


def test_json_lines_are_read_in_order_and_empty_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"question": "1", "answers": "one"}\r\n\n  \n{"question": "2", "answers": "two"}'
    )

    assert answers(load(path)) == ["one", "two"]


def test_a_json_file_is_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"question": str(i), "answers": [f"answer {i}"]} for i in range(3)]
    path.write_text(json.dumps(rows, indent=2))

    assert answers(load(path)) == ["answer 0", "answer 1", "answer 2"]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ROW.encode())

    assert answers(load(path)) == ["hi"]


def test_forms_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    question = '{"question": "Say ho.", "answers": ["ho"]}'
    path.write_text(f"{ROW}\n{question}\n")

    assert answers(load(path)) == ["hi", "ho"]


@pytest.mark.parametrize(
    ("bad_line", "reason"),
    [
        (b"{", "not a JSON object on one line"),
        (b'{"instruction": "x"', "not a JSON object on one line"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"text"', "a row is a JSON object, not a string"),
        (b"7", "a row is a JSON object, not a number"),
        (b"\xff\xfe", "byte 0xff is not UTF-8"),
        (b"{}", "no columns: none of the forms of a row: a row has `messages`, or"),
        (b'{"prompt": "x", "completion": "y"}', "`prompt`, `completion`: none of the forms"),
        (b'{"instruction": "x", "input": ""}', "`instruction`, `input`: none of the forms"),
        (b'{"instruction": "x", "output": null}', "`instruction`: none of the forms"),
        (b'{"instruction": "x", "output": 5}', "`output` is a number, not a string"),
        (b'{"instruction": ["x"], "output": "y"}', "`instruction` is a list, not a string"),
        (b'{"instruction": "x", "output": "\\ud800"}', "`output` is not valid Unicode"),
        (b'{"question": "x", "answers": {"text": ["y"]}}', "`answers` is an object, not a string"),
        (b'{"question": "x", "answers": [true]}', "`answers[0]` is a boolean, not a string"),
        (b'{"text": 5}', "`text` is a number, not a string"),
        (b'{"messages": "hi"}', "`messages` is a string that is not JSON"),
        (b'{"messages": 5}', "`messages` is a number, not a list"),
        (b'{"messages": []}', "`messages` has no turn of the role `assistant`"),
        (b'{"messages": ["hi"]}', "`messages[0]` is a string, not an object"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no turn of the role `assistant`"),
        (b'{"messages": [{"role": "user"}]}', "`messages[0].content` is null, not a string"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "begins with an answer"),
    ],
)
def test_a_broken_row_is_named_with_its_file_and_line(
    tmp_path: Path, bad_line: bytes, reason: str
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join([ROW.encode()] * 11 + [bad_line] + [ROW.encode()] * 3))

    message = refusal(path)

    assert message.startswith(f"{path}:12: ")
    assert reason in message


def test_a_broken_row_of_a_list_is_named_with_the_line_it_begins_at(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([json.loads(ROW), {"prompt": "x"}], indent=1))

    assert refusal(path).startswith(f"{path}:6: `prompt`")


def test_broken_json_in_a_list_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(f"[\n{ROW},\n{ROW}\n{ROW}]")

    assert refusal(path).startswith(f"{path}:4: not valid JSON: Expecting ',' delimiter")


def test_text_that_is_not_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo\ncafé\n".encode("latin-1"))

    assert refusal(path).startswith(f"{path}:3: byte 0xe9 is not UTF-8")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[ ]"), ("a.json", "")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)

    assert refusal(path) == f"{path}: there is no row in it."


def test_a_file_whose_answers_are_all_empty_is_refused_with_the_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "x", "output": " "}\n' * 3)

    assert f"{path}: no row to learn from: skipped 3 empty and 0" in refusal(path)


def test_a_missing_file_a_folder_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xls").write_text("x,y")

    assert "a.jsonl: cannot be read: No such file" in refusal(tmp_path / "a.jsonl")
    assert "is a folder: name a file in it" in refusal(tmp_path)
    assert "only .json, .jsonl, .txt, .csv, .parquet files can be" in refusal(tmp_path / "a.xls")


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(ROW)

    assert file_digest(path) == hashlib.sha256(ROW.encode()).hexdigest()


def test_the_digest_of_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.jsonl: cannot be read"):
        file_digest(tmp_path / "a.jsonl")


# ---- hub ----


def test_a_hub_data_set_is_read_by_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [
            {"question": None, "instruction": "Say hi.", "input": None, "output": "hi"},
            {"question": "Say ho.", "answers": ["ho"], "instruction": None},
        ]

    provide_datasets(monkeypatch, load_dataset)

    assert answers(load("org/name", split="validation")) == ["hi", "ho"]
    assert asked == [("org/name", "validation")]


def test_a_hub_row_of_no_known_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    provide_datasets(monkeypatch, lambda name, split: [json.loads(ROW), {"chosen": "x"}])

    assert refusal("org/name").startswith("org/name, row 1 of train: `chosen`: none of the forms")


def test_a_hub_data_set_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub.")

    provide_datasets(monkeypatch, load_dataset)

    assert refusal("org/name") == (
        "org/name: no such file here, and as a hub data set it does not load: "
        "Couldn't reach the Hub."
    )


def test_without_the_package_datasets_the_extra_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    assert "pip install 'sortserve[train]'" in refusal("org/name")
