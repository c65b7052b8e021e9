"""Carry out a Dockerfile without Docker: each stage is a folder, each RUN a chroot into it.

builder = ImageBuilder(repository, scratch, bases={"debian:12.11-slim": root})
image = builder.build(read_dockerfile(path), "runtime")

It needs root, for chroot and mounts. What this machine needs to reach its package registries is
bound over the folders while a step runs, and is in no image (``PassThrough``). A stage whose steps
and files are those of an earlier run is taken from ``scratch``.

Not told apart here: layers. A stage is copied whole where another is built on it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from support.dockerfiles import Config, Dockerfile, Stage, Step, expand

__all__ = ["Image", "ImageBuilder", "PassThrough", "debian_root"]


@dataclass(frozen=True)
class Image:
    """A file system, and what is to be run in it."""

    root: Path
    config: Config
    key: str
    """Stands for all that it was made from."""


@dataclass(frozen=True)
class PassThrough:
    """What a step sees of this machine beside its own files."""

    env: dict[str, str] = field(default_factory=dict)
    binds: tuple[tuple[Path, Path], ...] = ()
    """Pairs of a path here and the path where a step sees it, read-only."""

    @classmethod
    def of_this_machine(cls) -> PassThrough:
        """Name resolution, certificates, and the settings of apt, pip and uv.

        Files and folders that a variable names are seen under ``/run/host``, out of every package's
        way.
        """
        env = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "UV_")) or name == "SSL_CERT_FILE"
        }
        if links := env.get("PIP_FIND_LINKS"):
            env.setdefault("UV_FIND_LINKS", links)
        if index := env.get("PIP_INDEX_URL"):
            env.setdefault("UV_DEFAULT_INDEX", index)
        binds = {path: path for path in map(Path, ("/etc/resolv.conf", "/etc/hosts"))}
        for path in Path("/etc/apt/apt.conf.d").glob("*"):
            if "Acquire::" in path.read_text("utf-8"):
                binds[path] = path
        for name, value in env.items():
            if value.startswith("/") and Path(value).exists():
                seen = Path("/run/host") / value.strip("/").replace("/", "-")
                binds[Path(value)] = seen
                env[name] = str(seen)
        return cls(env, tuple((path, seen) for path, seen in binds.items() if path.exists()))


def debian_root(folder: Path, suite: str = "bookworm") -> Path:
    """A root of Debian's packages of priority "required", as the slim images have them."""
    if not (folder / "etc" / "debian_version").exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        mirror = _mirror()
        command = ["debootstrap", "--variant=minbase", suite, str(partial), *mirror]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        partial.rename(folder)
    return folder


def _mirror() -> list[str]:
    """The archive that this machine's apt asks, if it is told; debootstrap has a default."""
    for path in Path("/etc/apt/sources.list.d").glob("*.sources"):
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("URIs:") and line.split()[1].rstrip("/").endswith("debian"):
                return [line.split()[1]]
    return []


class ImageBuilder:
    """Builds stages, each once.

    Args:
        context: what COPY copies from, less what ``IGNORED`` names.
        scratch: a folder for stages and caches, kept by who wants the next run to be quick.
        bases: a root for each image that a stage may be built on. It is not changed.
        pass_through: of this machine.
    """

    def __init__(
        self,
        context: Path,
        scratch: Path,
        bases: Mapping[str, Path],
        pass_through: PassThrough | None = None,
    ) -> None:
        self._context = context
        self._scratch = scratch
        self._bases = bases
        self._pass_through = pass_through or PassThrough.of_this_machine()

    def build(self, dockerfile: Dockerfile, target: str) -> Image:
        """The image of a stage, and before it of all that it needs.

        Raises:
            RuntimeError: a step failed; its output is in the message.
        """
        built: dict[str, Image] = {}
        for stage in self._needed(dockerfile, target):
            built[stage.name] = self._build_stage(dockerfile, stage, built)
        return built[target]

    def _needed(self, dockerfile: Dockerfile, target: str) -> list[Stage]:
        wanted = {target}
        for stage in reversed(dockerfile.stages):
            if stage.name in wanted:
                wanted.add(stage.base)
                wanted |= {step.flag("from") or "" for step in stage.steps}
        return [stage for stage in dockerfile.stages if stage.name in wanted]

    def _build_stage(
        self, dockerfile: Dockerfile, stage: Stage, built: Mapping[str, Image]
    ) -> Image:
        below = built.get(stage.base)
        if below and not stage.steps:
            return below
        base = below.root if below else self._bases[stage.base]
        config = below.config.copy() if below else Config()
        key = self._key(dockerfile, stage, built, below.key if below else str(base))
        root = self._scratch / f"{stage.name}-{key[:16]}"
        done = root.with_name(f"{root.name}.done")
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(root)], check=True)
        for step in stage.steps:
            if step.name == "RUN":
                if not done.exists():
                    self._run(root, config, step)
            elif step.name == "COPY":
                if not done.exists():
                    self._copy(root, config, step, built)
            else:
                config.apply(step, dockerfile.build_args)
                if step.name == "WORKDIR":
                    inside(root, config.workdir).mkdir(parents=True, exist_ok=True)
        done.touch()
        return Image(root, config, key)

    def _key(
        self, dockerfile: Dockerfile, stage: Stage, built: Mapping[str, Image], base: str
    ) -> str:
        digest = hashlib.sha256(f"{base}{sorted(dockerfile.build_args.items())}".encode())
        for step in stage.steps:
            digest.update(repr(step).encode())
            source = step.flag("from")
            if source:
                digest.update(built[source].key.encode())
            elif step.name == "COPY":
                for word in step.rest.split()[:-1]:
                    for path in self._files(self._context / word):
                        digest.update(str(path).encode() + path.read_bytes())
        return digest.hexdigest()

    # ---- COPY

    def _copy(self, root: Path, config: Config, step: Step, built: Mapping[str, Image]) -> None:
        """Of a folder the content is copied, as Docker does."""
        *sources, target = expand(step.rest, {**config.args, **config.env}).split()
        stage = step.flag("from")
        folder = inside(root, target, config.workdir)
        for source in sources:
            from_path = inside(built[stage].root, source) if stage else self._context / source
            into_folder = target.endswith("/") and not from_path.is_dir()
            to_path = folder / from_path.name if into_folder else folder
            to_path.parent.mkdir(parents=True, exist_ok=True)
            if stage:
                subprocess.run(["cp", "-aT", "--reflink=auto", from_path, to_path], check=True)
            else:
                for path in self._files(from_path):
                    one = to_path / path.relative_to(from_path) if from_path.is_dir() else to_path
                    one.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, one)

    def _files(self, path: Path) -> Iterator[Path]:
        """Files of the context, in order, but for those that the ignore files name."""
        if path.is_file():
            yield path
        elif not any(fnmatch(path.name, pattern) for pattern in IGNORED):
            for child in sorted(path.iterdir()):
                if not any(fnmatch(child.name, pattern) for pattern in IGNORED):
                    yield from self._files(child)

    # ---- RUN

    def _run(self, root: Path, config: Config, step: Step) -> None:
        values = {**self._pass_through.env, **config.args, **config.env, "HOME": "/root"}
        binds = list(self._pass_through.binds)
        for name, value in step.flags:
            options = dict(part.split("=", 1) for part in value.split(","))
            if name != "mount" or options["type"] != "cache":
                raise ValueError(f"RUN --{name}={value} is not known here")
            cache = self._scratch / "caches" / options["target"].strip("/").replace("/", "-")
            cache.mkdir(parents=True, exist_ok=True)
            binds.append((cache, Path(options["target"])))
        with mount_points(root, binds):
            script = [
                "set -e",
                "mount --make-rprivate /",
                f"mount -t proc proc {root}/proc",
                f"mount --rbind /dev {root}/dev",
                *(f"mount --rbind {source} {root}{target}" for source, target in binds),
                *(f"mount -o remount,bind,ro {root}{seen}" for _, seen in self._pass_through.binds),
                chroot_command(root, config, values, ["/bin/sh", "-c", step.rest]),
            ]
            done = subprocess.run(
                ["unshare", *_SPACES, "sh", "-c", "\n".join(script)],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise RuntimeError(f"RUN {step.rest}\nended with {done.returncode}:\n{said}")


_SPACES = ("--mount", "--pid", "--fork", "--kill-child")
IGNORED = ("__pycache__", "*.egg-info", "*.so")
"""Names that the ``.dockerignore`` files leave out, at any depth; a test compares them."""


def inside(root: Path, path: str, workdir: str = "/") -> Path:
    """Where a path of a stage lies on this machine."""
    return root / os.path.normpath(os.path.join(workdir, path)).lstrip("/")


@contextmanager
def mount_points(root: Path, binds: Sequence[tuple[Path, Path]]) -> Iterator[None]:
    """Files and folders to mount over, which are gone afterwards unless they were there before."""
    made: list[Path] = []
    for source, target in binds:
        place = root / str(target).lstrip("/")
        missing = [folder for folder in place.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        if not place.exists() and not place.is_symlink():
            place.mkdir() if source.is_dir() else place.touch()
            made.append(place)
    try:
        yield
    finally:
        for place in reversed(made):
            if not place.is_dir():
                place.unlink()
            elif not any(place.iterdir()):
                place.rmdir()


def chroot_command(
    root: Path, config: Config, values: Mapping[str, str], command: Sequence[str]
) -> str:
    """A line of shell that becomes ``command`` in a root, as a user without any privileges.

    root keeps its privileges: apt needs them.
    """
    user, _, group = config.user.partition(":")
    words = ["exec", "chroot", str(root)]
    if user != "0":
        words += ["setpriv", f"--reuid={user}", f"--regid={group or user}", "--clear-groups"]
        words += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    words += ["env", "-i", f"--chdir={config.workdir}"]
    words += [f"{name}={value}" for name, value in values.items()]
    return shlex.join([*words, *command])
