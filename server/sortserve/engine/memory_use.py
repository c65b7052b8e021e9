"""Measure what a model's largest step takes of a GPU, before the KV cache gets the rest."""

from __future__ import annotations

import logging

from sortserve.engine.peak import num_pages_of_largest_steps, run_largest_steps
from sortserve.engine.runner import ModelRunner
from sortserve.model.decoder import Decoder
from sortserve.model.device_memory import DeviceMemory, MemoryUse, refusing_too_much

__all__ = ["measure_memory_use"]

logger = logging.getLogger(__name__)

SMALLER_STEP = "Give a smaller --max-num-batched-tokens or --max-num-seqs, or --quantize."


def measure_memory_use(
    memory: DeviceMemory,
    decoder: Decoder,
    *,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_weight_bytes: int,
    utilization: float,
) -> MemoryUse:
    """Run the largest steps on a cache of a few pages, and say what they took.

    Args:
        memory: of the decoder's device.
        decoder: with all its weights.
        block_size: tokens of a page.
        max_model_len: most tokens of a sequence.
        max_num_seqs: most rows of a step.
        max_num_batched_tokens: most tokens of a step.
        num_weight_bytes: of the model.
        utilization: share of the memory that may be in use in the end.

    Raises:
        ConfigError: there is no room for such steps.
    """

    def run() -> None:
        num_pages = num_pages_of_largest_steps(
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
        )
        *_, last_head = decoder.heads
        runner = ModelRunner(decoder, num_pages=num_pages, block_size=block_size)
        for last_exit in {None, last_head}:
            run_largest_steps(
                runner,
                depth=decoder.exits[-1],
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                last_exit=last_exit,
            )

    with refusing_too_much(memory, "the largest step", None, SMALLER_STEP):
        largest_step = memory.peak_of(run)
    use = MemoryUse(
        total=memory.total_bytes(),
        free=memory.free_bytes(),  # what stays after a first step (libraries' own) is gone by now
        weights=num_weight_bytes,
        largest_step=largest_step,
        utilization=utilization,
    )
    logger.info("memory: %s", use)
    return use
