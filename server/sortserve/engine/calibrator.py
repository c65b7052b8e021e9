"""The step times of this machine: measured at a start, or taken from an earlier one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypedDict

import torch

from sortserve import __version__
from sortserve.core.plan import Runner
from sortserve.core.user_cache import open_user_cache
from sortserve.cost.cache import cache_path, machine_name, read_samples, write_samples
from sortserve.cost.calibration import calibrate, fault_of, slowed, spot_check, survey
from sortserve.cost.model import CostModel, Samples, StepShape
from sortserve.engine.engine import Engine
from sortserve.model.decoder import Decoder
from sortserve.telemetry.status_line import phase

__all__ = ["Calibrator"]

logger = logging.getLogger(__name__)

CALIBRATION_ATTEMPTS = 2
MAX_DRIFT = 1.5
"""An earlier calibration that is further off than this factor is made anew."""


class Calibrator:
    """Times the steps of an engine that serves nobody yet, or finds that it has been done.

    Args:
        engine: that will learn from it.
        runner: the engine's.
        decoder: the runner's.
    """

    def __init__(self, engine: Engine, runner: Runner, decoder: Decoder) -> None:
        self._runner = runner
        self._clock = engine.clock
        self._shapes = _Shapes(
            exits=engine.exits.layers,
            vocab_size=decoder.config.vocab_size,
            max_model_len=engine.config.max_model_len,
            max_num_batched_tokens=engine.config.max_num_batched_tokens,
            max_num_seqs=engine.config.max_num_seqs,
        )
        self._key = _calibration_key(engine, runner, decoder)
        cache = open_user_cache()
        self._path = None if cache is None else cache_path(cache, self._key)

    def samples(self) -> list[tuple[StepShape, float]]:
        """Those of an earlier start, at the machine's present speed; else new ones."""
        kept = None if self._path is None else read_samples(self._path)
        if kept is not None and (fault := self._fault_of(kept)) is not None:
            logger.warning("the calibration in %s is not used: %s", self._path, fault)
            kept = None
        if kept is None:
            return self._new_samples()
        ratio = spot_check(self._runner, CostModel.fit(kept), clock=self._clock, **self._shapes)
        logger.info("calibration of an earlier start: steps take %.2f times as long now", ratio)
        if not 1 / MAX_DRIFT <= ratio <= MAX_DRIFT:
            return self._new_samples()
        return [(shape, seconds * ratio) for shape, seconds in kept]

    def measure(self) -> list[tuple[StepShape, float]]:
        """New ones, kept for the next start if they can be believed, else tried once more."""
        timing = "timing the model's steps, kept for later starts, some 10 s"
        logger.info("%s", timing, extra=phase(timing))
        for _ in range(CALIBRATION_ATTEMPTS):
            samples = calibrate(self._runner, clock=self._clock, **self._shapes)
            fault = self._fault_of(samples)
            if fault is None:
                if self._path is not None:
                    write_samples(self._path, samples, self._key)
                break
            logger.warning("this calibration is not kept: %s", fault)
        return samples

    def survey(self) -> list[tuple[StepShape, float]]:
        """Many steps, for a simulation of this machine; see ``sortserve.cost.calibration``."""
        return survey(self._runner, clock=self._clock, **self._shapes)

    def _new_samples(self) -> list[tuple[StepShape, float]]:
        """New ones to serve with: made slower where they cannot be believed."""
        samples = self.measure()
        if self._fault_of(samples) is None:
            return samples
        logger.warning(
            "no calibration that can be believed: times are predicted with caution until the steps "
            "that run have shown better, and the next start measures again"
        )
        return slowed(samples)

    def _fault_of(self, samples: Samples) -> str | None:
        return fault_of(samples, self._runner, **self._shapes)


class _Shapes(TypedDict):
    """What steps are possible."""

    exits: Sequence[int]
    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int


def _calibration_key(engine: Engine, runner: Runner, decoder: Decoder) -> dict[str, object]:
    """All that step times depend on."""
    device = decoder.device
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": machine_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "model": decoder.config,
        "share": decoder.local_config,
        "exits": engine.exits.layers,
        "dtype": decoder.dtype,
        "formats": sorted(decoder.formats.items()),
        "backend": (decoder.backend.name, decoder.backend.detail),
        "block_size": runner.block_size,
        "max_num_batched_tokens": engine.config.max_num_batched_tokens,
    }
