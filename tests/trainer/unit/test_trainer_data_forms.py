"""Data as users of other trainers have them: CSV, parquet, gzip, tools, and a file of settings."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sortserve.api.bodies.messages import read_calls
from sortserve.core.errors import ConfigError
from sortserve_trainer.data.chat_format import ChatFormat
from sortserve_trainer.data.forms import Conversation, parse_row
from sortserve_trainer.data.loading import load_examples
from sortserve_trainer.data.rows import Row, read_rows
from sortserve_trainer.data.source import DataSource
from sortserve_trainer.run.settings import load_train_settings
from support.chat_templates import TEMPLATES, TOOL_TEMPLATES, TOOLS
from support.tiny_models import tiny_tokenizer

ROWS = [{"instruction": "Say, it.", "output": "it\nis"}, {"instruction": "Again.", "output": "so"}]


def fields(path: Path) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(path)]


def test_compressed_lines_are_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))

    assert fields(path) == ROWS
    assert next(read_rows(path)).place == f"{path}:1"


def test_half_a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}" * 999)[:-9])

    with pytest.raises(ConfigError, match=r"rows\.jsonl\.gz: is no whole gzip file"):
        fields(path)


def test_csv_has_rows_of_several_lines_and_says_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('instruction,input,output\n"Say, it.",,"it\nis"\nAgain.,,so\n')

    found = list(read_rows(path))

    assert [row.fields for row in found] == ROWS
    assert [row.place for row in found] == [f"{path}:2", f"{path}:4"]


def test_an_empty_answer_in_csv_is_an_empty_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\nSay it.,\n")

    assert parse_row(next(read_rows(path)), ()) is None


@pytest.mark.parametrize("line", ["only one", "one,two,three"])
def test_a_csv_row_of_another_width_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction,output\na,b\n{line}\n")

    with pytest.raises(ConfigError, match=r"rows\.csv:3: it has not 2 fields"):
        fields(path)


def test_parquet_is_read_with_its_lists(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}] * 3), path)

    found = list(read_rows(path))

    assert [row.fields for row in found] == [{"messages": messages}] * 3
    assert found[2].place == f"{path}, row 3"


def test_what_other_rows_of_a_table_say_is_absent_not_null(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, *turns]}
        for turns in (
            [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": [1, None]}}]}],
            [{"role": "assistant", "tool_calls": [{"name": "see", "arguments": {"in": "Rome"}}]}],
        )
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    assert fields(path) == rows


def test_a_field_of_csv_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "word " * 60_000 + "\n")

    assert fields(path) == [{"text": "word " * 60_000}]


def test_what_only_ends_like_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_text("instruction,output\n")

    with pytest.raises(ConfigError, match=r"rows\.parquet: is no parquet file"):
        fields(path)


def test_rows_that_are_longer_than_an_example_may_be_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Say it.", "output": "it " * count} for count in (1, 90, 95)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    load_examples(DataSource(str(path)), tiny_tokenizer(), max_length=80, train_on_prompts=False)

    assert "(--max-length), and cut 2 that are longer." in caplog.text


# Tools

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "wetter", "arguments": {"ort": "Wien"}},
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is it in Vienna?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is sunny."},
]


def parse(**row: Any) -> Conversation:
    conversation = parse_row(Row("data:1", row), ())
    assert isinstance(conversation, Conversation)
    return conversation


def chat_format(template: str) -> ChatFormat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
def test_calls_of_tools_are_learned_and_what_tools_say_is_not(tools: object) -> None:
    conversation = parse(messages=CHAT, tools=tools)

    text, spans = chat_format(TOOL_TEMPLATES["hermes"]).render(conversation)

    call, answer = (text[start:end] for start, end in spans)
    assert call.strip().startswith("<tool_call>")
    assert '"Wien"' in call
    assert call.endswith("</tool_call><|im_end|>")
    assert answer.strip() == "It is sunny.<|im_end|>"
    assert "# Tools" in text[: spans[0][0]]
    assert "sunny" in text[spans[0][1] : spans[1][0]]


def test_conversations_of_sharegpt_are_those_of_messages() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    conversations = [
        {"from": "human", "value": "Warm in Rome?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "31 degrees"},
        {"from": "gpt", "value": "Yes."},
    ]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Warm in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "31 degrees"},
        {"role": "assistant", "content": "Yes."},
    ]
    tools = json.dumps(TOOLS)
    row = {"conversations": conversations, "system": "Be short.", "tools": tools}

    expected = parse_row(Row("here", {"messages": messages, "tools": tools}), ())

    assert parse_row(Row("here", row), ()) == expected
    assert parse_row(Row("here", {**row, "conversations": json.dumps(conversations)}), ()) == (
        expected
    )
    assert parse_row(Row("here", {"conversations": messages, "tools": tools}), ()) == expected


def test_what_came_before_the_question_of_an_alpaca_row_is_part_of_the_conversation() -> None:
    row = {
        "instruction": "And of Italy?",
        "input": "",
        "output": "Rome.",
        "system": "Be short.",
        "history": [["Capital of France?", "Paris."]],
    }
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "Rome."},
    ]

    parsed = parse_row(Row("here", row), ())

    assert parsed == parse_row(Row("here", {"messages": messages}), ())
    assert parsed == parse_row(Row("here", {**row, "history": json.dumps(row["history"])}), ())
    assert isinstance(parsed, Conversation)
    assert parsed.answer_turns == [2, 4]
    empty: dict[str, Any] = {"system": "", "history": []}
    assert parse_row(Row("here", {**ROWS[0], **empty}), ()) == parse_row(Row("here", ROWS[0]), ())


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ("Paris.", "`history` is a string that is not JSON"),
        ({"a": "b"}, "`history` is an object, not a list"),
        ([["a"]], "`history[0]` is not a pair"),
        ([["a", "b"], ["c", 3]], "`history[1][1]` is a number"),
    ],
)
def test_a_bad_history_is_named(history: object, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_row(Row("here", {**ROWS[0], "history": history}), ())


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"from": "human", "value": "Hi"}], "no turn of the role `assistant`"),
        ([{"from": "gpt", "value": "Hi"}], "begins with an answer"),
        ([{"from": 3, "value": "Hi"}], "messages[0].role` is a number"),
        ([{"from": "human"}], "messages[0].content` is null"),
        ([{"from": "function_call", "value": "{"}], "conversations[0].value` is a call"),
        ([{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "3"}], "tool_calls"),
        ("[", "`conversations` is a string that is not JSON"),
    ],
)
def test_a_bad_conversation_of_sharegpt_is_named(turns: object, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_row(Row("here", {"conversations": turns}), ())


def test_a_conversation_may_be_json_in_a_string_which_is_all_that_csv_holds() -> None:
    assert parse(messages=json.dumps(CHAT)) == parse(messages=CHAT)
    with pytest.raises(ConfigError, match="`messages` is a string that is not JSON"):
        parse(messages="hi")


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(
    ("written", "read"),
    [('{"ort": "Wien"}', {"ort": "Wien"}), ("", {}), (None, {}), ("Wien", "Wien")],
)
def test_arguments_in_a_string_are_what_the_server_makes_of_them(
    written: str | None, read: object, is_flat: bool
) -> None:
    def call(arguments: object) -> dict[str, Any]:
        function = {"name": "wetter", "arguments": arguments}
        return function if is_flat else {"type": "function", "function": function}

    turn = {"role": "assistant", "content": "", "tool_calls": [call(written)]}

    found = parse(messages=[CHAT[1], turn]).messages[1]["tool_calls"]

    assert found == [call(read)]
    if not is_flat:
        assert found == read_calls([call(written)], "messages.1.tool_calls")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": CHAT, "tools": TOOLS}, "does not show `tools`"),
        ({"messages": CHAT}, r"tool calls of `messages\[2\]`"),
    ],
)
def test_a_template_that_knows_no_tools_is_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chat_format(TEMPLATES["chatml"]).render(parse(**row))


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "assistant", "tool_calls": {"a": 1}}, r"messages\[1\]\.tool_calls` is an object"),
        ({"role": "assistant", "tool_calls": ["a"]}, r"tool_calls\[0\]` is a string"),
        ({"role": "assistant", "content": "x", "name": 3}, r"messages\[1\]\.name` is a number"),
        ({"role": "assistant", "content": None}, r"messages\[1\]\.content` is null"),
    ],
)
def test_a_bad_turn_is_named(turn: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(messages=[{"role": "user", "content": "hi"}, turn])


# --config


def settings_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    return str(path)


def test_settings_come_from_a_file_and_flags_win(tmp_path: Path) -> None:
    config = settings_file(
        tmp_path,
        "data: [a.jsonl, 'b.jsonl:0.5']\nexits: [2, 4]\noutput: out\nlearning-rate: 1e-3\n"
        "freeze-trunk: true\nmax_length: 100\nseed: 3\n",
    )

    settings = load_train_settings({"config": config, "seed": "4", "output": "elsewhere"})

    assert settings.data == ("a.jsonl", "b.jsonl:0.5")
    assert settings.exits == (2, 4)
    assert settings.learning_rate == 1e-3
    assert settings.freeze_trunk
    assert (settings.max_length, settings.seed, str(settings.output)) == (100, 4, "elsewhere")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning-rat: 1", "unknown key 'learning-rat' .*did you mean 'learning-rate'"),
        ("zzz: 1", "sortserve train --help"),
        ("seed: [1", "not valid YAML"),
        ("seed: true", "--seed"),
        ("- seed", "key: value"),
    ],
)
def test_a_bad_file_of_settings_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_train_settings(
            {"config": settings_file(tmp_path, text), "data": "d", "exits": "2", "output": "o"}
        )
