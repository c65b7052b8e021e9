"""What each exit costs, and how good it is."""

from __future__ import annotations

from collections.abc import Sequence

from sortserve.checkpoint.families import count_layer_parameters
from sortserve.checkpoint.sorted_json import MeasuredSchedule, SortedInfo
from sortserve.core.budget import ExitInfo, ExitTable
from sortserve.core.schedule import ScheduleInfo
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS, NO_MODULE

__all__ = ["SCHEDULE_TOKENS", "exit_table"]

SCHEDULE_TOKENS = 128
"""Length of the answer that the compute of a schedule is told for."""


def exit_table(
    config: ModelConfig, sorted_info: SortedInfo | None, exits: Sequence[int]
) -> ExitTable:
    """What each of ``exits`` costs, and how good ``sorted.json`` says it is.

    Measured schedules come along if all their exits are there.

    ``compute`` counts the matrices a token passes (layers, exit module, what the own layers of
    shallower exits need of it, head) relative to the full depth; attention over the context is left
    out.
    """
    layer, layer_matrices = count_layer_parameters(config)
    head = config.vocab_size * config.hidden_size
    modules = {
        exit_layer: EXIT_MODULE_KINDS[
            sorted_info.module_kind(exit_layer) if sorted_info else NO_MODULE
        ]
        for exit_layer in exits
    }

    def num_elements(depth: int) -> int:
        passing = sum(m.num_passing_elements(config) for e, m in modules.items() if e < depth)
        own = modules[depth].num_matrix_elements(config) if depth in modules else 0
        return depth * layer_matrices + passing + own + head

    full_elements = num_elements(config.num_layers)

    def info(exit_layer: int) -> ExitInfo:
        module = modules[exit_layer]
        quality = dict(sorted_info.quality.get(exit_layer, {})) if sorted_info else {}
        is_tied = config.tie_word_embeddings and not module.has_head
        embeddings = head if is_tied else 2 * head
        own_layers = min(exit_layer, config.num_stack_layers)
        return ExitInfo(
            exit_layer=exit_layer,
            num_parameters=embeddings + own_layers * layer + module.num_parameters(config),
            compute=num_elements(exit_layer) / full_elements,
            score=quality.pop("score", None),
            quality=quality or None,
            usable=sorted_info.usable.get(exit_layer) if sorted_info else None,
        )

    infos = {exit_layer: info(exit_layer) for exit_layer in exits}

    def schedule_info(measured: MeasuredSchedule) -> ScheduleInfo:
        metrics = dict(measured.metrics)
        return ScheduleInfo(
            schedule=measured.schedule,
            num_tokens=SCHEDULE_TOKENS,
            compute=measured.schedule.mean(lambda e: infos[e].compute, SCHEDULE_TOKENS),
            score=metrics.pop("score", None),
            quality=metrics or None,
        )

    schedules = [
        schedule_info(measured)
        for measured in (sorted_info.schedules if sorted_info else ())
        if infos.keys() >= set(measured.schedule.exits)
    ]
    return ExitTable(tuple(infos.values()), schedules=tuple(schedules))
