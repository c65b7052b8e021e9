"""What a program must know of a tokenizer that it does not have, beside ``/tokenize``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

__all__ = ["tokenizer_info"]


def tokenizer_info(hf_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Its special tokens and its chat template, by the names of ``tokenizer_config.json``.

    Of several templates it is the default one; what there is not is None.
    """
    template = hf_tokenizer.chat_template
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {
        "tokenizer_class": type(hf_tokenizer).__name__,
        **{name: getattr(hf_tokenizer, name) for name in names},
        "additional_special_tokens": _others(hf_tokenizer, names),
        "chat_template": template.get("default") if isinstance(template, dict) else template,
    }


def _others(hf_tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...]) -> list[str]:
    named = {getattr(hf_tokenizer, name) for name in names}
    return [token for token in hf_tokenizer.all_special_tokens if token not in named]
