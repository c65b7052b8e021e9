"""The tokenizer's files in a checkpoint folder: looked at before they are loaded, tried after."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from sortserve.checkpoint.files import check_folder, read_optional_json
from sortserve.core.errors import CheckpointError

__all__ = [
    "FAST_TOKENIZER",
    "TOKENIZER_CONFIG",
    "check_tokenizer_files",
    "held_stderr",
    "how_to_convert",
    "try_out_tokenizer",
]

FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SLOW = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_Types = Mapping[str, tuple[type, ...]]
_SPECIAL_TYPES: _Types = {
    **dict.fromkeys(_SPECIAL_TOKENS, (str, dict, NoneType)),
    "additional_special_tokens": (list, NoneType),
    "extra_special_tokens": (list, dict, NoneType),
}
_CONFIG_TYPES: _Types = {
    **_SPECIAL_TYPES,
    "tokenizer_class": (str, NoneType),
    "model_max_length": (int, float, NoneType),
    "added_tokens_decoder": (dict, NoneType),
    "auto_map": (dict, list, NoneType),
    "chat_template": (str, list, NoneType),
    "model_input_names": (list, NoneType),
}
_JSON_NAMES = {
    str: "a string",
    dict: "an object",
    list: "a list",
    int: "a number",
    float: "a number",
    NoneType: "null",
}


def check_tokenizer_files(folder: Path) -> None:
    """Refuse what would trip or hang transformers' loading of the tokenizer, file and field named.

    Raises:
        CheckpointError: there is no tokenizer, or a file is no regular file, no JSON object, or
            has a field of another type.
    """
    check_folder(folder)
    _check_documents(folder)
    if not (folder / FAST_TOKENIZER).is_file() and not _slow_files(folder):
        raise CheckpointError(
            f"{folder}: no tokenizer: neither {FAST_TOKENIZER} nor one of {', '.join(_SLOW)} is "
            "there."
        )


def _slow_files(folder: Path) -> list[str]:
    return [name for name in _SLOW if (folder / name).is_file()]


def how_to_convert(folder: Path) -> str:
    """What to do where only the files of a slow tokenizer are there, and do not load."""
    name = repr(str(folder))
    return (
        f"{folder}: {FAST_TOKENIZER} is missing, and {', '.join(_slow_files(folder))} alone cannot "
        "be read here. Convert once: pip install sentencepiece protobuf && python -c "
        f'"from transformers import AutoTokenizer as T; '
        f'T.from_pretrained({name}).save_pretrained({name})"'
    )


def try_out_tokenizer(tokenizer: Any) -> None:
    """Encode and decode a letter: some mistakes in ``tokenizer.json`` only show then."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if not backend.get_vocab(with_added_tokens=True):
        raise ValueError("the vocabulary is empty")
    for text in ("", "a", "The end."):
        ids = backend.encode(text, add_special_tokens=True).ids
        backend.decode(ids, skip_special_tokens=False)


def _check_documents(folder: Path) -> None:
    """Types of what transformers reads; its own messages name neither file nor field."""
    _check_types(folder / TOKENIZER_CONFIG, _CONFIG_TYPES)
    _check_types(folder / "special_tokens_map.json", _SPECIAL_TYPES)
    path = folder / TOKENIZER_CONFIG
    config = read_optional_json(path)
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        if not token_id.isdecimal() or not isinstance(token, dict | str):
            raise CheckpointError(
                f"{path}: added_tokens_decoder.{token_id}={token!r} is not allowed: "
                "ids with an object each."
            )
    templates = config.get("chat_template")
    for index, template in enumerate(templates if isinstance(templates, list) else ()):
        parts = template if isinstance(template, dict) else {}
        if not all(isinstance(parts.get(part), str) for part in ("name", "template")):
            raise CheckpointError(
                f"{path}: chat_template.{index}={template!r} is not allowed: an object "
                "with the strings name and template."
            )
    path = folder / "added_tokens.json"
    for token, token_id in read_optional_json(path).items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(f"{path}: {token}={token_id!r} is not allowed: an id.")


def _check_types(path: Path, types: _Types) -> None:
    document = read_optional_json(path)
    for name, allowed in types.items():
        value = document.get(name)
        if not isinstance(value, allowed) or isinstance(value, bool):
            names = " or ".join(dict.fromkeys(_JSON_NAMES[kind] for kind in allowed))
            raise CheckpointError(f"{path}: {name}={value!r} is not allowed: {names}.")


@contextmanager
def held_stderr() -> Iterator[None]:
    """Hold back what is written to the process's standard error; it is dropped on an exception.

    A panic of the tokenizers library writes its stack there, past Python, before it is raised.
    """
    try:
        own = os.dup(2)
    except OSError:  # the process has none
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
        held.seek(0)
        if said := held.read():
            os.write(2, said)
