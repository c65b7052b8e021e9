"""Write demo.jsonl and demo-dev.jsonl: short questions of a few kinds that a run learns in minutes.

    python examples/data/make_demo.py

Made up for this repository, under its licence. Each fact is asked for in two ways; of every third
fact, the second way is held out in demo-dev.jsonl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

OPPOSITES = """hot:cold big:small up:down left:right day:night wet:dry fast:slow open:closed
full:empty old:new hard:soft early:late high:low light:dark long:short rich:poor"""
COLOURS = "grass:green snow:white coal:black blood:red butter:yellow chocolate:brown ink:blue"
PLURALS = """cat:cats child:children mouse:mice box:boxes city:cities foot:feet man:men leaf:leaves
dog:dogs tooth:teeth bus:buses baby:babies knife:knives tree:trees"""
CAPITALS = "France:Paris Italy:Rome Spain:Madrid Japan:Tokyo Egypt:Cairo Norway:Oslo Peru:Lima"
WORDS = "apple bread chair dance earth flower garden house island jungle kitten lamp moon nest"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday"
NUMBERS = "zero one two three four five six seven eight nine ten"


def facts() -> Iterator[tuple[str, str, list[list[str]]]]:
    """Two ways to ask for a kind of fact, and what is asked for with its answer."""
    texts = (OPPOSITES, COLOURS, PLURALS, CAPITALS)
    pairs = [[pair.split(":") for pair in text.split()] for text in texts]
    opposites, colours, plurals, capitals = pairs
    days = [list(pair) for pair in pairwise(DAYS.split())]
    names = NUMBERS.split()
    sums = [[f"{names[a]} plus {names[b]}", names[a + b]] for a in range(6) for b in range(6)]
    yield "What is the opposite of {}?", "Give the opposite.", opposites
    yield "{} is the opposite of what?", "Find the opposite.", [[b, a] for a, b in opposites]
    yield "Which colour is {}?", "Name the colour.", colours
    yield "What is the plural of {}?", "Write the plural.", plurals
    yield "What is the capital of {}?", "Name the capital.", capitals
    yield "Write {} in capital letters.", "Shout this.", [[w, w.upper()] for w in WORDS.split()]
    yield "Which day comes after {}?", "Name the next day.", days
    yield "Which day comes before {}?", "Name the day before.", [[b, a] for a, b in days]
    yield "What is {}?", "Add these numbers.", sums


def files() -> dict[str, list[dict[str, str]]]:
    """Rows by file: those to train on, and those held out."""
    rows: dict[str, list[dict[str, str]]] = {"demo.jsonl": [], "demo-dev.jsonl": []}
    for question, instruction, pairs in facts():
        for index, (given, output) in enumerate(pairs):
            row = {"instruction": question.format(given), "input": "", "output": output}
            other = {"instruction": instruction, "input": given, "output": output}
            rows["demo.jsonl"].append(row)
            rows["demo.jsonl" if index % 3 else "demo-dev.jsonl"].append(other)
    random.Random(0).shuffle(rows["demo.jsonl"])
    return rows


if __name__ == "__main__":
    for name, rows in files().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
