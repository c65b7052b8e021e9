"""What is known of public early-exit models, by their Hugging Face id: data, and how to find it.

A checkpoint of ours says all that in ``sorted.json``; these have none. A line here gives a model
the exits that it was trained for, and says what a person should know who uses it. A model that has
no line is served as any other: at full depth, or at ``--exits``.

Exit E of all of them is the same: the first E layers, the final norm and the head. So is the layer
that LayerSkip's own code and transformers' ``assistant_early_exit`` count.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "UNREADABLE", "Preset", "find_preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One public model."""

    num_layers: int
    """That it has; the preset is of no other model, whatever its name."""
    exits: tuple[int, ...]
    """To serve unless told otherwise: ascending, the last the full depth."""
    trained_from: int = 1
    """Each layer from here on was trained as an exit."""
    license: str
    """What its licence allows: a sentence without its end."""


_LAYERSKIP = "FAIR research licence, for non-commercial research only; gated on the hub"


def _layerskip(num_layers: int) -> Preset:
    """LayerSkip (arXiv 2404.16710) trains every layer as an exit. Served are a quarter of the depth
    (where its authors draft) and every eighth from there: few enough for large slabs and segments.
    """
    exits = tuple(num_layers * eighth // 8 for eighth in range(2, 9))
    return Preset(num_layers=num_layers, exits=exits, license=_LAYERSKIP)


PRESETS = {
    "facebook/layerskip-llama3.2-1B": _layerskip(16),
    "facebook/layerskip-llama3-8B": _layerskip(32),
    "facebook/layerskip-llama2-7B": _layerskip(32),
    "facebook/layerskip-llama2-13B": _layerskip(40),
    "facebook/layerskip-llama2-70B": _layerskip(80),
    "facebook/layerskip-codellama-7B": _layerskip(32),
    "facebook/layerskip-codellama-34B": _layerskip(48),
}
"""By hub id."""

UNREADABLE = {
    "5ivatej/tinyllama-1.1b-early-exit": "a head for each layer",
}
"""Hub ids of models whose exits are stored for a loader of their own, in a format that is not
documented, and what they have at their exits."""


def find_preset(hub_id: str) -> Preset | None:
    """What is known of a model; capitals do not matter, as on the hub."""
    return _BY_LOWER_CASE.get(hub_id.lower())


_BY_LOWER_CASE = {hub_id.lower(): preset for hub_id, preset in PRESETS.items()}
