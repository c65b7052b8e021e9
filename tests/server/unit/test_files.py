"""Files of a checkpoint folder are looked at before they are opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sortserve.checkpoint.files import check_folder, check_regular, read_json
from sortserve.core.errors import CheckpointError


def refusal(call: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(path)
    message = caught.value.message
    assert str(path) in message
    assert message.isprintable()
    return message


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


NOT_REGULAR = {
    "fifo": (make_fifo, "a FIFO, not a regular file"),
    "folder": (Path.mkdir, "a folder, not a regular file"),
    "dangling-link": (make_link_to_nowhere, "its link leads nowhere"),
    "device": (make_link_to_a_device, "a device, not a regular file"),
}


@pytest.mark.parametrize(("make", "words"), NOT_REGULAR.values(), ids=NOT_REGULAR)
def test_what_is_no_regular_file_is_never_opened(
    make: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "sorted.json"
    make(path)

    assert words in refusal(read_json, path)
    assert words in refusal(check_regular, path)
    with pytest.raises(CheckpointError, match=words):
        check_folder(tmp_path)


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")

    check_folder(tmp_path)

    assert read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize("name", ["lock", "vocab", "model.safetensors", "chat_template.jinja"])
def test_a_fifo_under_any_name_spoils_the_folder(name: str, tmp_path: Path) -> None:
    make_fifo(tmp_path / name)

    with pytest.raises(CheckpointError, match="a FIFO"):
        check_folder(tmp_path)


def test_further_templates_are_looked_at_and_other_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    make_fifo(tmp_path / "original" / "params.json")
    check_folder(tmp_path)

    (tmp_path / "additional_chat_templates").mkdir()
    make_fifo(tmp_path / "additional_chat_templates" / "tools.jinja")
    with pytest.raises(CheckpointError, match=r"tools\.jinja is a FIFO"):
        check_folder(tmp_path)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse

    assert "at most 16 MiB" in refusal(read_json, path)
    with pytest.raises(CheckpointError, match="at most 256 MiB"):
        check_folder(tmp_path)


BAD_JSON = {
    "empty": (b"", "not valid JSON"),
    "truncated": (b'{"a": [1, 2', "not valid JSON"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not valid JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "byte-order-mark": (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
    "nested": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "an-integer-of-many-digits": (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
    "list": (b"[1]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
}


@pytest.mark.parametrize(("data", "words"), BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_no_json_object_is_one_line(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)

    assert words in refusal(read_json, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(read_json, tmp_path / "config.json")
    assert "File name too long" in refusal(read_json, tmp_path / ("x" * 300))


def test_the_message_of_a_checkpoint_error_is_one_line_that_a_terminal_can_show() -> None:
    error = CheckpointError("tensor \x1b[31mred\x1b[0m\nis\r\n   missing: " + "x" * 10_000 + " end")

    assert error.message.startswith("tensor \\x1b[31mred\\x1b[0m is missing: xxx")
    assert error.message.endswith("xxx end")
    assert len(error.message) < 1_100
    assert json.dumps(error.body())
