"""What the pages of documentation tell people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

__all__ = ["PAGES", "ROOT", "fenced", "inline_commands", "typed_commands"]

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/*.md",
        "docker/*.md",
        "checkpoints/**/*.md",
        "benchmarks/*.md",
        "deploy/**/*.md",
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md", "log.md")  # these tell of other versions
)


def fenced(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages; "" for those without one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def typed_commands(page: str, *programs: str) -> list[list[str]]:
    """The words of each command line that begins with one of some programs.

    Continued lines are one; what stands before the program (``echo ... |``, ``.venv/bin/``), the
    ``&`` behind it, comments and optional parts in brackets are left out.
    """
    commands = []
    for block in fenced(page, "", "sh", "bash"):
        begun = ""
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            try:
                words = shlex.split(f"{begun}{line}", comments=True)
            except ValueError:  # a quotation that goes on in the next line
                begun += f"{line}\n"
                continue
            begun = ""
            words = _plain(words)
            if words and words[0].rpartition("/")[2] in programs:
                commands.append([words[0].rpartition("/")[2], *words[1:]])
    return commands


def _plain(words: list[str]) -> list[str]:
    """The last program of a line, with its own words alone."""
    if words[:1] == ["eval"]:
        words = words[1].removeprefix("$(").removesuffix(")").split()
    if "|" in words:
        words = words[len(words) - words[::-1].index("|") :]
    text = " ".join(words)
    if re.search(r"\[(?:[A-Z]+|--[^\]]*)\]", text):
        words = re.sub(r"\[(?:[A-Z]+|--[^\]]*)\]", "", text).split()
    return [word for word in words if word != "&"]


def inline_commands(page: str) -> list[list[str]]:
    """The words of each `sortserve COMMAND ...` within a sentence."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    return [found.split() for found in re.findall(r"`sortserve ([a-z][^`\n]*)`", text)]
