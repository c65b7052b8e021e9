"""Many prompts through our own engine, in this process: no HTTP, one continuous batch.

engine = OfflineEngine(load_checkpoint("./my-checkpoint"))
for answer in engine.generate(prompts, exit_layer=18, sampling=SamplingParams(temperature=0)):
print(answer.text, answer.finish_reason)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sortserve.admission.choose import ExitChoice
from sortserve.checkpoint.load import LoadedCheckpoint
from sortserve.core.request import FinishReason, GenerationRequest, RequestOutput
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.model.decoder import Decoder
from sortserve.text.tokenizer import TextStream, Tokenizer

__all__ = ["Answer", "OfflineEngine"]

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to one prompt."""

    index: int
    """Of the prompt, in the order given."""
    text: str
    token_ids: tuple[int, ...]
    """With the token that ended it, if one did."""
    finish_reason: FinishReason


class OfflineEngine:
    """One engine with room for ``max_num_seqs`` sequences of ``max_model_len`` tokens.

    Args:
        checkpoint: what to run; its weights are shared, not copied, where the backend allows.
        max_model_len: prompt and answer together, in tokens.
        max_num_seqs: rows of the batch.
    """

    def __init__(
        self, checkpoint: LoadedCheckpoint, *, max_model_len: int = 2048, max_num_seqs: int = 64
    ) -> None:
        self.max_model_len = min(max_model_len, checkpoint.max_model_len)
        decoder = Decoder(
            checkpoint.config,
            checkpoint.weights,
            exits=checkpoint.exits.layers,
            max_model_len=self.max_model_len,
        )
        pages_per_seq = -(-self.max_model_len // BLOCK_SIZE) * decoder.num_slabs
        self.tokenizer = Tokenizer(
            checkpoint.tokenizer,
            checkpoint.eos_token_ids,
            checkpoint.chat_template,
            model_vocab_size=checkpoint.config.vocab_size,
        )
        self._engine = Engine(
            ModelRunner(decoder, num_pages=pages_per_seq * max_num_seqs, block_size=BLOCK_SIZE),
            checkpoint.exits,
            eos_token_ids=checkpoint.eos_token_ids,
            make_text=lambda r: TextStream(self.tokenizer, r.sampling, r.prompt_token_ids),
            config=EngineConfig(max_model_len=self.max_model_len, max_num_seqs=max_num_seqs),
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], *, exit_layer: int, sampling: SamplingParams
    ) -> Iterator[Answer]:
        """Answers in the order they finish; a seed is moved by the prompt's index.

        Args:
            prompts: token ids, each short enough that one more token fits the context.
            exit_layer: for all of them.
            sampling: for all of them; ``max_tokens`` is cut to what the context still holds.

        Raises:
            InvalidRequestError: a prompt is empty or too long.
        """
        started_s = time.monotonic()
        tokens: dict[str, list[int]] = {}
        texts: dict[str, list[str]] = {}
        for index, prompt in enumerate(prompts):
            room = self.max_model_len - len(prompt)
            request = GenerationRequest(
                request_id=str(index),
                prompt_token_ids=tuple(prompt),
                sampling=replace(
                    sampling,
                    max_tokens=max(1, min(sampling.max_tokens, room)),
                    seed=None if sampling.seed is None else sampling.seed + index,
                ),
                arrival_s=started_s,
            )
            self._engine.validate(request)
            self._engine.add_request(request, ExitChoice(exit_layer, estimate=None, fits=True))
            tokens[request.request_id], texts[request.request_id] = [], []
        while self._engine.has_work:
            for output in self._engine.step():
                tokens[output.request_id] += [token.token_id for token in output.tokens]
                texts[output.request_id].append(output.text)
                if output.finish_reason is not None:
                    yield _answer(output, tokens, texts)


def _answer(
    last: RequestOutput, tokens: dict[str, list[int]], texts: dict[str, list[str]]
) -> Answer:
    assert last.finish_reason is not None
    if last.error is not None:
        raise last.error
    return Answer(
        index=int(last.request_id),
        text="".join(texts.pop(last.request_id)),
        token_ids=tuple(tokens.pop(last.request_id)),
        finish_reason=last.finish_reason,
    )
