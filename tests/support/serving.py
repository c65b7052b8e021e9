"""A real engine over a checkpoint folder, and the offline answers it must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.plan import Runner
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.cost.model import CostModel
from sortserve.engine.assemble import make_engine, make_tokenizer
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.model.backends import choose_backend
from sortserve.model.decoder import Decoder
from sortserve.simulation import Clock
from sortserve.text.tokenizer import Tokenizer
from support.launchers import LAUNCHERS
from support.reference_sampling import sample_reference
from support.scripted import FakeClock
from support.timed import RecordingRunner, Timed
from support.tiny_models import hf_logits, load_hf, read_exit_module


@dataclass(frozen=True)
class Served:
    """A checkpoint loaded for serving, in fp32 unless told."""

    path: Path
    checkpoint: LoadedCheckpoint
    decoder: Decoder
    tokenizer: Tokenizer

    def engine(
        self,
        *,
        num_pages: int = 600,
        block_size: int = 4,
        launcher: str | None = None,
        **config: Any,
    ) -> Engine:
        """A fresh engine with an empty cache; with a launcher it overlaps its steps."""
        runner = ModelRunner(self.decoder, num_pages=num_pages, block_size=block_size)
        return self._engine_of(runner, FakeClock(), launcher, config)

    def timed(
        self,
        *,
        truth: CostModel,
        believed: CostModel,
        num_pages: int = 600,
        block_size: int = 4,
        launcher: str | None = None,
        **config: Any,
    ) -> Timed:
        """A server whose steps take the time of one cost model, and that reckons with another."""
        clock = Clock()
        model = ModelRunner(self.decoder, num_pages=num_pages, block_size=block_size)
        runner = RecordingRunner(model, clock, truth)
        engine = self._engine_of(runner, clock, launcher, config)
        engine.costs.use(believed)
        return Timed(engine, runner, clock)

    def _engine_of(
        self,
        runner: Runner,
        clock: Callable[[], float],
        launcher: str | None,
        config: dict[str, Any],
    ) -> Engine:
        if launcher is not None:
            runner, config = LAUNCHERS[launcher](runner), {**config, "async_scheduling": True}
        settings = {
            "max_num_seqs": 64,
            "seed": 0,
            "vocab_size": self.checkpoint.config.vocab_size,
            **config,
        }
        engine_config = EngineConfig(max_model_len=self.checkpoint.max_model_len, **settings)
        return make_engine(runner, self.checkpoint, self.tokenizer, engine_config, clock=clock)


@cache
def serve(
    path: Path, *, backend: str = "auto", device: str = "cpu", dtype: str = "float32"
) -> Served:
    """Load a checkpoint once."""
    checkpoint = load_checkpoint(str(path), dtype=dtype, device=device)
    decoder = Decoder(
        checkpoint.config,
        checkpoint.weights,
        exits=checkpoint.exits.layers,
        max_model_len=checkpoint.max_model_len,
        backend=choose_backend(
            checkpoint.config,
            checkpoint.weights.dtype,
            checkpoint.weights.device,
            backend,
        ),
    )
    return Served(path, checkpoint, decoder, make_tokenizer(checkpoint))


@cache
def _hf(path: Path) -> Any:
    return load_hf(path)


def offline_tokens(
    path: Path,
    prompt: Sequence[int],
    params: SamplingParams,
    exits: Sequence[int],
    *,
    eos_token_ids: frozenset[int],
    guess: Sequence[int] = (),
) -> list[int]:
    """What transformers answers: no cache, each token from a whole forward pass over all before it.

    ``exits[i]`` is the depth that token i is made at: KV of the shallower layers depends on the
    tokens alone, so a change of depth needs no other bookkeeping here.

    With a ``guess``, such as what was served, as far as it is right one pass a depth tells all its
    tokens: no token sees those after it. A wrong guess costs time and changes nothing.
    """
    passes: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    eos: frozenset[int] = frozenset() if params.ignore_eos else eos_token_ids
    stop = eos | frozenset(params.stop_token_ids)
    output: list[int] = []
    for exit_layer in exits[: params.max_tokens]:
        known = tuple(guess if list(guess[: len(output)]) == output else output)
        if (exit_layer, known) not in passes:
            module = read_exit_module(path, exit_layer)
            ids = [*prompt, *known]
            passes[exit_layer, known] = hf_logits(_hf(path), ids, exit_layer, module)
        logits_V = passes[exit_layer, known][len(prompt) + len(output) - 1]
        row = SamplingRow(params, params.seed or 0, tuple(prompt), tuple(output), stop)
        output.append(sample_reference(logits_V, row))
        if output[-1] in stop:
            break
    return output
