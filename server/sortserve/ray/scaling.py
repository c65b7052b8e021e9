"""Ray Serve's autoscaling policy: hands the reports of late to ``wanted_replicas``."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from sortserve.replicas.scaling import wanted_replicas

__all__ = ["replicas_by_pressure"]


def replicas_by_pressure(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of replicas; Ray keeps it between the least and the most, and delays it."""
    metrics = context.aggregated_metrics or {}
    return (
        wanted_replicas(
            context.current_num_replicas,
            list(metrics.get("pressure", {}).values()),
            list(metrics.get("missed_share", {}).values()),
        ),
        {},
    )
