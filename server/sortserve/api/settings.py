"""What the HTTP service is configured with: one frozen value, made by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sortserve.core.api_keys import KeyPolicy, key_digest
from sortserve.core.budget import Budget
from sortserve.core.sampling_params import SamplingParams
from sortserve.core.weights import KeyWeights, WeightRules

__all__ = ["ApiSettings"]

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a checkpoint's ``generation_config.json`` may decide for requests that do not say."""
_NO_WEIGHTS = KeyWeights()


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Settings of one HTTP service.

    Raises:
        InvalidRequestError: the checkpoint's generation defaults are out of range.
    """

    served_model_name: str
    """The model's name in requests and replies; ``NAME@E`` is exit E of it."""
    license: str | None = None
    """What the model's licence allows, where it is known, for ``/v1/models``."""
    backend: str | None = None
    """Name of what the model computes with, for ``/version``."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer tokens. Empty: everyone may ask."""
    key_weights: Mapping[str, KeyWeights] = field(default_factory=dict)
    """What the requests of a key are worth, where that is not what all others' are."""
    weight_rules: WeightRules = field(default_factory=WeightRules)
    """What service tiers and priorities are worth."""
    max_body_bytes: int = 4 << 20
    cors_allow_origins: tuple[str, ...] = ()
    """Origins that browsers may call from; none by default."""
    root_path: str = ""
    """Path prefix that a reverse proxy strips."""
    enable_docs: bool = True
    """Serve ``/docs`` and ``/openapi.json``."""
    playground: bool = True
    """Serve the page at ``/``."""
    max_n: int = 128
    """Most sequences of one request: prompts times ``n``."""
    max_token_chars: int = 128
    """Characters of the tokenizer's longest token: what no longer text can fit the context by."""
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's ``generation_config.json``; only sampling fields are read."""
    default_budget: Budget = field(default_factory=Budget)
    """Of requests that give no budget of their own."""
    structured_min_quality: float | None = None
    """Floor of requests whose answer must have a form, and that name none. None: as all others."""
    request_timeout_s: float | None = None
    """Seconds after which a request is cut off with status 504. None: never."""
    log_prompts: bool = False
    """Log prompts and answers. They may be private."""

    def __post_init__(self) -> None:
        SamplingParams(**self.sampling_defaults)

    @property
    def key_policies(self) -> tuple[KeyPolicy, ...]:
        """What each of ``api_keys`` may do: keys without a name, and without limits."""
        return tuple(
            KeyPolicy(digests=(key_digest(key),), weights=self.key_weights.get(key, _NO_WEIGHTS))
            for key in self.api_keys
        )

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Values of sampling fields that a request does not give."""
        given = self.generation_defaults
        return {name: given[name] for name in SAMPLING_DEFAULTS if given.get(name) is not None}
