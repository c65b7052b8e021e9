"""Calls of tools: what is asked of the model, and how its text is read, however it is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.api.tools.choice import ToolChoice, read_tool_choice, require_dialect
from sortserve.api.tools.offered import RESPONSES
from sortserve.api.tools.parsers import Delta, Parser, make_parser
from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import Grammar
from sortserve.text.tokenizer import Tokenizer
from sortserve.text.tool_dialects import dialect_of
from support.byte_tokenizer import CHATML_TEMPLATE
from support.schemas import can_write, check_document, compiler, random_choice, write
from support.tiny_models import tiny_tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer(), frozenset({2}))


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "description": "A function."}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", 'Rome {["]}']}},
}
WEATHER, CLOCK = tool("weather", CITY), tool("clock")
NAMED = {"type": "function", "function": {"name": "weather"}}
AUTO, REQUIRED = ToolChoice(kind="auto"), ToolChoice(kind="required")


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as the responses API writes it."""
    return {"type": "function", **tool["function"]}


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    names = [{"type": "function", "function": {"name": t["function"]["name"]}} for t in tools]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}


def read(parser: Parser, text: str, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls of a text that comes in pieces."""
    content, calls = "", dict[int, list[str]]()
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    deltas: list[Delta] = []
    start = 0
    for end in ends:
        deltas.append(parser.push(text[start:end]))
        start = end
    for delta in [*deltas, parser.finish()]:
        content += delta.content
        for call in delta.calls:
            if call.name is not None:
                assert call.index == len(calls)
                assert call.id
                calls[call.index] = [call.name, ""]
            calls[call.index][1] += call.arguments
    return content, [(name, arguments) for name, arguments in calls.values()]


CUTS = st.lists(st.integers(0, 200), max_size=30)
ARGUMENTS = '{"city": "Rome {[\\"]}", "list": [1, {"a": []}]}'


@given(cuts=CUTS)
def test_forced_calls_are_read_as_they_are_written(cuts: list[int]) -> None:
    first, second = f'"weather", "arguments": {ARGUMENTS}', '"clock", "arguments": {}'
    text = f'[{{"name": {first}}}, {{"name": {second}}}]'

    content, calls = read(make_parser(REQUIRED, None), text, cuts)

    assert content == ""
    assert calls == [("weather", ARGUMENTS), ("clock", "{}")]


@given(cuts=CUTS)
def test_the_text_of_a_named_function_is_its_arguments(cuts: list[int]) -> None:
    content, calls = read(
        make_parser(ToolChoice(kind="named", name="weather"), None), ARGUMENTS, cuts
    )

    assert (content, calls) == ("", [("weather", ARGUMENTS)])


CALL = '{"name": "clock", "arguments": {"zone": "é"}}'
LLAMA = '{"name": "clock", "parameters": {"zone": "é"}}'
READ = [("clock", '{"zone": "\\u00e9"}')]


@pytest.mark.parametrize(
    ("dialect", "text", "content", "calls"),
    [
        ("hermes", f"Well.<tool_call>\n{CALL}\n</tool_call>", "Well.", READ),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", READ * 2),
        ("hermes", f"<tool_call>{CALL}", "", READ),
        ("hermes", "no <tool_cat> here <tool", "no <tool_cat> here <tool", []),
        ("hermes", "<tool_call>oh</tool_call>", "<tool_call>oh</tool_call>", []),
        ("llama3", LLAMA, "", READ),
        ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", "", READ * 2),
        ("llama3", '{"not": "a call"}', '{"not": "a call"}', []),
        ("llama3", "Hello {you}", "Hello {you}", []),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "", READ * 2),
        ("mistral", f" [{CALL}]", "", READ),
        ("mistral", "[1] is a footnote", "[1] is a footnote", []),
    ],
)
@given(cuts=CUTS)
def test_calls_of_a_models_own_accord_are_read_in_its_form(
    dialect: str, text: str, content: str, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    found, found_calls = read(make_parser(AUTO, dialect), text, cuts)

    assert (found.strip(), found_calls) == (content, calls)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("hermes", f"<tool_call>{CALL}</tool_call>"),
        ("llama3", LLAMA),
        ("mistral", f"[{CALL}]"),
    ],
)
def test_a_call_of_what_is_not_allowed_is_text(dialect: str, text: str) -> None:
    may = [read_tool_choice([WEATHER, CLOCK], allowed("auto", t), None) for t in (CLOCK, WEATHER)]

    assert read(make_parser(may[0], dialect), text, []) == ("", READ)
    assert read(make_parser(may[1], dialect), text, []) == (text, [])


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (AUTO, f"[{CALL}]"),
        (REQUIRED, f"[{CALL}]"),
        (ToolChoice(kind="named", name="clock"), "{}"),
    ],
)
def test_ids_are_such_as_mistrals_templates_take(choice: ToolChoice, text: str) -> None:
    parser = make_parser(choice, "mistral")

    [call_id] = [call.id for d in (parser.push(text), parser.finish()) for call in d.calls]

    assert call_id is not None
    assert len(call_id) == 9
    assert call_id.isalnum()


@pytest.mark.parametrize("parallel", [None, False])
def test_a_required_answer_is_a_list_of_valid_calls(parallel: bool | None) -> None:
    nested = tool("f", {"$ref": "#/$defs/Empty", "$defs": {"Empty": {"type": "object"}}})
    choice = read_tool_choice([WEATHER, CLOCK, nested], "required", parallel)
    format_ = choice.output_format()
    assert format_ is not None
    grammar = compiler().compile(format_)

    for seed in range(30):
        tokens, _, ended = write(grammar, random_choice(seed), most=1500)
        if not ended:
            continue
        text = TOKENIZER.decode(tokens)
        check_document(text, json.loads(format_.text))
        _, calls = read(make_parser(REQUIRED, None), text, [seed])
        assert 1 <= len(calls) <= (1 if parallel is False else 16)
        for name, arguments in calls:
            if name == "weather":
                check_document(arguments, CITY)


def test_values_in_parameters_are_no_references() -> None:
    value = {"$ref": "#/x"}
    fields = {"v": {"const": value}, "enum": {"$ref": "#/properties/v"}}
    choice = read_tool_choice([tool("f", {"properties": fields})], "required", None)
    format_ = choice.output_format()
    assert format_ is not None

    moved = json.loads(format_.text)["$defs"]["tool0"]["properties"]
    assert moved == {
        "v": {"const": value},
        "enum": {"$ref": "#/$defs/tool0/properties/v"},
    }


def test_a_fault_is_named_where_the_client_wrote_it() -> None:
    tools = [*(tool(f"f{i}") for i in range(10)), tool("g", {"properties": {"a": {"not": {}}}})]
    format_ = read_tool_choice(tools, "required", None).output_format()
    assert format_ is not None

    with pytest.raises(InvalidRequestError) as refused:
        compiler().compile(format_)

    place = "tools.10.function.parameters.properties.a"
    assert refused.value.param == place
    assert str(refused.value).startswith(place)


def test_a_named_function_has_its_own_parameters() -> None:
    format_ = read_tool_choice([CLOCK, WEATHER], NAMED, None).output_format()

    assert format_ is not None
    assert json.loads(format_.text) == CITY
    assert format_.param == "tools.1.function.parameters"


def grammar_of_arguments(parameters: dict[str, Any] | None) -> Grammar:
    """What a forced call of a function with such parameters is held to."""
    choice = {"type": "function", "function": {"name": "f"}}
    format_ = read_tool_choice([tool("f", parameters)], choice, None).output_format()
    assert format_ is not None
    return compiler().compile(format_)


def test_a_function_that_names_no_parameters_has_none() -> None:
    grammar = grammar_of_arguments(None)

    assert can_write(grammar, "{}")
    assert not can_write(grammar, '{"zone": 1}')


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"type": ["object", "null", "array"]},
        {"$ref": "#/$defs/A", "$defs": {"A": {"type": ["object", "array", "null"]}}},
        {"anyOf": [{"type": "object"}, {"type": "array"}, {"type": "null"}]},
    ],
)
def test_arguments_are_an_object_whatever_else_their_schema_allows(
    parameters: dict[str, Any],
) -> None:
    grammar = grammar_of_arguments(parameters)

    written = [text for text in ('{"a": 1}', "[]", "null") if can_write(grammar, text)]
    assert written == ['{"a": 1}']


def test_of_the_allowed_tools_alone_is_one_called_and_the_template_told() -> None:
    choice = read_tool_choice([CLOCK, WEATHER], allowed("required", WEATHER), None)
    format_ = choice.output_format()

    assert format_ is not None
    calls = json.loads(format_.text)["items"]
    assert calls["properties"]["name"] == {"const": "weather"}
    assert format_.places == (("tools.$defs.tool0", "tools.1.function.parameters"),)
    assert choice.template_arguments == {"tools": [WEATHER]}


def test_the_responses_api_writes_the_same_without_the_inner_object() -> None:
    tools = [flat(CLOCK), flat(WEATHER)]
    named = read_tool_choice(tools, {"type": "function", "name": "weather"}, None, RESPONSES)
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "clock"}]}

    assert named.template_arguments == {"tools": [CLOCK, WEATHER]}
    format_ = named.output_format()
    assert format_ is not None
    assert format_.param == "tools.1.parameters"
    assert json.loads(format_.text) == CITY
    assert read_tool_choice(tools, some, None, RESPONSES).callable_names == frozenset({"clock"})


def test_calls_are_left_to_the_model_only_where_they_can_be_read() -> None:
    require_dialect(AUTO, "hermes")
    require_dialect(REQUIRED, None)
    with pytest.raises(InvalidRequestError, match="Hermes"):
        require_dialect(AUTO, None)


@pytest.mark.parametrize(
    ("tools", "choice", "kind"),
    [
        (None, None, "none"),
        ([], "auto", "none"),
        ([CLOCK], None, "auto"),
        ([CLOCK], "none", "none"),
        ([CLOCK], "required", "required"),
        ([WEATHER], NAMED, "named"),
        ([CLOCK, WEATHER], allowed("auto", CLOCK), "auto"),
        ([CLOCK, WEATHER], allowed("required", CLOCK), "required"),
    ],
)
def test_what_is_asked_of_the_model(tools: Any, choice: Any, kind: str) -> None:
    assert read_tool_choice(tools, choice, None).kind == kind


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "retrieval"}], None, "tools.0.type"),
        (["clock"], None, "tools.0"),
        ([{"type": "function", "name": "clock"}], None, "tools.0.function"),
        ([tool("a b")], None, "tools.0.function.name"),
        ([CLOCK, tool("f", [])], None, "tools.1.function.parameters"),  # type: ignore[arg-type]
        ([tool("f", {"type": "array"})], None, "tools.0.function.parameters.type"),
        ([tool("f", {"type": ["string", "null"]})], None, "tools.0.function.parameters.type"),
        ([CLOCK, CLOCK], None, "tools"),
        ([CLOCK], "always", "tool_choice"),
        ([CLOCK], NAMED, "tool_choice.function.name"),
        (None, "required", "tool_choice"),
        ([CLOCK], {"type": "function"}, "tool_choice.function"),
        ([CLOCK], {"type": "web_search"}, "tool_choice"),
        ([CLOCK], {"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ([CLOCK], allowed("none", CLOCK), "tool_choice.allowed_tools.mode"),
        ([CLOCK], allowed("auto"), "tool_choice.allowed_tools.tools"),
        ([CLOCK], allowed("auto", CLOCK, CLOCK), "tool_choice.allowed_tools.tools"),
        ([CLOCK], allowed("auto", WEATHER), "tool_choice.allowed_tools.tools.0.function.name"),
        (None, allowed("auto", CLOCK), "tool_choice.allowed_tools.tools"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_tool_choice(tools, choice, None)

    assert refused.value.param == param


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([CLOCK], None, "tools.0.name"),
        ([flat(CLOCK)], {"type": "function", "name": "weather"}, "tool_choice.name"),
        ([flat(CLOCK)], NAMED, "tool_choice.name"),
        ([flat(CLOCK)], {"type": "allowed_tools", "mode": "all"}, "tool_choice.mode"),
        ([flat(CLOCK)], allowed("auto", CLOCK), "tool_choice.mode"),
    ],
)
def test_places_are_those_of_the_route(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_tool_choice(tools, choice, None, RESPONSES)

    assert refused.value.param == param


def test_the_form_of_calls_is_known_by_the_template() -> None:
    assert dialect_of([CHATML_TEMPLATE]) is None
    assert dialect_of(["{% if tools %}<tool_call>{% endif %}"]) == "hermes"
    assert dialect_of(["{% if tools %}[AVAILABLE_TOOLS]{% endif %}"]) == "mistral"
    assert dialect_of(["{% if tools %}Environment: ipython{% endif %}"]) == "llama3"
