"""``sortserve profile``: time the steps of this machine, fit the cost model, print and plot it."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path

from sortserve.core.errors import ConfigError
from sortserve.cost.machine import Machine
from sortserve.cost.model import CostModel, Samples
from sortserve.cost.step_curve import StepCurve, spread
from sortserve.process.build import build
from sortserve.process.config import ServeSettings, load_settings
from sortserve.process.plot import Series, line_chart

__all__ = ["chart", "measured_machine", "profile", "table"]

COEFFICIENTS = ("step", "layer", "layer-token", "layer-KV-token", "sampled row")


def profile(settings: ServeSettings, plot: Path | None = None) -> int:
    """Measure, keep the result for the next ``serve``, print it; returns the exit code.

    Raises:
        ConfigError: the plot cannot be drawn or written.
    """
    if plot is not None:
        _check_matplotlib()
    serving = build(settings)
    samples = serving.measure()
    model = CostModel.fit(samples)
    print(table(samples, model))
    if plot is not None:
        try:
            plot.write_bytes(chart(samples, model, serving.model_name))
        except OSError as error:
            raise ConfigError(f"--plot {plot} cannot be written: {error}", param="plot") from error
        print(f"plot: {plot}")
    return 0


def table(samples: Samples, model: CostModel) -> str:
    """Each measured step beside what the model says of it, the errors, and the coefficients."""
    lines = ["layers tokens  rows  measured ms  model ms   error"]
    errors = []
    for shape, seconds in samples:
        predicted = model.step_s(shape)
        errors.append(abs(predicted / seconds - 1))
        lines.append(
            f"{shape.num_layers:>6} {shape.num_tokens:>6} {shape.num_sampled:>5} "
            f"{seconds * 1e3:>12.2f} {predicted * 1e3:>9.2f} {predicted / seconds - 1:>+7.1%}"
        )
    high = sorted(errors)[int(0.95 * (len(errors) - 1))]
    lines += ["", f"error: median {statistics.median(errors):.1%}, 95th percentile {high:.1%}"]
    for name, line in (("small", model.small), ("large", model.large)):
        terms = (f"{c * 1e6:.3g} us a {n}" for c, n in zip(line, COEFFICIENTS, strict=True))
        lines.append(f"{name} steps: {', '.join(terms)}")
    return "\n".join(lines)


def chart(samples: Samples, model: CostModel, title: str) -> bytes:
    """Step time over tokens as an SVG: for each depth the model's line and the measured dots."""
    series: list[Series] = []
    for i, layers in enumerate(sorted({shape.num_layers for shape, _ in samples})):
        own = sorted(
            ((shape, s) for shape, s in samples if shape.num_layers == layers),
            key=lambda sample: sample[0].num_tokens,
        )
        modelled = [(shape.num_tokens, 1e3 * model.step_s(shape)) for shape, _ in own]
        measured = [(shape.num_tokens, 1e3 * seconds) for shape, seconds in own]
        series.append(Series(f"{layers} layers", modelled, colour=i))
        series.append(Series("", measured, colour=i, dots=True))
    title = f"{title}: time of a step, modelled (line) and measured (dots)"
    return line_chart(title, "tokens in the step", "ms", series)


def _check_matplotlib() -> None:
    """Find out before a minute of measuring that its result could not be drawn."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'sortserve[plot]'",
            param="plot",
        )


def measured_machine(model_name: str | None, exits: str | None = None) -> Machine:
    """The machine it runs on, as a server with these flags would find it; takes half a minute.

    Args:
        model_name: what ``sortserve serve`` would be given; None: its default.
        exits: as in ``--exits``; None: the checkpoint's own.

    Raises:
        SortserveError: an exit is wrong, or the model cannot be served.
    """
    given = {"model": model_name, "exits": exits}
    serving = build(load_settings({k: v for k, v in given.items() if v is not None}))
    samples = serving.survey()
    model, noise = CostModel.fit(samples), spread(samples)
    table = serving.checkpoint.exits
    scores = {e: table[e].score for e in table.layers}
    return Machine(
        name="this",
        source="measured by this run",
        exits=tuple(table.layers),
        small=model.small,
        large=model.large,
        curve=StepCurve.fit(samples),
        compute={e: table[e].compute for e in table.layers},
        score=None if None in scores.values() else {e: s or 0.0 for e, s in scores.items()},
        schedules=table.schedules,
        noise=Machine.noise if noise is None else noise,
    )
