"""Two tiny tokenizers of the two kinds that real models have, built in milliseconds.

``make_byte_tokenizer``: byte-level BPE, as in GPT-2, Llama 3, Qwen and SmolLM2. Any byte string
can be written with it, so a token may end in the middle of a character.
``make_metaspace_tokenizer``: sentencepiece style with byte fall-back, as in Llama 2 and Mistral.
A space is part of the token after it and the decoder strips the first one.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = [
    "CHATML_TEMPLATE",
    "SPECIAL_TOKENS",
    "make_byte_tokenizer",
    "make_metaspace_tokenizer",
]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = ("the", " the", " a", "ing", " hello", " world", "é", "你", "你好", "ol")
_HALF_CHARACTERS = (b"\xf0\x9f", b"\xf0\x9f\x98", b"\xe4\xbd", b" \xe4")


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 bytes, a few merges and ``SPECIAL_TOKENS``, with a ChatML template.

    The special tokens come first (ids 0 to 2, ``<|im_end|>`` is the end of a turn), so the
    vocabulary is dense. Some merges are halves of characters, as in real vocabularies.
    """
    alphabet = _byte_alphabet()
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte in range(256):
        vocab[alphabet[byte]] = len(vocab)
    merges: list[tuple[str, str]] = []
    for text in [*(word.encode() for word in _WORDS), *_HALF_CHARACTERS]:
        symbols = [alphabet[byte] for byte in text]
        for end in range(1, len(symbols)):
            left, right = "".join(symbols[:end]), symbols[end]
            if left + right not in vocab:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A sentencepiece-style BPE with byte fall-back and ``<s>``, ``</s>``; no chat template."""
    vocab = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>"))}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for character in "▁abcdefghijklmnopqrstuvwxyz.,!?é":
        vocab[character] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in ("▁the", "▁hello", "▁world", "ing"):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocab:
                merges.append((word[:end], word[end]))
                vocab[word[: end + 1]] = len(vocab)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), _strip_one_space()]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _strip_one_space() -> decoders.Strip:
    return decoders.Strip(content=" ", left=1, right=0)


def _byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable bytes for themselves,
    the others as the next characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, shifted = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + shifted))
            shifted += 1
    return characters
