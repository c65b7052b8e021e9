"""Does a backend compute what the reference computes? Asked at start-up, on this very machine.

The model of the check is cut from the one that was loaded: its first layers (again from the first
where it has fewer), its head or the beginning of it, and two kinds of the modules that its exits
have, ``layer`` and ``head`` first; so matrices, formats of weights, biases, norms and RoPE are
those that will be served. The backend packs copies of these few layers, so nothing that was loaded
is lost, and the copies are gone when the answer is there.

Both run the same steps over scattered pages that hold leftovers: prompts whole and in chunks, exact
blocks, single tokens, rows that leave early and rows that sit a step out, long contexts on a GPU.
Each row's last hidden state is compared, and the logits of the last step: the norm of the
difference, as a share of the norm of the reference's around its mean.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.core.slabs import Slabs
from sortserve.engine.inputs import build_batch
from sortserve.model.backend import Backend
from sortserve.model.config import ModelConfig
from sortserve.model.decoder import Decoder
from sortserve.model.weight import PLAIN, Weight
from sortserve.model.weights import ExitModuleWeights, ModelWeights, quantization_of

__all__ = ["TOLERANCES", "Difference", "largest_difference"]

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference that rounding explains, by the dtype that is computed in. In bf16 our kernels
are at 0.03, and a wrong norm, gate, page or length is at 0.2 or more."""
QUANTIZED_TOLERANCE = 0.15
"""In any dtype, where weights are quantised: inputs that are rounded to 8 bits may fall to the next
step for the least difference before."""

NUM_EXITS = 2
MAX_SLAB_SIZE = 2
"""Layers of a slab in the check: two show that a page has room for each."""
MAX_BLOCK_TOKENS = 32
"""Prompts are made of blocks, but of no larger ones."""
GPU_CONTEXT = 600
"""Tokens of the longest row on a device other than a CPU: enough for a context to be split."""
LEFTOVER = 3.0
"""What pages hold before anything is written to them."""
HEAD_OUTPUTS = 4096
"""Outputs of a plain head, and what is left of all of them when they are divided by 64: others
would only cost time and memory."""


@dataclass(frozen=True)
class Difference:
    """The largest one found."""

    share: float
    """Of the reference's norm; infinite where the backend gives no finite numbers."""
    tolerance: float
    where: str

    @property
    def is_tolerable(self) -> bool:
        """Whether rounding explains it."""
        return self.share <= self.tolerance

    def __str__(self) -> str:
        amount = "no finite numbers" if math.isinf(self.share) else f"{self.share:.3g}"
        return f"{amount} (tolerance {self.tolerance:g}) in {self.where}"


@dataclass(frozen=True)
class _Row:
    """One sequence: its exit, counted from the shallowest, and its tokens in each step."""

    name: str
    exit_index: int
    tokens: tuple[int, ...]


_STEPS = ("first chunks", "chunks after a prefix", "decode", "a shallow decode", "a mixed decode")


def _rows(block_tokens: int, longest: int) -> list[_Row]:
    """The sequences, deepest first."""
    part = block_tokens + 3
    return [
        _Row("long", 1, (part, longest - part, 1, 0, 1)),
        _Row("short", 1, (2, 3, 1, 0, 1)),
        _Row("almost a block", 0, (max(1, block_tokens - 1), 1, 1, 1, 1)),
        _Row("a block", 0, (0, block_tokens, 1, 1, 1)),
        _Row("a token", 0, (1, 1, 1, 1, 1)),
    ]


def largest_difference(
    backend: Backend,
    reference: Backend,
    config: ModelConfig,
    weights: ModelWeights,
    *,
    block_size: int,
) -> Difference:
    """What distinguishes ``backend`` most from ``reference``.

    Args:
        backend: to be checked.
        reference: for the same target.
        config: of the loaded model.
        weights: of the loaded model, all there; they stay what they are.
        block_size: tokens of a page, as it will be served.
    """
    checked = _Model.of(config, weights)
    block_tokens = min(block_size, MAX_BLOCK_TOKENS)
    longest = 2 * block_tokens + 5 if weights.device.type == "cpu" else GPU_CONTEXT
    plans = list(_plans(_rows(block_tokens, longest), checked, block_size))
    expected, given = (
        _run(checked, each, plans, block_size=block_size, max_model_len=longest + len(_STEPS))
        for each in (reference, backend)
    )
    states = [
        f"the hidden state of row {row.request_id!r} (exit {row.exit_layer}, {row.context_len} "
        f"tokens) of {name}"
        for name, plan in zip(_STEPS, plans, strict=True)
        for row in plan.rows
    ]
    logits = [place.replace("hidden state", "logits") for place in states]
    shares = [*_shares(expected.h_RD, given.h_RD), *_shares(expected.logits_RV, given.logits_RV)]
    num_last = len(expected.logits_RV)
    share, where = max(zip(shares, [*states, *logits[-num_last:]], strict=True))
    quantized = quantization_of(weights.formats) != "none"
    tolerance = QUANTIZED_TOLERANCE if quantized else TOLERANCES[weights.dtype]
    return Difference(share, tolerance, where)


@dataclass(frozen=True)
class _Model:
    """The model of the check."""

    config: ModelConfig
    weights: ModelWeights
    exits: tuple[int, ...]

    @property
    def slabs(self) -> Slabs:
        """As the decoder has them."""
        modules = self.weights.exit_modules
        return Slabs.of(self.exits, [e for e in modules if modules[e].kind.has_layer])

    @staticmethod
    def of(config: ModelConfig, weights: ModelWeights) -> _Model:
        slab_size = min(MAX_SLAB_SIZE, len(weights.layers))
        exits = tuple(slab_size * (i + 1) for i in range(NUM_EXITS))
        # Where layers are run several times, here they are, too.
        num_loops = min(config.num_loops, NUM_EXITS)
        layers = itertools.islice(itertools.cycle(weights.layers), exits[-1] // num_loops)
        by_kind: dict[type, ExitModuleWeights] = {
            module.kind: module for module in weights.exit_modules.values()
        }
        # There is most to get wrong in layers, so one is among those for which there is an exit,
        # and heads are matrices that nothing else stands for.
        modules = sorted(
            by_kind.values(), key=lambda m: (not m.kind.has_layer, not m.kind.has_head)
        )
        return _Model(
            replace(config, num_layers=exits[-1], num_loops=num_loops),
            replace(
                weights,
                layers=list(layers),
                exit_modules=dict(zip(exits, modules, strict=False)),
                lm_head=weights.lm_head,
            ),
            exits,
        )._with_smaller_heads()

    def _with_smaller_heads(self) -> _Model:
        """With the beginnings of the heads, where all of them can be cut."""
        weights = self.weights
        if any(head.format is not PLAIN for head in (weights.lm_head, *weights.own_heads)):
            return self
        modules = {
            exit_layer: replace(module, head=module.head and _beginning(module.head))
            for exit_layer, module in weights.exit_modules.items()
        }
        lm_head = _beginning(weights.lm_head)
        return replace(self, weights=replace(weights, lm_head=lm_head, exit_modules=modules))


def _beginning(head: Weight) -> Weight:
    """Of a plain matrix; all of it is the very same one, which may be the embedding."""
    num_outputs = HEAD_OUTPUTS + head.shape[0] % 64
    return head if head.shape[0] <= num_outputs else Weight.plain(head.values[:num_outputs])


def _plans(rows: Sequence[_Row], model: _Model, block_size: int) -> Iterator[StepPlan]:
    draw = random.Random(0)
    ids = [
        [draw.randrange(model.config.vocab_size) for _ in range(sum(row.tokens))] for row in rows
    ]
    tables = _page_tables(rows, model, block_size)
    starts = [0] * len(rows)
    sampling = SamplingRow(SamplingParams(temperature=0.0), 0, (0,), (), frozenset())
    for step in range(len(_STEPS)):
        planned = []
        for i, row in enumerate(rows):
            start, end = starts[i], starts[i] + row.tokens[step]
            starts[i] = end
            if end == start:
                continue
            planned.append(
                RowPlan(
                    request_id=row.name,
                    exit_layer=model.exits[row.exit_index],
                    start=start,
                    token_ids=tuple(ids[i][start:end]),
                    block_table_SB=tables[i],
                    sampling=sampling,
                )
            )
        yield StepPlan(rows=tuple(planned), depth_cap=planned[0].exit_layer)


def _page_tables(rows: Sequence[_Row], model: _Model, block_size: int) -> list[NDArray[np.int32]]:
    """[slabs, blocks] of each row: all pages there are, scattered."""
    counts = [model.slabs.count(exit_layer) for exit_layer in model.exits]
    shapes = [(counts[row.exit_index], math.ceil(sum(row.tokens) / block_size)) for row in rows]
    pages = list(range(sum(map(math.prod, shapes))))
    random.Random(1).shuffle(pages)
    left = iter(pages)
    return [
        np.array(list(itertools.islice(left, math.prod(shape))), dtype=np.int32).reshape(shape)
        for shape in shapes
    ]


@dataclass(frozen=True)
class _Answers:
    """What a backend made of the steps, in fp32."""

    h_RD: Tensor
    """Of the rows of all steps."""
    logits_RV: Tensor
    """Of the rows of the last step."""


def _run(
    model: _Model,
    backend: Backend,
    plans: Sequence[StepPlan],
    *,
    block_size: int,
    max_model_len: int,
) -> _Answers:
    decoder = Decoder(
        model.config,
        model.weights,
        exits=model.exits,
        max_model_len=max_model_len,
        backend=backend,
    )
    tables = {row.request_id: row.block_table_SB for plan in plans for row in plan.rows}
    num_pages = sum(table.size for table in tables.values())
    kv_cache = decoder.allocate_kv_cache(num_pages, block_size)
    kv_cache.pages.fill_(LEFTOVER)
    states = []
    for plan in plans:
        batch = build_batch(
            plan, block_size=block_size, num_slabs=decoder.num_slabs, device=decoder.device
        )
        states.append(decoder.forward(batch, kv_cache))
    last = [row.exit_layer for row in plans[-1].rows]
    return _Answers(torch.cat(states).float(), decoder.logits(states[-1], last).float())


def _shares(expected_RX: Tensor, given_RX: Tensor) -> list[float]:
    """The difference of each row; 0 where the reference itself gives no finite numbers."""
    centred_RX = expected_RX - expected_RX.mean(-1, keepdim=True)
    norms_R = torch.linalg.vector_norm(centred_RX, dim=-1)
    shares_R = torch.linalg.vector_norm(given_RX - expected_RX, dim=-1) / norms_R
    shares_R = torch.where(shares_R.isfinite(), shares_R, math.inf)
    return torch.where(norms_R.isfinite(), shares_R, 0.0).tolist()
