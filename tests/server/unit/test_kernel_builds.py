"""Where the C++ kernels come from: instruction sets, the cache, prebuilt ones, a compiler."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve.core.user_cache import user_cache_dir
from sortserve.model.backends.cpu import build, isa, library
from sortserve.model.backends.cpu.build import BuildError, build_library, find_library, prebuild
from sortserve.model.backends.cpu.isa import ISA_VARIABLE, ISAS, Isa, forced_isa, runnable_isas
from sortserve.model.backends.cpu.library import NativeLibrary, load_native
from sortserve.model.backends.kernels import KERNELS_DIR_VARIABLE, cpu_isa

PORTABLE = ISAS["portable"]
OLD = Isa("avx2", ("-mavx2",), frozenset({"avx2"}))
"""Never compiled in earnest here."""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No instance is forced, none is prebuilt, and what is loaded here is forgotten afterwards."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    monkeypatch.setenv(KERNELS_DIR_VARIABLE, str(tmp_path / "prebuilt"))
    library._load_fastest.cache_clear()
    yield
    library._load_fastest.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that keeps what it was asked, and whose library is one line."""
    return make_compiler(tmp_path, 'echo "$*" >> "$0.log"; echo library > "$out"\n')


def make_compiler(tmp_path: Path, body: str) -> str:
    """A compiler that prints its version and otherwise runs ``body``, the output path in $out."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo 1.0\nfor out; do :; done\n' + body
    )
    compiler.chmod(0o755)
    return str(compiler)


def runs_of(compiler: str) -> list[str]:
    log = Path(f"{compiler}.log")
    return log.read_text().splitlines() if log.exists() else []


def only_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """A CPU of this kind of machine that has these flags alone."""
    monkeypatch.setattr(isa, "_cpu_flags", lambda: frozenset(flags))


# ---- the choice of an instruction set


def test_the_fastest_that_the_processor_has_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    only_flags(monkeypatch, "sse2")
    assert [isa.name for isa in runnable_isas()] == ["portable"]
    only_flags(monkeypatch, "sse2", "avx2", "fma", "f16c")
    assert [isa.name for isa in runnable_isas()] == ["avx2", "portable"]
    only_flags(monkeypatch, *ISAS["avx512_bf16"].cpu_flags)
    assert [isa.name for isa in runnable_isas()] == ["avx512_bf16", "avx2", "portable"]


def test_on_another_kind_of_machine_there_is_the_portable_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert [isa.name for isa in runnable_isas()] == ["portable"]
    monkeypatch.setenv(ISA_VARIABLE, "avx2")
    with pytest.raises(ConfigError, match=r"which is of kind aarch64\. Here it may be portable\."):
        forced_isa()


def test_an_instruction_set_can_be_forced_and_empty_is_unset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert forced_isa() is None
    monkeypatch.setenv(ISA_VARIABLE, "")
    assert forced_isa() is None
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    assert forced_isa() == PORTABLE


def test_one_that_this_processor_cannot_run_is_refused_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    only_flags(monkeypatch, "avx2", "fma")
    monkeypatch.setenv(ISA_VARIABLE, "avx2")
    with pytest.raises(
        ConfigError, match=r"which lacks f16c\. Here it may be portable\."
    ) as caught:
        load_native()
    assert caught.value.param == ISA_VARIABLE


def test_one_that_does_not_exist_ends_a_server_with_the_code_of_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    assert main(["serve", "--device", "cpu"]) == 2
    assert "SORTSERVE_CPU_ISA='sse9' is no instruction set" in capsys.readouterr().err


def test_a_forced_one_that_cannot_be_compiled_is_a_mistake_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(isa: Isa) -> Path:
        raise BuildError("no compiler today")

    monkeypatch.setattr(library, "find_library", fail)
    monkeypatch.setattr(library, "load_instance", library.load_instance.__wrapped__)
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    with pytest.raises(ConfigError, match="'portable': there are no kernels for it: no compiler"):
        load_native()


def test_where_the_fastest_cannot_be_had_the_next_is_taken_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    too_new = Isa("too_new")
    monkeypatch.setattr(library, "runnable_isas", lambda: [too_new, PORTABLE])
    load = library.load_instance

    def load_all_but_one(isa: Isa) -> NativeLibrary:
        if isa is too_new:
            raise BuildError("g++ failed: unrecognized option")
        return load(isa)

    if not shutil.which("g++"):
        pytest.skip("no compiler")
    monkeypatch.setattr(library, "load_instance", load_all_but_one)
    with caplog.at_level(logging.WARNING, logger="sortserve"):
        assert cpu_isa() == cpu_isa() == "portable"
    assert [record.getMessage() for record in caplog.records] == [
        "CPU kernels for too_new are not used: g++ failed: unrecognized option"
    ]


def test_where_none_can_be_had_the_log_says_once_that_plain_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(isa: Isa) -> NativeLibrary:
        raise BuildError("no compiler today")

    monkeypatch.setattr(library, "load_instance", fail)
    with caplog.at_level(logging.WARNING, logger="sortserve"):
        assert cpu_isa() is None
        assert load_native() is None
    assert [record.getMessage() for record in caplog.records] == [
        "native CPU kernels are off, plain torch is used: no compiler today"
    ]


# ---- the cache


def test_a_second_build_takes_the_library_from_the_cache(tmp_path: Path, compiler: str) -> None:
    cache = tmp_path / "cache"
    path = build_library(PORTABLE, cache, compiler)
    assert build_library(PORTABLE, cache, compiler) == path
    assert path.read_text() == "library\n"
    assert list(cache.iterdir()) == [path]
    assert len(runs_of(compiler)) == 1


def test_each_instruction_set_has_a_library_of_its_own(tmp_path: Path, compiler: str) -> None:
    cache = tmp_path / "cache"
    paths = {build_library(isa, cache, compiler) for isa in (PORTABLE, OLD)}
    assert set(cache.iterdir()) == paths
    assert len(paths) == 2
    assert ["-mavx2" in run for run in runs_of(compiler)] == [False, True]
    assert not any("-march=native" in run for run in runs_of(compiler))


def test_libraries_that_were_not_used_for_longest_make_room_for_a_new_one(
    tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", "16B")  # two libraries of this compiler
    old, older = (tmp_path / f"kernels-avx2-{name}.so" for name in ("old", "older"))
    for path, seconds in ((old, 2000), (older, 1000)):
        path.write_text("library\n")
        os.utime(path, (seconds, seconds))
    new = build_library(PORTABLE, tmp_path, compiler)
    assert set(tmp_path.glob("kernels-*.so")) == {old, new}


def test_a_library_stays_while_it_is_used_even_if_the_cache_has_no_room_for_it(
    tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", "1B")
    paths = {build_library(isa, tmp_path, compiler) for isa in (PORTABLE, OLD)}
    assert set(tmp_path.glob("kernels-*.so")) == paths


def test_a_compiler_that_fails_is_a_build_error_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path, "echo 'x.cpp:1: error: out of ideas' >&2\nexit 1\n")
    cache = tmp_path / "cache"
    with pytest.raises(BuildError, match="out of ideas"):
        build_library(PORTABLE, cache, compiler)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_no_library_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_text("nonsense")
    with pytest.raises(BuildError, match=r"cannot load .*kernels\.so"):
        NativeLibrary(path, PORTABLE)


def test_without_a_compiler_the_message_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"g\+\+"):
        build_library(PORTABLE, tmp_path)


def test_the_cache_folder_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "ours"))
    assert user_cache_dir() == tmp_path / "ours"
    monkeypatch.delenv("SORTSERVE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "sortserve"


# ---- prebuilt


def test_what_was_compiled_ahead_of_time_is_found_without_a_compiler(
    tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prebuild(PORTABLE, tmp_path / "prebuilt", compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find_library(PORTABLE) == path
    with pytest.raises(BuildError, match="no C"):
        find_library(OLD)


@pytest.mark.parametrize("damage", ["content", "sources"])
def test_prebuilt_kernels_that_are_damaged_or_stale_are_not_used_and_the_log_says_what_to_do(
    tmp_path: Path,
    compiler: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "prebuilt"
    path = prebuild(PORTABLE, folder, compiler)
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler)
    if damage == "content":
        path.write_text("cut")
    else:
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-Dnew"))
    assert find_library(PORTABLE).parent == tmp_path / "cache"
    assert f"the prebuilt portable kernels in {folder} are damaged or of another" in caplog.text
    assert "run `sortserve kernels` again" in caplog.text

    again = prebuild(PORTABLE, folder, compiler)
    assert list(folder.iterdir()) == [again]
    assert find_library(PORTABLE) == again


def test_the_command_says_where_the_kernels_lie_and_what_names_them_to_the_server(
    tmp_path: Path,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", compiler)
    output = tmp_path / "elsewhere"
    assert main(["kernels", "--isa", "portable", "--output", str(output)]) == 0
    (path,) = output.iterdir()
    assert capsys.readouterr().out.splitlines() == [
        f"portable: {path}",
        f"The server finds them with {KERNELS_DIR_VARIABLE}={output}",
    ]
    monkeypatch.setenv(KERNELS_DIR_VARIABLE, str(output))
    assert find_library(PORTABLE) == path


def test_the_command_compiles_all_that_this_kind_of_machine_has_unless_told(
    compiler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    only_flags(monkeypatch)  # the machine that makes an image need not be able to run it
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(ISAS)
    assert len(list((tmp_path / "prebuilt").iterdir())) == len(ISAS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--isa", "sse9"], "--isa sse9 is no instruction set; here it may be all, portable."),
        (["--isa", "avx2"], "--isa avx2 is of another kind of machine"),
        (["--output", "/dev/null/x"], "/dev/null/x cannot be written: Not a directory."),
        (["--isa"], "argument --isa: expected at least one argument"),
    ],
)
def test_mistakes_on_the_command_line_are_told_and_have_their_code(
    arguments: list[str],
    message: str,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_compiler_that_fails_is_told_with_the_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", make_compiler(tmp_path, "echo 'error: too old' >&2\nexit 1\n"))
    assert main(["kernels", "--isa", "portable"]) == 2
    assert "--isa portable: " in (error := capsys.readouterr().err)
    assert "failed: error: too old" in error


# ---- loading
