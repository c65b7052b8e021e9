"""The part of the trainer's settings that the loading of a model reads.

Whoever has these fields can load a model for training; pydantic, which the settings of the command
line are made of, is not needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sortserve_trainer.run.module_kinds import AskedKinds

__all__ = ["ModelSettings"]


class ModelSettings(Protocol):
    """What the loading of a model reads of ``TrainSettings``, which has all of it."""

    @property
    def base(self) -> str:
        """Model to start from."""

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a hub id."""

    @property
    def exits(self) -> Sequence[int]:
        """To train."""

    @property
    def asked_kinds(self) -> AskedKinds:
        """Kinds of exits' modules that were asked for; there modules of other kinds are dropped."""

    @property
    def device(self) -> str:
        """Where to train."""

    @property
    def dtype(self) -> str:
        """What is computed in."""

    @property
    def quantize(self) -> str:
        """What the frozen base is kept in."""

    @property
    def seed(self) -> int:
        """Of initial weights."""

    @property
    def lora_rank(self) -> int | None:
        """Rank of the adapter, if it was given."""

    @property
    def lora_alpha(self) -> float | None:
        """LoRA's scale times its rank."""

    @property
    def lora_targets(self) -> Sequence[str]:
        """Names of the layers that get LoRA."""

    @property
    def lora_dropout(self) -> float:
        """Dropout before LoRA."""

    @property
    def trains_weights(self) -> bool:
        """Whether the trunk's own weights are trained."""

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA adapter is trained."""
