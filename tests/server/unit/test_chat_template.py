from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import CheckpointError, InvalidRequestError
from sortserve.text.chat_template import ChatTemplate
from sortserve.text.template_renderer import Renderer
from sortserve.text.template_worker import Limits
from sortserve.text.tokenizer import Tokenizer
from support.byte_tokenizer import make_byte_tokenizer
from support.chat_templates import CONVERSATIONS, LISTS_ONLY, TEMPLATES, TOOLS
from support.tiny_models import make_tiny_checkpoint

HELLO = [{"role": "user", "content": "hello"}]
FOREVER = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
SHOW_ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
ONLY_TEXTS = "{% for m in messages %}[{{ m.role }}]{{ m.content + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """Limits that a test can wait for."""
    renderer = Renderer(Limits(cpu_s=0.3, memory_bytes=64 * 2**20, max_chars=100_000))
    yield renderer
    renderer.close()


def hf_with(template: Any) -> PreTrainedTokenizerFast:
    hf_tokenizer = make_byte_tokenizer()
    hf_tokenizer.chat_template = template
    return hf_tokenizer


def rendered(
    template: Any,
    messages: list[dict[str, Any]],
    renderer: Renderer,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    return ChatTemplate(hf_with(template), renderer).render(
        messages, add_generation_prompt=add_generation_prompt, variables=variables
    )


# ---- the same text as transformers ------------------------------------------------------------


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(
    name: str, conversation: str, add_generation_prompt: bool, renderer: Renderer
) -> None:
    hf_tokenizer, messages = hf_with(TEMPLATES[name]), CONVERSATIONS[conversation]
    template = ChatTemplate(hf_tokenizer, renderer)
    for variables in ({}, {"tools": TOOLS}, {"enable_thinking": False, "bos_token": "<my bos>"}):
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        expected = text_of_transformers(hf_tokenizer, messages, **options, **variables)
        if isinstance(expected, str):
            assert template.render(messages, **options, variables=variables) == expected
        else:
            with pytest.raises(InvalidRequestError, match=re.escape(str(expected))) as caught:
                template.render(messages, **options, variables=variables)
            assert caught.value.param == "messages"


def text_of_transformers(
    hf_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **variables: Any
) -> str | Exception:
    """The text, or what the template raises."""
    try:
        return str(hf_tokenizer.apply_chat_template(messages, tokenize=False, **variables))
    except Exception as error:
        return error


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(messages=st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), min_size=1))
def test_any_json_reaches_the_template_as_it_is(
    renderer: Renderer, messages: list[dict[str, Any]]
) -> None:
    template = "{{ messages }}{{ messages | tojson }}"
    assert renderer.render(template, messages, {}) == text_of_transformers(
        hf_with(template), messages
    )


def test_documents_and_a_message_to_continue_are_arguments_as_in_transformers(
    renderer: Renderer,
) -> None:
    hf_tokenizer, messages = hf_with(TEMPLATES["documents"]), CONVERSATIONS["turns"]
    variables: dict[str, Any] = {"documents": [{"title": "a", "text": "b"}]}
    expected = hf_tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    assert rendered(TEMPLATES["documents"], messages, renderer, False, **variables) == expected

    hf_tokenizer, variables = hf_with(TEMPLATES["chatml"]), {"continue_final_message": True}
    expected = hf_tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    assert rendered(TEMPLATES["chatml"], messages, renderer, False, **variables) == expected
    assert expected.endswith("and 3+3?")


@pytest.mark.parametrize("as_list", [False, True])
def test_of_named_templates_the_one_that_transformers_takes_is_used(
    as_list: bool, renderer: Renderer
) -> None:
    named = {"default": "D" + SHOW_ALL, "tool_use": "T" + SHOW_ALL, "rag": "R"}
    hf_tokenizer = hf_with(named)
    if as_list:
        pairs = [{"name": name, "template": text} for name, text in named.items()]
        hf_tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=hf_tokenizer.backend_tokenizer, chat_template=pairs
        )
    template = ChatTemplate(hf_tokenizer, renderer)
    for tools, text in ((None, "Dhello"), ([], "Thello"), (TOOLS, "Thello")):
        variables = {"tools": tools}
        shown = template.render(HELLO, add_generation_prompt=True, variables=variables)
        assert shown == text
        assert shown == hf_tokenizer.apply_chat_template(HELLO, tokenize=False, **variables)


def test_without_a_default_template_a_request_hears_which_there_are(renderer: Renderer) -> None:
    with pytest.raises(InvalidRequestError, match="rag") as caught:
        rendered({"rag": SHOW_ALL}, HELLO, renderer)
    assert caught.value.param == "messages"


def test_half_a_surrogate_pair_passes_the_template_and_is_refused_by_name() -> None:
    tokenizer = Tokenizer(hf_with(SHOW_ALL), frozenset())
    with pytest.raises(InvalidRequestError, match="not valid Unicode") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "a\ud83d"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["conversation", "chat_template", "tokenize", "max_length"])
def test_arguments_of_transformers_are_no_variables(name: str, renderer: Renderer) -> None:
    with pytest.raises(InvalidRequestError, match="not a variable") as caught:
        rendered(SHOW_ALL, HELLO, renderer, True, **{name: "x"})
    assert caught.value.param == f"chat_template_kwargs.{name}"


def test_a_value_that_json_does_not_have_is_refused(renderer: Renderer) -> None:
    for value in (object(), {1, 2}):
        with pytest.raises(InvalidRequestError, match="not JSON serializable"):
            rendered(SHOW_ALL, HELLO, renderer, x=value)
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="recursion"):
        rendered(SHOW_ALL, HELLO, renderer, x=deep)


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_run_in_the_sandbox(escape: str, renderer: Renderer) -> None:
    with pytest.raises(InvalidRequestError, match=r"unsafe|no attribute|not safely"):
        rendered(escape + SHOW_ALL, HELLO, renderer)


# ---- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "limit"),
    [
        pytest.param("{% if x %}" + FOREVER + "{% endif %}", r"0\.3 s of processor", id="loop"),
        pytest.param("{{ 7 ** (x * 10 ** 9) }}", r"0\.3 s of processor", id="one-operation"),
        pytest.param(
            "{% set n = namespace(t='a' * x * 1000) %}"
            "{% for i in range(40 * x) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "64 MiB",
            id="memory",
        ),
        pytest.param("{{ 'é' * (x * 100001) }}", "100000 characters", id="length"),
        pytest.param("{{ '%0*d' % (x * 10 ** 9, 1) }}", "64 MiB", id="format"),
    ],
)
def test_a_template_that_takes_too_much_is_stopped_and_the_limit_named(
    program: str, limit: str, renderer: Renderer
) -> None:
    template = ChatTemplate(hf_with(SHOW_ALL + program), renderer)
    template.prepare()

    with pytest.raises(InvalidRequestError, match=limit) as caught:
        template.render(HELLO, add_generation_prompt=True, variables={"x": 1})
    assert caught.value.param == "messages"
    assert caught.value.status == 400

    variables = {"x": 0}
    assert template.render(HELLO, add_generation_prompt=True, variables=variables)[:5] == "hello"


def test_long_messages_pass_where_the_limits_are_as_served() -> None:
    renderer = Renderer()
    text = "😀é" * 500_000
    assert rendered(SHOW_ALL, [{"role": "user", "content": text}], renderer) == text
    renderer.close()


def test_what_a_template_raises_is_told_but_not_at_any_length(renderer: Renderer) -> None:
    template = "{{ raise_exception('No ' + messages[0].role * 1000) }}"
    with pytest.raises(
        InvalidRequestError, match="does not take these messages: No user"
    ) as caught:
        rendered(template, HELLO, renderer)
    assert len(caught.value.message) < 1000


def test_templates_render_on_several_threads_at_once(renderer: Renderer) -> None:
    template = ChatTemplate(hf_with(TEMPLATES["chatml"]), renderer)

    def text_of(i: int) -> str:
        messages = [{"role": "user", "content": f"number {i}"}]
        return template.render(messages, add_generation_prompt=False, variables={})

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(text_of, range(60)))
    assert texts == [f"<|im_start|>user\nnumber {i}<|im_end|>\n" for i in range(60)]


# ---- texts and lists of parts -----------------------------------------------------------------


def parts_of(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def conversation(user: object) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]


@pytest.mark.parametrize("name", LISTS_ONLY)
def test_a_template_that_reads_parts_gets_texts_as_parts(name: str, renderer: Renderer) -> None:
    for user in ("hello", parts_of("hello")):
        text = rendered(LISTS_ONLY[name], conversation(user), renderer)
        assert [word in text for word in ("rules", "hello", "yes", "more")] == [True] * 4
        assert "type" not in text


def test_parts_stay_apart_where_the_template_reads_them(renderer: Renderer) -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}({{ p.text }}, {{ p.tag }})"
        "{% endfor %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a", "tag": 1}, {"type": "text", "text": "b", "tag": 2}]
    messages = [{"role": "user", "content": parts}]
    assert rendered(template, messages, renderer) == "(a, 1)(b, 2)"


@pytest.mark.parametrize(
    "template",
    [
        *(TEMPLATES[name] for name in ("chatml", "llama3", "qwen", "generation", "macros")),
        ONLY_TEXTS,
        "{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}",
        "{% for m in messages %}{% for letter in m.content %}{{ letter }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:999] }}{% endfor %}",
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
        ),
    ],
)
def test_a_template_that_reads_texts_gets_parts_joined(template: str, renderer: Renderer) -> None:
    whole = rendered(template, conversation("hello\nyou"), renderer)
    assert rendered(template, conversation(parts_of("hello", "you")), renderer) == whole
    assert whole == hf_with(template).apply_chat_template(
        conversation("hello\nyou"), tokenize=False, add_generation_prompt=True
    )


def test_each_role_gets_the_form_that_the_template_reads_for_it(renderer: Renderer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}"
        "{% endfor %}{% else %}{{ m.content + '' }}{% endif %};{% endfor %}"
    )
    expected = "rules;hello;yes;more;"
    assert rendered(template, conversation("hello"), renderer) == expected
    assert rendered(template, conversation(parts_of("hel", "lo")), renderer) == expected


def test_a_template_that_insists_on_a_system_message_is_understood(renderer: Renderer) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('rules first') }}{% endif %}"
        + LISTS_ONLY["loop"]
    )
    assert "hello" in rendered(template, conversation("hello"), renderer)


def test_named_templates_are_understood_one_by_one(renderer: Renderer) -> None:
    tool_use = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}" + LISTS_ONLY["loop"]
    named = {"default": ONLY_TEXTS, "tool_use": tool_use}
    assert "[user]hello" in rendered(named, HELLO, renderer)
    assert "user: hello" in rendered(named, HELLO, renderer, tools=TOOLS)


@pytest.mark.parametrize("template", ["Hello!", "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_template_that_loses_the_users_text_is_said_once(
    template: str, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chat_template = ChatTemplate(hf_with(template), renderer)
        for _ in range(3):
            chat_template.render(HELLO, add_generation_prompt=True, variables={})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not show what the user says" in caplog.text


def test_a_template_that_loops_when_it_is_tried_is_said_and_every_chat_refused(
    renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    template = ChatTemplate(hf_with(SHOW_ALL + FOREVER), renderer)
    with caplog.at_level(logging.WARNING):
        template.prepare()
    assert "was stopped when it was tried" in caplog.text
    with pytest.raises(InvalidRequestError, match="was stopped at these messages"):
        template.render(HELLO, add_generation_prompt=True, variables={})


# ---- at start-up ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights: what is refused here is refused before they are read."""
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("model"), exits=None)
    (path / "model.safetensors").unlink()
    (path / "chat_template.jinja").unlink()
    return path


def declare(folder: Path, chat_template: object) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": chat_template}), encoding="utf-8")


BROKEN = "a\nb{% if %}"
NAMED = [{"name": "default", "template": "x"}, {"name": "rag", "template": BROKEN}]


@pytest.mark.parametrize(
    ("chat_template", "told"),
    [
        pytest.param(BROKEN, "'default' does not compile: .*line 2", id="syntax"),
        pytest.param(NAMED, "'rag' does not compile", id="one-of-several"),
        pytest.param("{{ x | beautiful }}", "No filter named 'beautiful'", id="filter"),
        pytest.param("{% for m in messages %}", "does not compile", id="open-block"),
        pytest.param("{% if x %}" * 200 + "{% endif %}" * 200, "does not compile", id="deep"),
    ],
)
def test_a_bad_template_is_told_in_one_line_before_the_weights_are_read(
    chat_template: object, told: str, folder: Path
) -> None:
    declare(folder, chat_template)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_checkpoint(str(folder), device="cpu")
    assert "\n" not in caught.value.message
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("chat_template", "told"),
    [
        (5, "'default' is of type int"),
        (True, "'default' is of type bool"),
        ({"default": "x", "rag": None}, "'rag' is of type NoneType"),
        ({"default": ["x"]}, "'default' is of type list"),
    ],
)
def test_a_template_that_is_no_text_is_refused(
    chat_template: object, told: str, renderer: Renderer
) -> None:
    with pytest.raises(CheckpointError, match=told):
        ChatTemplate(hf_with(chat_template), renderer).prepare()


@pytest.mark.parametrize("chat_template", [None, "", []])
def test_a_checkpoint_may_have_no_template(chat_template: object, folder: Path) -> None:
    declare(folder, chat_template)
    with pytest.raises(CheckpointError, match="safetensors"):  # it comes as far as the weights
        load_checkpoint(str(folder), device="cpu")


def test_a_template_file_is_compiled_too(folder: Path) -> None:
    declare(folder, None)
    path = folder / "chat_template.jinja"
    path.write_text(BROKEN)
    try:
        with pytest.raises(CheckpointError, match="'default' does not compile"):
            load_checkpoint(str(folder), device="cpu")
    finally:
        path.unlink()


def test_a_loaded_checkpoint_brings_its_template_ready_to_use(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, exits=None)
    (path / "chat_template.jinja").write_text(LISTS_ONLY["loop"])
    checkpoint = load_checkpoint(str(path), device="cpu")
    tokenizer = Tokenizer(checkpoint.tokenizer, frozenset(), checkpoint.chat_template)
    assert "hello" in tokenizer.decode(tokenizer.apply_chat_template(HELLO))
