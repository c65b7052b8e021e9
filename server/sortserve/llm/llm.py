"""``LLM``: the face that programs see."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.budget import Budget, ExitTable
from sortserve.core.errors import (
    ConfigError,
    UnavailableError,
)
from sortserve.core.request import RequestOutput
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, assemble, start_threads
from sortserve.engine.tensor_parallel.ranks import other_ranks
from sortserve.llm.asking import (
    Asking,
    Budgets,
    Messages,
    Priorities,
    Prompts,
    Sampling,
    TokenIds,
)
from sortserve.llm.offline import OfflineEngine
from sortserve.llm.results import Result
from sortserve.text.tokenizer import Tokenizer

__all__ = ["LLM"]

Progress = bool | Callable[[Result], object] | None


class LLM:
    """A checkpoint and an engine; any thread and any event loop may use it.

    The defaults are those of ``sortserve serve``, except that step times are only measured on
    request (``calibrate``), and that no queue, however long, makes an answer shallower.

    Args:
        model: as ``sortserve serve`` takes it (a folder, a Hugging Face id, ...), or a checkpoint
            that is loaded already, which stays usable beside the engine.
        exits: exit layers to open in place of the checkpoint's own.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        quantize: make the weights smaller at load: ``none``, ``int8``, ``nf4`` or ``int8-bnb``.
        revision: branch, tag or commit of a Hugging Face id.
        num_threads: CPU threads of PyTorch, in the whole process; None: its own choice, but no more
            than there are cores for.
        calibrate: measure what steps cost before the first request: seconds, unless an earlier
            start has done it. Without it no time is predicted: a budget's times choose no exit.
        options: fields of ``EngineOptions``: ``max_model_len``, ``policy``, ``max_num_seqs``,
            ``max_num_batched_tokens``, ``kv_cache_memory`` (bytes), ``block_size``,
            ``enable_prefix_caching``, ``tensor_parallel_size``, ``seed`` and more.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: an argument is not allowed, or does not fit the checkpoint or the machine.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedCheckpoint = "sorted-smollm2-135m",
        *,
        exits: Sequence[int] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str = "none",
        revision: str | None = None,
        num_threads: int | None = None,
        calibrate: bool = False,
        **options: Any,
    ) -> None:
        with _python_names(), ExitStack() as on_error:
            engine_options = EngineOptions(**{"overload_delay": 0.0, **options})
            num_ranks = engine_options.tensor_parallel_size
            start_threads(num_threads, num_ranks=num_ranks)
            if isinstance(model, LoadedCheckpoint):
                _check_whole(model, num_ranks)
                checkpoint, ranks = model, None
            else:
                source = os.fspath(model)
                loading: dict[str, Any] = {
                    "exits": exits,
                    "dtype": dtype,
                    "device": device,
                    "quantize": quantize,
                    "revision": revision,
                }
                ranks = on_error.enter_context(
                    other_ranks(source, loading, engine_options, num_threads)
                )
                checkpoint = load_checkpoint(source, **loading, tensor_parallel_size=num_ranks)
            parts = assemble(
                checkpoint, engine_options, release_weights=checkpoint is not model, ranks=ranks
            )
            self._engine: OfflineEngine | None = OfflineEngine(parts, calibrate=calibrate)
        self.model_name: str = checkpoint.name
        self.exits: ExitTable = parts.engine.exits
        self.tokenizer: Tokenizer = parts.tokenizer
        self.max_model_len: int = parts.engine.config.max_model_len
        recommended: dict[str, Any] = dict(checkpoint.generation_defaults)
        self.default_sampling = SamplingParams(max_tokens=self.max_model_len, **recommended)
        """What the checkpoint recommends. Its ``max_tokens``, the whole context, stands for as
        many as fit after the prompt."""
        self._ids = count()
        self._finalizer = weakref.finalize(self, self._engine.close)

    # ---- life ----

    def close(self) -> None:
        """End the engine and free its memory; what still runs ends as aborted. Idempotent."""
        self._finalizer()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> OfflineEngine:
        if self._engine is None:
            raise UnavailableError("This LLM is closed.", code="closed")
        return self._engine

    def _asking(self) -> Asking:
        engine = self._running().parts.engine
        return Asking(engine, self.tokenizer, self.default_sampling, self._ids)

    # ---- whole answers ----

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        budget: Budgets = None,
        n: int = 1,
        priority: Priorities = 0,
        progress: Progress = None,
    ) -> list[Result]:
        """Answer prompts in one continuous batch; the results are in the prompts' order.

        Args:
            prompts: a text, token ids, or a list of these.
            sampling: for all prompts, or a list with one for each; None: ``default_sampling``.
            budget: likewise. Times count from this call.
            n: samples of each prompt; a seed is moved by one from sample to sample.
            priority: from -100 to 100, for all prompts or for each; lower is earlier.
            progress: whether to show a bar; None: on a terminal, for more than one prompt. Or a
                function that is given each result when it is there, on another thread.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; the message names
                the prompt (``prompts.3``), and nothing has run.
            BudgetUnattainableError: a budget with ``on_miss=reject`` cannot be kept; the other
                answers are ended.
            EngineError: the engine failed on an answer; the others are ended.
            UnavailableError: this LLM is closed.
        """
        tasks = self._asking().of_prompts(prompts, sampling, budget, n, priority)
        with _progress(progress, len(tasks)) as on_result:
            return self._running().answer(tasks, on_result)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        budget: Budgets = None,
        n: int = 1,
        priority: Priorities = 0,
        progress: Progress = None,
        **template: Any,
    ) -> list[Result]:
        """Answer a conversation, or a list of them, through the checkpoint's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}``, one after another.
            sampling: as in ``generate``.
            budget: as in ``generate``.
            n: as in ``generate``.
            priority: as in ``generate``.
            progress: as in ``generate``.
            template: as in ``chat_prompt``.

        Raises:
            SortserveError: as ``generate``; a conversation is named ``messages.3``.
        """
        tasks = self._asking().of_conversations(messages, sampling, budget, n, priority, template)
        with _progress(progress, len(tasks)) as on_result:
            return self._running().answer(tasks, on_result)

    async def agenerate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        budget: Budgets = None,
        n: int = 1,
        priority: Priorities = 0,
        progress: Progress = None,
    ) -> list[Result]:
        """``generate`` for an event loop; to cancel it ends the answers."""
        tasks = await asyncio.to_thread(
            self._asking().of_prompts, prompts, sampling, budget, n, priority
        )
        with _progress(progress, len(tasks)) as on_result:
            return await self._running().answer_async(tasks, on_result)

    async def achat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        budget: Budgets = None,
        n: int = 1,
        priority: Priorities = 0,
        progress: Progress = None,
        **template: Any,
    ) -> list[Result]:
        """``chat`` for an event loop; to cancel it ends the answers."""
        tasks = await asyncio.to_thread(
            self._asking().of_conversations, messages, sampling, budget, n, priority, template
        )
        with _progress(progress, len(tasks)) as on_result:
            return await self._running().answer_async(tasks, on_result)

    # ---- answers as they come ----

    def stream(
        self,
        prompt: str | TokenIds,
        sampling: SamplingParams | None = None,
        *,
        budget: Budget | None = None,
        priority: int = 0,
    ) -> Iterator[RequestOutput]:
        """One answer, step by step: its texts, put together, are the whole of it.

        The last output has ``finish_reason`` and ``report``. To stop reading ends the answer. A
        conversation streams as ``stream(llm.chat_prompt(messages))``.

        Raises:
            SortserveError: as ``generate``.
        """
        task = self._asking().of_prompt(prompt, sampling, budget, priority)
        return self._running().stream(task)

    async def astream(
        self,
        prompt: str | TokenIds,
        sampling: SamplingParams | None = None,
        *,
        budget: Budget | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """``stream`` for an event loop."""
        task = await asyncio.to_thread(self._asking().of_prompt, prompt, sampling, budget, priority)
        async with aclosing(self._running().outputs(task, task.samples[0])) as outputs:
            async for output in outputs:
                yield output

    def chat_prompt(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """A conversation as token ids, through the checkpoint's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}``, one after another.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: of the template.

        Raises:
            InvalidRequestError: the messages are not allowed, or the template refuses them.
        """
        return self._asking().chat(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )


def _check_whole(checkpoint: LoadedCheckpoint, num_ranks: int) -> None:
    """Refuse to divide what is loaded.

    Raises:
        ConfigError: more than one rank is to serve it.
    """
    if num_ranks > 1:
        raise ConfigError(
            f"--tensor-parallel-size={num_ranks}: a checkpoint that is loaded already is served by "
            "this process alone. Give its name, so that each rank loads its share.",
            param="tensor-parallel-size",
        )


@contextmanager
def _python_names() -> Iterator[None]:
    """Errors about flags name the arguments of the same meaning."""
    try:
        yield
    except ConfigError as error:
        message = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda m: _argument(m[1]), error.message)
        raise ConfigError(message, param=_argument(error.param or "") or None) from error


def _argument(flag: str) -> str:
    return flag.replace("-", "_")


@contextmanager
def _progress(wanted: Progress, total: int) -> Iterator[Callable[[Result], object]]:
    """What is told of each result: the caller's function, a bar, or nobody."""
    if callable(wanted):
        yield wanted
        return
    if wanted is None:
        wanted = total > 1 and sys.stderr is not None and sys.stderr.isatty()
    with tqdm(total=total, unit="prompt", disable=not wanted) as bar:
        yield lambda result: bar.update()
