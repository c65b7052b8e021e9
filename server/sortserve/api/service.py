"""From a validated request to running sequences: reserve, tokenise, submit."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from sortserve.admission.queue_limits import Reservation
from sortserve.api.bodies.limits import MAX_LOGPROBS_PER_REPLY, BodyLimits
from sortserve.api.bodies.prompts import encode_all
from sortserve.api.generation import Generation
from sortserve.api.interfaces import EngineClient, HttpMetrics, Tokenizer
from sortserve.api.jobs import Job
from sortserve.api.key_depth import refuse_deeper, within
from sortserve.api.problems import renamed
from sortserve.api.settings import ApiSettings
from sortserve.api.text_threads import TextThreads, compiler_threads
from sortserve.core.errors import InvalidRequestError, PermissionDeniedError, SortserveError
from sortserve.core.grammar import Grammar, length_class_of
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import EXPECTED_TOKENS, Request
from sortserve.engine.stream import RequestStream
from sortserve.telemetry.logs import fields
from sortserve.telemetry.totals import Totals

__all__ = ["Service"]

R = TypeVar("R")

logger = logging.getLogger("sortserve.requests")


@dataclass(frozen=True)
class Service:
    """What all routes share; routes are thin."""

    worker: EngineClient
    tokenizer: Tokenizer
    settings: ApiSettings
    metrics: HttpMetrics | None = None
    totals: Totals = field(default_factory=Totals)
    """What the engine has done so far."""
    threads: TextThreads = field(default_factory=TextThreads)
    compilers: TextThreads = field(default_factory=compiler_threads)
    created_s: int = field(default_factory=lambda: int(time.time()))
    """When the service came up, in seconds of the epoch."""
    _serials: Iterator[int] = field(default_factory=itertools.count)

    @cached_property
    def limits(self) -> BodyLimits:
        """The most that a body may hold."""
        return BodyLimits(
            max_model_len=self.worker.max_model_len,
            max_token_chars=self.settings.max_token_chars,
            max_sequences=self.settings.max_n,
        )

    async def work_on_body(self, request: HttpRequest, work: Callable[[], R]) -> R:
        """What ``work`` returns or raises; it runs on a thread where the body was read on one."""
        return await self.threads.run(work) if request.state.is_large else work()

    async def start(self, job: Job) -> Generation:
        """Take places in the queue, tokenise, submit every sequence.

        Raises:
            SortserveError: the request was refused; nothing of it runs.
        """
        num_sequences = job.n * len(job.prompts)
        self._check_num_sequences(job)
        estimate = job.n * sum(prompt.num_tokens_estimate for prompt in job.prompts)
        self._check_num_logprobs(job)
        job = self._within_key(job)
        if job.key_use is not None:
            job.key_use.charge(estimate + self._expected_output(job))
        with self.worker.reserve(num_sequences, estimate) as reservation:
            token_ids = await encode_all(
                job.prompts, self.tokenizer, self.threads, max_tokens=self.worker.max_model_len
            )
            asked = _asked_of(job, token_ids)
            grammar = await self._compile(job)
            streams = await self._submit(job, token_ids, reservation, grammar, asked)
        log_prompts = self.settings.log_prompts
        generation = Generation(
            streams,
            num_prompt_tokens=[len(ids) for ids in token_ids],
            deepest_layer=self.worker.exits.allowed(job.budget)[-1],
            names_exit=not job.budget.has_latency and job.budget.schedule is None,
            field_names=job.field_names,
            keep=log_prompts or not job.stream,
            on_end=partial(self._log_texts, job, token_ids) if log_prompts else None,
            prompt_logprobs=asked,
            drops_answer=job.drops_answer,
        )
        if job.key_use is not None:
            job.key_use.watch(partial(_tokens_of, generation))
        return generation

    def _within_key(self, job: Job) -> Job:
        """The job at the depth that its API key may have.

        Raises:
            PermissionDeniedError: it names an exit that is deeper.
        """
        use, exits = job.key_use, self.worker.exits
        most = None if use is None else use.policy.max_exit_layer
        if use is None or most is None:
            return job
        try:
            refuse_deeper(job.named_budget, most, exits)
        except PermissionDeniedError as error:
            use.refuse_exit()
            raise renamed(error, job.field_names) from None
        return replace(job, budget=within(job.budget, most, exits))

    def _expected_output(self, job: Job) -> int:
        """The output tokens that a key is charged with until it is known how many they are."""
        most = min(job.sampling.max_tokens, self.worker.max_model_len)
        each = min(most, EXPECTED_TOKENS) if job.limit_is_default else most
        return job.n * len(job.prompts) * each

    async def _compile(self, job: Job) -> Grammar | None:
        """What its answers must match; None: anything."""
        format_, grammars = job.sampling.output_format, self.tokenizer.grammars
        if format_ is None:
            return None
        kept = grammars.kept(format_)
        if kept is not None:
            return kept
        return await self.compilers.run(partial(grammars.compile, format_))

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

    def _check_num_logprobs(self, job: Job) -> None:
        """A reply that is not streamed is held in memory until its last token."""
        if job.stream or job.sampling.logprobs is None:
            return
        max_tokens = min(job.sampling.max_tokens, self.worker.max_model_len)
        most = job.n * len(job.prompts) * max_tokens * (job.sampling.logprobs + 1)
        if most > MAX_LOGPROBS_PER_REPLY:
            raise InvalidRequestError(
                f"logprobs={job.sampling.logprobs} for {job.n * len(job.prompts)} answers of up to "
                f"{max_tokens} tokens may be {most} log probabilities; a reply may hold "
                f"{MAX_LOGPROBS_PER_REPLY}. Lower max_tokens, logprobs or n, or stream.",
                param=job.field_names.get("logprobs", "logprobs"),
            )

    async def _submit(
        self,
        job: Job,
        prompts: list[list[int]],
        reservation: Reservation,
        grammar: Grammar | None,
        asked: Sequence[PromptLogprobs],
    ) -> list[RequestStream]:
        try:
            requests = [self._request(job, tuple(token_ids), grammar) for token_ids in prompts]
            if asked:  # the samples of a prompt share what is said of it
                pairs = zip(requests, asked, strict=True)
                requests = [replace(request, prompt_logprobs=said) for request, said in pairs]
            samples = [self._sample(request, i) for request in requests for i in range(job.n)]
            return await self.worker.submit_all(
                samples, reservation, is_streamed=job.stream, num_samples=job.n
            )
        except SortserveError as error:
            raise renamed(error, job.field_names) from error.__cause__

    def _sample(self, request: Request, index: int) -> Request:
        # The serial keeps ids unique where clients repeat theirs.
        name = f"{request.request_id}.{next(self._serials)}"
        return replace(request, request_id=name, sample_index=index)

    def _request(self, job: Job, token_ids: tuple[int, ...], grammar: Grammar | None) -> Request:
        sampling, expected_tokens = job.sampling, None
        if job.limit_is_default:
            # An over-long prompt is the engine's to refuse: it says so in better words.
            room = max(1, self.worker.max_model_len - len(token_ids))
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
            expected_tokens = min(sampling.max_tokens, EXPECTED_TOKENS)
        return Request(
            request_id=job.request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            budget=job.budget,
            weight=job.weight,
            arrival_s=job.arrival_s,
            expected_tokens=expected_tokens,
            length_class=length_class_of(job.length_class, grammar),
            grammar=grammar,
            cache_salt=job.cache_salt,
            trace=job.trace,
            is_one_of_several=job.n * len(job.prompts) > 1,
        )


def _tokens_of(generation: Generation) -> tuple[int, int]:
    """Prompt and output tokens so far, as the reply's ``usage`` counts them."""
    usage = generation.usage()
    return usage["prompt_tokens"], usage["completion_tokens"]


def _asked_of(job: Job, prompts: Sequence[Sequence[int]]) -> list[PromptLogprobs]:
    """What the model is to say of the prompts; nothing where nobody asks.

    Raises:
        InvalidRequestError: it would be more than a reply may hold.
    """
    if job.prompt_logprobs is None or not all(prompts):  # an empty one is refused with its name
        return []
    most = job.n * sum(map(len, prompts)) * (job.prompt_logprobs + 1)
    if most > MAX_LOGPROBS_PER_REPLY:
        raise InvalidRequestError(
            f"echo=true with logprobs={job.prompt_logprobs} makes {most} log probabilities of "
            f"prompts; a reply may hold {MAX_LOGPROBS_PER_REPLY}. Lower logprobs or n, or send "
            "fewer prompts.",
            param="echo",
        )
    return [PromptLogprobs(tuple(token_ids), job.prompt_logprobs) for token_ids in prompts]
