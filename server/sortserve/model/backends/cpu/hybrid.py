"""Linear layers of which two kernels share the work: one for few tokens, another for many.

Shape legend: T tokens, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

from torch import Tensor

from sortserve.model.backend import LinearBackend, LinearOp

__all__ = ["EitherLinear", "HybridLinearBackend"]


class HybridLinearBackend:
    """One backend for few tokens, another for many; both keep their weights."""

    name = "native+onednn"

    def __init__(self, few: LinearBackend, many: LinearBackend, max_few_tokens: int) -> None:
        self._few = few
        self._many = many
        self._max_few_tokens = max_few_tokens

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        return self._either(
            self._few.linear(weight_OI, bias_O), self._many.linear(weight_OI, bias_O)
        )

    def gated(self, weight_2FI: Tensor, bias_2F: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        return self._either(
            self._few.gated(weight_2FI, bias_2F), self._many.gated(weight_2FI, bias_2F)
        )

    def head(self, weight_OI: Tensor) -> LinearOp:
        """See LinearBackend."""
        return self._either(self._few.head(weight_OI), self._many.head(weight_OI))

    def _either(self, few: LinearOp, many: LinearOp) -> LinearOp:
        return EitherLinear(few, many, self._max_few_tokens)


class EitherLinear:
    """``few`` for up to ``max_few_tokens`` tokens, else ``many``."""

    def __init__(self, few: LinearOp, many: LinearOp, max_few_tokens: int) -> None:
        self.few = few
        self._many = many
        self.max_few_tokens = max_few_tokens

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        return (self.few if x_TI.shape[0] <= self.max_few_tokens else self._many)(x_TI)
