"""What the HTTP service is told of the settings and the model."""

from __future__ import annotations

from sortserve.api.settings import ApiSettings
from sortserve.process.config import ServeSettings
from sortserve.process.served import Served

__all__ = ["api_settings"]


def api_settings(settings: ServeSettings, serving: Served) -> ApiSettings:
    """The part of the settings that the HTTP service needs, with what the model says."""
    return ApiSettings(
        served_model_name=serving.model_name,
        license=serving.license,
        backend=serving.computed_in["backend"],
        api_keys=settings.api_keys,
        key_weights=settings.key_weights,
        weight_rules=settings.weight_rules,
        max_body_bytes=int(settings.max_body_size),
        cors_allow_origins=settings.cors_allow_origins,
        root_path=settings.root_path,
        enable_docs=settings.enable_docs,
        playground=settings.playground,
        max_token_chars=serving.tokenizer.max_token_chars,
        generation_defaults=serving.generation_defaults,
        default_budget=settings.budget_by_default,
        structured_min_quality=settings.structured_min_quality,
        request_timeout_s=settings.request_timeout,
        log_prompts=settings.log_prompts,
    )
