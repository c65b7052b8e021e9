"""The data of a run: sources read, a share held out, the rest mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve.model.config import ModelConfig
from sortserve_trainer.data import (
    DataSource,
    Example,
    Mixture,
    Pack,
    PreparedData,
    pack_examples,
    parse_source,
    split_held_out,
)
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["RunData", "load_run_data"]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What is trained on and what is not."""

    mixture: Mixture
    held_out: Mapping[str, Sequence[Pack]]
    described: list[dict[str, Any]]
    """Of each source: reference as typed, name, weight, rows, digest."""
    evaluated: list[dict[str, Any]]
    """Likewise of ``--eval-data``."""


def load_run_data(
    settings: TrainSettings,
    tokenizer: Any,
    config: ModelConfig,
    folder: Path,
    *,
    prepares: bool = False,
) -> RunData:
    """Read all ``--data``.

    Args:
        settings: of the run.
        tokenizer: the base's.
        config: the base's.
        folder: where prepared examples are looked for.
        prepares: keep there what is not.

    Raises:
        ConfigError: a source is bad; one line names it, and the line of a bad row.
    """
    parts: list[tuple[DataSource, list[Example]]] = []
    held_out: dict[str, Sequence[Pack]] = {}
    described = []
    # Attention in training is causal over the whole example: a sliding window must hold it all.
    longest = min(config.max_position_embeddings, config.sliding_window or settings.max_length)
    prepared = PreparedData(
        folder, tokenizer, min(settings.max_length, longest), settings.train_on_prompts
    )
    share = 0.0 if settings.eval_data else settings.held_out
    for text in settings.data:
        source = parse_source(text)
        examples, digest = prepared.prepare(source) if prepares else prepared.load(source)
        kept, rest = split_held_out(examples, share, settings.seed)
        parts.append((source, kept))
        if rest:
            held_out[source.reference] = pack_examples(rest, settings.pack_length)
        described.append(
            {
                "reference": source.reference,
                "name": Path(source.reference).name if digest else source.reference,
                "weight": source.weight,
                "rows": len(kept),
                "held_out_rows": len(rest),
                "sha256": digest,
            }
        )
    evaluated = []
    for text in settings.eval_data:
        source = parse_source(text)
        examples, digest = prepared.prepare(source) if prepares else prepared.load(source)
        held_out[source.reference] = pack_examples(examples, settings.pack_length)
        name = Path(source.reference).name if digest else source.reference
        told = {"reference": source.reference, "name": name, "rows": len(examples)}
        evaluated.append({**told, "sha256": digest})
    mixture = Mixture(
        parts,
        pack_length=settings.pack_length,
        seed=settings.seed,
        num_epochs=None if settings.max_tokens else settings.epochs,
        max_tokens=settings.max_tokens,
    )
    return RunData(
        mixture=mixture,
        held_out=_cut(held_out, settings.eval_tokens),
        described=described,
        evaluated=evaluated,
    )


def _cut(held_out: Mapping[str, Sequence[Pack]], num_tokens: int) -> dict[str, Sequence[Pack]]:
    """At most ``num_tokens`` of held-out packs, an equal share of every source."""
    share = num_tokens // max(1, len(held_out))
    cut: dict[str, Sequence[Pack]] = {}
    for name, packs in held_out.items():
        kept: list[Pack] = []
        for pack in packs:
            if kept and sum(p.num_tokens for p in kept) + pack.num_tokens > share:
                break
            kept.append(pack)
        cut[name] = kept
    return cut
