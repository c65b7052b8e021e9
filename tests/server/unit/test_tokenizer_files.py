"""A tokenizer that does not load or work ends the start in one line that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sortserve.checkpoint.hf import load_tokenizer
from sortserve.core.errors import CheckpointError
from support.tiny_models import tiny_tokenizer

Break = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def refusal(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.message
    assert caught.value.message.isprintable()
    assert capfd.readouterr() == ("", ""), "a library wrote past Python"
    return caught.value.message


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    def damage(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text()) if path.is_file() else {}
        change(document)
        path.write_text(json.dumps(document))

    return damage


def config(**fields: Any) -> Break:
    return edit("tokenizer_config.json", lambda document: document.update(fields))


def backend(**fields: Any) -> Break:
    return edit("tokenizer.json", lambda document: document.update(fields))


def special(**fields: Any) -> Break:
    return edit("special_tokens_map.json", lambda document: document.update(fields))


def added(**tokens: Any) -> Break:
    return edit("added_tokens.json", lambda document: document.update(tokens))


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PANICS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}

BROKEN: dict[str, tuple[Break, str]] = {
    "class-number": (config(tokenizer_class=5), "tokenizer_config.json: tokenizer_class=5"),
    "class-list": (config(tokenizer_class=["a"]), "tokenizer_config.json: tokenizer_class=['a']"),
    "class-slow": (config(tokenizer_class="ByT5Tokenizer"), "slow tokenizer (ByT5Tokenizer)"),
    "class-of-another": (config(tokenizer_class="BertTokenizer"), "tokenizer does not load"),
    "eos-number": (config(eos_token=5), "tokenizer_config.json: eos_token=5"),
    "eos-empty-object": (config(eos_token={}), "eos_token"),
    "length-text": (config(model_max_length="long"), "tokenizer_config.json: model_max_length"),
    "added-list": (config(added_tokens_decoder=[1]), "added_tokens_decoder=[1]"),
    "added-no-id": (config(added_tokens_decoder={"a": {}}), "added_tokens_decoder.a"),
    "added-no-object": (config(added_tokens_decoder={"1": 3}), "added_tokens_decoder.1=3"),
    "extra-number": (config(extra_special_tokens=7), "extra_special_tokens=7"),
    "template-number": (config(chat_template=7), "chat_template=7"),
    "template-unnamed": (config(chat_template=[{"template": "x"}]), "chat_template.0"),
    "side": (config(padding_side="up"), "up"),
    "config-no-json": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        "tokenizer_config.json is not valid JSON",
    ),
    "config-list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json is not a JSON object",
    ),
    "special-number": (special(eos_token=5), "special_tokens_map.json: eos_token=5"),
    "added-tokens-text": (added(x="y"), "added_tokens.json: x='y'"),
    "added-tokens-negative": (added(x=-1), "added_tokens.json: x=-1"),
    "backend-empty": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "backend-truncated": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", "mod'),
        "tokenizer.json",
    ),
    "backend-binary": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\0"), "tokenizer.json"),
    "backend-regex": (
        backend(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a"}}),
        "unmatched parenthesis",
    ),
    "backend-unknown-token": (
        backend(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}),
        "Missing [UNK]",
    ),
    "backend-panics": (backend(post_processor=PANICS), "no entry found for key"),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_refused_in_one_line(
    damage: Break, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    capfd.readouterr()

    assert words in refusal(folder, capfd)


@pytest.mark.parametrize(
    "damage",
    [
        config(tokenizer_class="NoSuchTokenizer"),
        config(tokenizer_class=None),
        config(tokenizer_class="LlamaTokenizer"),
        config(auto_map={"AutoTokenizer": ["own.Tokenizer", None]}),
        backend(
            truncation={
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 0,
                "direction": "Right",
            }
        ),
    ],
)
def test_what_does_not_matter_does_not_stop_it(damage: Break, folder: Path) -> None:
    damage(folder)

    ids = load_tokenizer(folder).backend_tokenizer.encode("the ether").ids

    assert ids == tiny_tokenizer().encode("the ether")


def test_no_tokenizer_at_all_names_the_files_that_were_looked_for(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").unlink()

    assert "no tokenizer: neither tokenizer.json nor" in refusal(folder, capfd)


@pytest.mark.parametrize(
    "names", [["tokenizer.model"], ["vocab.json"], ["vocab.json", "merges.txt"]]
)
@pytest.mark.parametrize("has_config", [True, False])
def test_the_files_of_a_slow_tokenizer_alone_are_told_to_be_converted(
    names: list[str], has_config: bool, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").unlink()
    if not has_config:
        (folder / "tokenizer_config.json").unlink()
    for name in names:
        (folder / name).write_text('{"a": 0}')

    message = refusal(folder, capfd)

    assert f"tokenizer.json is missing, and {', '.join(names)} alone cannot be read" in message
    assert "pip install sentencepiece" in message
    assert f"from_pretrained('{folder}').save_pretrained('{folder}')" in message
    assert "tiktoken" not in message
