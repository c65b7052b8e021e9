"""What a checkpoint says about ending and sampling is usable at start-up, or refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.generation_config import generation_settings
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import CheckpointError
from support.tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("plain") / "model", exits=None)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(folder: Path) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype="float32", device="cpu")


def read(folder: Path, **fields: Any) -> tuple[frozenset[int], dict[str, float]]:
    """What a ``generation_config.json`` with ``fields`` says of a model with 288 tokens."""
    (folder / "generation_config.json").write_text(json.dumps(fields))
    config = SimpleNamespace(vocab_size=288, eos_token_id=None)
    return generation_settings(folder, config, SimpleNamespace(eos_token_id=2))


USABLE: list[tuple[str, Any, float]] = [
    ("top_k", 50.0, 50),
    ("top_k", 0, 0),
    ("top_k", -1.0, -1),
    ("temperature", 1, 1.0),
    ("temperature", 0, 0.0),
    ("top_p", 1, 1.0),
    ("min_p", 0, 0.0),
    ("repetition_penalty", 2, 2.0),
]


@pytest.mark.parametrize(("name", "given", "meant"), USABLE)
def test_a_number_of_the_other_type_is_taken_for_what_it_means(
    name: str, given: Any, meant: float, tmp_path: Path
) -> None:
    _, defaults = read(tmp_path, **{name: given})

    assert defaults == {name: meant}
    assert type(defaults[name]) is type(meant)
    assert ApiSettings(served_model_name="m", generation_defaults=defaults)


@pytest.mark.parametrize(
    "value", [True, "50", [50], {}, "", 10**400, -(10**400), 1e999, float("nan")]
)
@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_a_default_that_is_no_number_is_refused_by_file_and_field(
    name: str, value: Any, tmp_path: Path
) -> None:
    if (name, value) == ("top_k", 10**400):
        return  # it keeps every token

    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name}="):
        read(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e6),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 50.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
    ],
)
def test_a_default_out_of_range_is_refused_by_file_and_field(
    name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name}="):
        read(tmp_path, **{name: value})


def test_defaults_are_looked_at_when_the_checkpoint_loads(folder: Path) -> None:
    edit_json(folder / "generation_config.json", top_k=50.0, temperature=1)
    assert load(folder).generation_defaults == {"temperature": 1.0, "top_k": 50}

    edit_json(folder / "generation_config.json", top_k="50")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_k='50'"):
        load(folder)


def test_a_default_that_is_null_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, temperature=None, top_k=None)[1] == {}


NO_IDS: list[Any] = [
    *("2", 2.5, True, {}, [], [2, None], [[2]], [2, "0"], [True], -1, 288, 10**30, [2, 288]),
    *(float("nan"), float("inf")),
]


@pytest.mark.parametrize("value", NO_IDS, ids=repr)
def test_what_is_no_id_of_the_vocabulary_cannot_end_a_text(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id="):
        read(tmp_path, eos_token_id=value)


@pytest.mark.parametrize("value", NO_IDS, ids=repr)
def test_nor_if_config_json_says_it(value: Any, folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=value)

    with pytest.raises(CheckpointError, match=r"config\.json.*eos_token_id"):
        load(folder)


@pytest.mark.parametrize(
    ("value", "ids"), [(5.0, {2, 5}), ([5, 5.0, 7], {2, 5, 7}), (0, {0, 2}), (287, {2, 287})]
)
def test_ids_of_the_vocabulary_end_a_text(value: Any, ids: set[int], tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=value)[0] == ids


def test_an_end_that_only_the_tokenizer_knows_of_is_left_out(tmp_path: Path) -> None:
    """A tokenizer may be larger than its model, which then never gives that token."""
    folder = make_tiny_checkpoint(tmp_path, exits=None, vocab_size=260)
    edit_json(folder / "generation_config.json", eos_token_id=[0])
    edit_json(folder / "tokenizer_config.json", eos_token="<far>")

    checkpoint = load(folder)

    assert checkpoint.tokenizer.eos_token_id == 266
    assert checkpoint.eos_token_ids == {0}
