"""The configuration of Ouro models (arXiv 2510.25741), which transformers has no class for.

Their own class comes with the model as code, which is not run here. It is Qwen2's, with the number
of times that the layers are run. The exit gate that these models have learned is not used: depth is
what a request's budget says.
"""

from __future__ import annotations

from transformers import AutoConfig, Qwen2Config

__all__ = ["OuroConfig", "num_loops"]

DEFAULT_LOOPS = 4


class OuroConfig(Qwen2Config):  # type: ignore[misc]
    """Fields beyond Qwen2's: ``total_ut_steps``, and ``early_exit_threshold``, which is the gate's.

    There are no biases in the attention.
    """

    model_type = "ouro"


def num_loops(config: object) -> int:
    """How often the layers are run."""
    return int(getattr(config, "total_ut_steps", DEFAULT_LOOPS))


AutoConfig.register(OuroConfig.model_type, OuroConfig, exist_ok=True)
