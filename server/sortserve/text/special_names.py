"""A tokenizer whose special tokens no text can name."""

from __future__ import annotations

import json
import secrets

__all__ = ["with_hidden_special_tokens"]


def with_hidden_special_tokens(tokenizer_json: str) -> str:
    """The same tokenizer, with names of special tokens that nobody can write.

    A text such as ``<|im_end|>`` is then made of ordinary tokens, and the ids are what they were.

    Args:
        tokenizer_json: a Hugging Face tokenizer, as JSON.
    """
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    nonce = secrets.token_hex(16)
    hidden: dict[str, str] = {}
    for token in tokenizer.get("added_tokens") or ():
        if token["special"]:
            hidden[token["content"]] = f"\U0010fffd{nonce}.{token['id']}\U0010fffc"
            token["content"] = hidden[token["content"]]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(name, name): token_id for name, token_id in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pieces with their scores
        model["vocab"] = [[hidden.get(name, name), score] for name, score in vocab]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    return json.dumps(tokenizer)
