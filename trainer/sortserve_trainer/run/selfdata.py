"""A model writes training data for its own exits: it answers prompts, by our engine.

Exits learn to say what the full model would say, so its own answers are text worth learning from,
and text by an Apache-licensed model may be shipped. The prompts are the rows of instruction or
question files, whose answers are ignored, or the model's own.

Appends as answers finish, so that a killed run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from sortserve import LLM, Budget, SamplingParams
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import ConfigError
from sortserve_trainer.data.forms import parse_question
from sortserve_trainer.data.rows import read_rows
from sortserve_trainer.model.generation import is_sound, sampling_for
from sortserve_trainer.run.own_prompts import write_prompts
from sortserve_trainer.run.selfdata_settings import SelfdataSettings

__all__ = ["write_selfdata"]

WAVE = 512
"""Prompts handed to the engine at once: bounds its memory, and what a kill can lose."""


def write_selfdata(
    settings: SelfdataSettings, on_wave: Callable[[int, int], object] = lambda done, total: None
) -> None:
    """Append one row per prompt to the output, after those that an earlier run has written.

    Args:
        settings: what is asked, who answers, and where the rows go.
        on_wave: called when rows are written, with how many there are and how many there will be.

    Raises:
        ConfigError: a setting, or a row of the prompts, is wrong; one line says which and why.
        CheckpointError: the model cannot be loaded.
        OSError: the output cannot be written.
    """
    messages = [m for path in settings.prompts for m in _read_messages(path, settings.limit)]
    total = settings.write_prompts or len(messages)
    if not total:
        raise ConfigError(f"{settings.prompts[0]}: there is no prompt in it.", param="prompts")
    _check_output(settings.output)
    checkpoint = load_checkpoint(settings.model)
    budget = Budget(exit_layer=_exit_layer(settings, checkpoint))
    most_tokens = settings.max_prompt_tokens + settings.max_tokens
    num_done = _num_lines(settings.output)
    with LLM(
        checkpoint,
        max_model_len=min(most_tokens, checkpoint.max_model_len),
        max_num_seqs=min(settings.max_num_seqs, WAVE),
    ) as llm:
        llm.chat_prompt([{"role": "user", "content": "?"}])  # refused where there is no template
        with settings.output.open("a", encoding="utf-8") as file:
            for start in range(num_done, total, WAVE):
                seed = settings.seed + start
                wave = messages[start : start + WAVE]
                if settings.write_prompts is not None:
                    wave = write_prompts(
                        llm,
                        min(WAVE, total - start),
                        budget=budget,
                        max_tokens=settings.max_prompt_tokens,
                        max_repetition=settings.max_repetition,
                        seed=seed,
                    )
                _answer_all(llm, wave, settings, budget, seed, file)
                on_wave(start + len(wave), total)


def _read_messages(path: Path, limit: int | None) -> list[str]:
    messages = [parse_question(row) for row in read_rows(path)]
    if limit is None or limit >= len(messages):
        return messages
    return [messages[i * len(messages) // limit] for i in range(limit)]


def _check_output(path: Path) -> None:
    """Refuse, before any weights are read, a place where no file can be."""
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"{path.parent} is no folder"
    else:
        return
    raise ConfigError(f"--output {path} cannot be written: {reason}.", param="output")


def _exit_layer(settings: SelfdataSettings, checkpoint: LoadedCheckpoint) -> int:
    exits = checkpoint.exits
    if settings.exit is None:
        return exits.full
    if settings.exit not in exits.layers:
        raise ConfigError(
            f"--exit {settings.exit} is not an exit of {checkpoint.name}: "
            f"choose one of {', '.join(map(str, exits.layers))}.",
            param="exit",
        )
    return settings.exit


def _num_lines(path: Path) -> int:
    """Rows written so far; a last line cut short by a kill is removed."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.count(b"\n")


def _answer_all(
    llm: LLM,
    messages: Sequence[str],
    settings: SelfdataSettings,
    budget: Budget,
    seed: int,
    file: IO[str],
) -> None:
    """Write one row per message, so that a killed run can count them.

    The answer is empty, and skipped in training, where there is no prompt or one too long, or
    the answer was cut (it would teach to stop in the middle) or went around in circles. With
    ``--keep-all`` the latter are kept, with the ``finish_reason`` that tells training that they
    are the model's own words.
    """
    prompts = [llm.chat_prompt([{"role": "user", "content": message}]) for message in messages]
    longest = min(settings.max_prompt_tokens, llm.max_model_len - 1)
    chosen = [i for i, prompt in enumerate(prompts) if messages[i] and len(prompt) <= longest]
    asked = [prompts[i] for i in chosen]
    sampling = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        seed=seed,
    )
    samplings = sampling_for(llm, asked, sampling)
    results = llm.generate(asked, samplings, budget=budget, progress=False)
    rows: list[dict[str, Any]] = [{"instruction": m, "input": "", "output": ""} for m in messages]
    for i, result in zip(chosen, results, strict=True):
        row, answer = rows[i], result.outputs[0]
        if settings.keep_all:
            row |= {"output": answer.text, "finish_reason": answer.finish_reason.value}
        elif is_sound(answer, max_repetition=settings.max_repetition):
            row["output"] = answer.text
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
