"""From a validated request to running sequences: reserve, tokenise, submit."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from sortserve.api.generation import Generation
from sortserve.api.interfaces import HttpMetrics, Tokenizer
from sortserve.api.jobs import Job
from sortserve.api.problems import renamed
from sortserve.api.prompts import encode_all
from sortserve.api.settings import ApiSettings
from sortserve.engine.queue_limits import Reservation
from sortserve.engine.worker import EngineWorker, RequestStream
from sortserve.errors import InvalidRequestError, SortserveError
from sortserve.logs import fields
from sortserve.outputs import GenerationRequest

__all__ = ["Service"]

EXPECTED_TOKENS = 256
"""Output tokens that a latency budget is planned for where the client sets no limit: the context's
end, thousands of tokens away, would push every such request to the shallowest exit."""

logger = logging.getLogger("sortserve.requests")


@dataclass(frozen=True)
class Service:
    """What all routes share; routes are thin."""

    worker: EngineWorker
    tokenizer: Tokenizer
    settings: ApiSettings
    metrics: HttpMetrics | None = None
    _serials: Iterator[int] = field(default_factory=itertools.count)

    async def start(self, job: Job) -> Generation:
        """Take places in the queue, tokenise, submit every sequence.

        Raises:
            SortserveError: the request was refused; nothing of it runs.
        """
        num_sequences = job.n * len(job.prompts)
        self._check_num_sequences(job)
        estimate = job.n * sum(prompt.num_tokens_estimate for prompt in job.prompts)
        with self.worker.reserve(num_sequences, estimate) as reservation:
            token_ids = await encode_all(job.prompts, self.tokenizer)
            streams = self._submit(job, token_ids, reservation)
        log_prompts = self.settings.log_prompts
        return Generation(
            streams,
            num_prompt_tokens=[len(ids) for ids in token_ids],
            field_names=job.field_names,
            keep=log_prompts or not job.stream,
            on_end=partial(self._log_texts, job, token_ids) if log_prompts else None,
        )

    def _log_texts(self, job: Job, prompts: list[list[int]], generation: Generation) -> None:
        """Write what was asked and answered, for operators who switched it on."""
        for i, choice in enumerate(generation.choices):
            prompt = self.tokenizer.decode(prompts[i // job.n], skip_special_tokens=False)
            texts = fields(id=job.request_id, choice=i, prompt=prompt, answer=choice.text)
            logger.info("request texts", extra=texts)

    def _check_num_sequences(self, job: Job) -> None:
        max_n, num_prompts = self.settings.max_n, len(job.prompts)
        if job.n * num_prompts > max_n:
            param = "prompt" if num_prompts > max_n else "n"
            raise InvalidRequestError(
                f"n={job.n} for {num_prompts} prompts makes {job.n * num_prompts} sequences; "
                f"one request may have {max_n}.",
                param=param,
            )

    def _submit(
        self, job: Job, prompts: list[list[int]], reservation: Reservation
    ) -> list[RequestStream]:
        streams: list[RequestStream] = []
        names = dict(job.field_names)
        try:
            for i, token_ids in enumerate(prompts):
                if len(prompts) > 1:
                    names["prompt"] = f"prompt.{i}"
                request = self._request(job, tuple(token_ids))
                for sample_index in range(job.n):
                    # The serial keeps ids unique where clients repeat theirs.
                    name = f"{job.request_id}.{next(self._serials)}"
                    sample = replace(request, request_id=name, sample_index=sample_index)
                    streams.append(self.worker.submit(sample, reservation))
        except BaseException as error:
            for stream in streams:
                stream.abort()
            if isinstance(error, SortserveError):
                raise renamed(error, names) from error.__cause__
            raise
        return streams

    def _request(self, job: Job, token_ids: tuple[int, ...]) -> GenerationRequest:
        sampling, expected_tokens = job.sampling, None
        if job.limit_is_default:
            # An over-long prompt is the engine's to refuse: it says so in better words.
            room = max(1, self.worker.max_model_len - len(token_ids))
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
            expected_tokens = min(sampling.max_tokens, EXPECTED_TOKENS)
        return GenerationRequest(
            request_id=job.request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            budget=job.budget,
            arrival_s=job.arrival_s,
            expected_tokens=expected_tokens,
            cache_salt=job.cache_salt,
        )
