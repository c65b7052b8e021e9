"""Which kind of module each exit is asked to have: the value of ``--exit-modules`` (no torch).

``layer`` asks for one kind at every exit, ``18=layer,21=layer`` for some exits alone: the others
are then what they would be without the flag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sortserve.core.errors import ConfigError
from sortserve.model.exit_module import exit_module_kind

__all__ = ["AskedKinds", "kinds_text", "parse_kinds"]


@dataclass(frozen=True)
class AskedKinds:
    """Names in ``EXIT_MODULE_KINDS`` that were asked for.

    Attributes:
        everywhere: of every exit; None asks for none, or for some exits alone.
        by_exit: of some exits.
    """

    everywhere: str | None = None
    by_exit: Mapping[int, str] = field(default_factory=dict)

    def at(self, exit_layer: int, otherwise: str) -> str:
        """The kind at an exit; ``otherwise`` where none was asked for."""
        return self.by_exit.get(exit_layer, self.everywhere or otherwise)

    def check_exits(self, exits: Sequence[int]) -> None:
        """Refuse kinds of exits that there are not.

        Args:
            exits: below full depth.

        Raises:
            ConfigError: a kind is asked for at another one.
        """
        if others := sorted(self.by_exit.keys() - set(exits)):
            raise ConfigError(
                f"--exit-modules names exit {others[0]}, which is none below full depth: --exits "
                f"has {', '.join(map(str, exits)) or 'none'}.",
                param="exit-modules",
            )


def parse_kinds(text: str | None) -> AskedKinds:
    """What the flag's value asks for; None asks for nothing.

    Raises:
        ValueError: it is neither a kind nor exits with their kinds.
    """
    if text is None:
        return AskedKinds()
    if "=" not in text:
        return AskedKinds(everywhere=exit_module_kind(text.strip()))
    by_exit: dict[int, str] = {}
    for part in text.split(","):
        layer, equals, kind = (word.strip() for word in part.partition("="))
        if not equals or not layer.isdecimal() or int(layer) in by_exit:
            raise ValueError(f"{part.strip()!r} should be EXIT=KIND, each exit once")
        by_exit[int(layer)] = exit_module_kind(kind)
    return AskedKinds(by_exit=by_exit)


def kinds_text(value: str) -> str:
    """``value``, if ``parse_kinds`` takes it; the ValueError of it else."""
    parse_kinds(value)
    return value
