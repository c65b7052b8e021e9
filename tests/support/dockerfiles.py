"""Dockerfiles as data: stages, steps, and the variables of both filled in.

dockerfile = read_dockerfile(path, {"TORCH_BACKEND": ""})
dockerfile.stage("runtime").steps

Instructions are found by dockerfile-parse; what they mean is told here, for those that ours use.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Config", "Dockerfile", "Stage", "Step", "expand", "read_dockerfile"]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:(:[-+])([^}]*))?\})")
_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s+")


def expand(text: str, values: Mapping[str, str]) -> str:
    """``text`` with ``$X``, ``${X}``, ``${X:-default}`` and ``${X:+instead}`` filled in."""

    def value(match: re.Match[str]) -> str:
        plain, braced, mark, word = match.groups()
        found = values.get(plain or braced, "")
        if mark == ":-":
            return found or word
        if mark == ":+":
            return word if found else ""
        return found

    return _VARIABLE.sub(value, text)


@dataclass(frozen=True)
class Step:
    """One instruction; ``flags`` are ``--name=value``, several of a name as they may come."""

    name: str
    rest: str
    flags: tuple[tuple[str, str], ...] = ()

    def flag(self, name: str) -> str | None:
        """The value of a flag that comes once at most."""
        return dict(self.flags).get(name)

    def words(self) -> list[str]:
        """The exec form of a command: a JSON list of words.

        Raises:
            ValueError: it is in the shell form, which would wrap the command in a shell.
        """
        words: list[str] = json.loads(self.rest)
        return words


@dataclass
class Stage:
    """What stands between one ``FROM`` and the next."""

    name: str
    base: str
    """An image, or the name of a stage above."""
    steps: list[Step] = field(default_factory=list)


@dataclass
class Config:
    """What an image says of the container that is made of it."""

    env: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    args: dict[str, str] = field(default_factory=dict)
    """Variables of the build alone."""
    labels: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    health_command: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    exposed: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"

    def copy(self) -> Config:
        """For a stage that is built on this one."""
        kept = {key: type(value)(value) for key, value in vars(self).items()}
        return Config(**kept)

    def apply(self, step: Step, build_args: Mapping[str, str]) -> None:
        """Take up an instruction that changes no file.

        Raises:
            ValueError: an instruction that is not known here.
        """
        rest = expand(step.rest, {**self.args, **self.env})
        match step.name:
            case "ARG":
                name, _, default = rest.partition("=")
                self.args[name] = build_args.get(name, " ".join(shlex.split(default)))
            case "ENV":
                self.env |= _pairs(rest)
            case "LABEL":
                self.labels |= _pairs(rest)
            case "WORKDIR":
                self.workdir = rest
            case "USER":
                self.user = rest
            case "ENTRYPOINT":
                self.entrypoint = step.words()
            case "HEALTHCHECK":
                self.health_command = json.loads(rest.partition("CMD")[2])
            case "VOLUME":
                self.volumes += step.words()
            case "EXPOSE":
                self.exposed.append(rest)
            case "STOPSIGNAL":
                self.stop_signal = rest
            case _:
                raise ValueError(f"{step.name} is not known here: {step.rest}")


@dataclass
class Dockerfile:
    """All stages of a file, ``FROM`` filled in."""

    stages: list[Stage]
    build_args: dict[str, str]

    def stage(self, name: str) -> Stage:
        """The stage of a name.

        Raises:
            KeyError: there is none.
        """
        return {stage.name: stage for stage in self.stages}[name]

    def lineage(self, name: str) -> list[Stage]:
        """A stage after those that it is built on."""
        stage = self.stage(name)
        known = {other.name for other in self.stages}
        return [*(self.lineage(stage.base) if stage.base in known else ()), stage]

    def config(self, name: str) -> Config:
        """What the image of a stage says, without building it."""
        config = Config()
        for step in (step for stage in self.lineage(name) for step in stage.steps):
            if step.name not in ("RUN", "COPY"):
                config.apply(step, self.build_args)
        return config


def read_dockerfile(path: Path, build_args: Mapping[str, str] | None = None) -> Dockerfile:
    """Read a file; ``build_args`` are those of ``docker build --build-arg``."""
    from dockerfile_parse import DockerfileParser

    given = dict(build_args or {})
    parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()), env_replace=False)
    before: dict[str, str] = {}
    stages: list[Stage] = []
    for raw in parser.structure:
        step = _step(raw)
        if step.name == "COMMENT":
            continue
        if step.name == "FROM":
            image, *name = expand(step.rest, before).split()
            stages.append(Stage(name[1] if name else str(len(stages)), image))
        elif stages:
            stages[-1].steps.append(step)
        else:  # for FROM alone
            key, _, default = step.rest.partition("=")
            before[key] = given.get(key, default)
    return Dockerfile(stages, given)


def _step(raw: Mapping[str, Any]) -> Step:
    rest = str(raw["value"]).strip()
    flags = []
    while match := _FLAG.match(rest):
        flags.append((match[1], match[2]))
        rest = rest[match.end() :].lstrip()
    return Step(str(raw["instruction"]), rest, tuple(flags))


def _pairs(rest: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(rest))
