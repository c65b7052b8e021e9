"""Whatever is given for a setting, by flag, variable or file: a setting, or one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sortserve.cli import main
from sortserve.core.budget import Budget, OnMiss
from sortserve.core.errors import ConfigError
from sortserve.core.weights import KeyWeights, WeightRules
from sortserve.process.config import ServeSettings, load_settings
from sortserve.process.console import MAX_LINE
from sortserve.process.sources import MAX_FILE_BYTES

FIELDS = sorted(ServeSettings.model_fields)
TEXTS = [
    *(
        "",
        " ",
        ",",
        ",,",
        "0",
        "-1",
        "1",
        "2",
        "true",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e3",
        "0x10",
    ),
    *("1_000", "٣", "9" * 30, "9" * 401, "9" * 5000, "-" + "9" * 401, str(2**63), "1.5", "1e-400"),
    *(
        "9EiB",
        "-1GiB",
        "1 XiB",
        "1" * 400 + "GiB",
        "é",
        "東京",
        "a\nb",
        "\x1b[2J",
        "\u2028",
        "\udcff",
    ),
    *(
        "x" * 100_000,
        "/",
        "/dev/null",
        "/dev/zero",
        "..",
        "/no/such",
        "~",
        "a" * 300,
        "[1, 2]",
        "{}",
    ),
]
VALUES: list[Any] = [
    *(True, False, 0, -1, 10**12, 10**400, 1.5, float("nan"), float("inf"), 1e300),
    *([], {}, [[]], [{}], {"a": {"b": 1}}, [None], [1, "a"], "\0", "a\0b", b"bytes"),
    [[[[[[[[[[1]]]]]]]]]],
    list(range(100)),
]


def some_texts(field: str) -> list[str]:
    """A quarter of TEXTS, another for each field beside: a flag gets them all.

    What a text means does not depend on where it comes from, once it has been read.
    """
    return TEXTS[FIELDS.index(field) % 4 :: 4]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("SORTSERVE_"):
            monkeypatch.delenv(variable)


def check(load: Callable[[], ServeSettings], field: str) -> None:
    """Accepts a setting that can be printed, or one line that names the setting."""
    message = refusal(load)
    if message is not None:
        assert message.strip()
        assert len(message) < MAX_LINE
        assert "\n" not in message
        assert field.replace("_", "-") in message.lower().replace("_", "-")


def refusal(load: Callable[[], ServeSettings]) -> str | None:
    """What is said against the settings; None if they can be used."""
    try:
        settings = load()
    except ConfigError as error:
        return error.message
    return None if settings.masked() and settings.api_keys is not None else "masked() is empty"


@pytest.mark.parametrize("field", FIELDS)
def test_any_text_as_a_flag_is_a_setting_or_one_line(field: str) -> None:
    for text in [*TEXTS, "a\0b"]:
        flags: dict[str, Any] = {field: [text] if field in ("exits", "api_key") else text}
        check(lambda flags=flags: load_settings(flags), field)  # type: ignore[misc]


@pytest.mark.parametrize("field", FIELDS)
def test_any_text_as_a_variable_is_a_setting_or_one_line(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in some_texts(field):
        monkeypatch.setenv(f"SORTSERVE_{field.upper()}", text)
        check(load_settings, field)


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "config"])
def test_any_value_in_a_file_is_a_setting_or_one_line(field: str, tmp_path: Path) -> None:
    texts = [text for text in some_texts(field) if len(text) < 500]
    for i, value in enumerate([*VALUES, *texts]):
        file = tmp_path / f"{i}.yaml"
        file.write_text(yaml.safe_dump({field: value}), encoding="utf-8", errors="surrogateescape")
        check(lambda file=file: load_settings({"config": str(file)}), field)  # type: ignore[misc]


@given(st.sampled_from(FIELDS), st.text(st.characters(), max_size=40))
def test_arbitrary_text_is_a_setting_or_one_line(field: str, text: str) -> None:
    flags: dict[str, Any] = {field: [text] if field in ("exits", "api_key") else text}

    check(lambda: load_settings(flags), field)


@pytest.mark.parametrize(
    "text",
    [
        "port: &a [*a]\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nport: &c [*b, *b]\n",
        "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 9)}]\n" for i in range(30))
        + "port: *k29\n",
        f"port: {'[' * 20_000}\n",
        f"port: {'9' * 5000}\n",
        "port: 2024-13-45\n",
        "port: 1:99:99\n",
        "port: !!int x\n",
        "port: !!python/object/apply:os.system [ls]\n",
        "? [a]\n: b\n",
        "? {a: b}\n: c\n",
        "port: \0\n",
        "\ud7ff\ufffe: 1\n",
        "- a\n---\n- b\n",
        "port: 1\n---\nport: 2\n",
        "%YAML 9.9\n---\nport: 1\n",
        "port: '\n",
        "\t",
        ": : :",
        "null: 1\n",
        "1: 1\n",
        "port: .inf\nseed: .nan\n",
        "port: 0o777777777777\n",
        "<<: 1\n",
        "port: *nobody\n",
    ],
    ids=range(25),
)
def test_any_file_is_a_configuration_or_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError) as caught:
        load_settings({"config": str(file)})

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < MAX_LINE


@pytest.mark.parametrize(
    "text",
    [
        "api-key: [sk-secret\n",
        "api-key: sk-secret: x\n",
        "api-key: {a: sk-secret}\n",
        "api-key: 'sk-secret\n",
        "api-key: sk-secret\n\tport: 1\n",
        'api-key: "sk-secret\\x07"\n',
    ],
)
def test_a_wrong_file_of_settings_does_not_show_its_keys(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_settings({"config": str(file)})

    assert "sk-secret" not in caught.value.message


# Files that a flag names.

FILE_FLAGS = ("config", "api_key_file", "ssl_certfile", "ssl_keyfile")


def name_file(field: str, path: Path, tmp_path: Path) -> dict[str, Any]:
    """Flags that name ``path``; TLS files come in pairs."""
    other = {"ssl_certfile": "ssl_keyfile", "ssl_keyfile": "ssl_certfile"}.get(field)
    flags = {field: str(path)}
    if other is not None:
        (tmp_path / "other").write_text("x")
        flags[other] = str(tmp_path / "other")
    return flags


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


def make_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_nothing(path: Path) -> None:
    pass


def make_binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("field", FILE_FLAGS)
@pytest.mark.parametrize(
    "make",
    [
        make_fifo,
        make_socket,
        make_huge,
        make_link_to_zeros,
        make_loop,
        make_nothing,
        Path.mkdir,
    ],
)
def test_a_file_that_is_none_is_one_line_and_exit_code_2(
    field: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f"
    make(path)
    flags = name_file(field, path, tmp_path)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]

    assert main(["serve", *arguments, "--print-config"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{field.replace('_', '-')} {path}" in line


@pytest.mark.parametrize("field", ["config", "api_key_file"])
def test_a_file_that_is_no_text_is_refused(field: str, tmp_path: Path) -> None:
    make_binary(tmp_path / "f")

    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings({field: str(tmp_path / "f")})


def test_the_key_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("first\n")
    settings = load_settings({"api_key_file": str(path)})
    path.unlink()

    assert settings.api_keys == ("first",)


# Bounds that are stated.


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_model_len", "1"),
        ("num_threads", "1000000"),
        ("num_threads", "1025"),
        ("num_threads", "0"),
        ("max_num_seqs", str(2**31)),
        ("block_size", "0"),
        ("kv_cache_memory", "0"),
        ("request_timeout", "inf"),
        ("shutdown_timeout", "1e300"),
        ("overload_delay", "nan"),
        ("min_quality", "1.1"),
        ("min_quality", "-0.1"),
        ("tier_weights", "gold=1"),
        ("tier_weights", "flex"),
        ("tier_weights", "flex=0"),
        ("tier_weights", "flex=nan"),
        ("tier_weights", "flex=1001"),
        ("tier_weights", "flex=1,flex=2"),
        ("priority_base", "0.9"),
        ("priority_base", "inf"),
        ("default_budget", "fast"),
        ("default_budget", "[0.8]"),
        ("default_budget", '{"min_quality": 2}'),
        ("default_budget", '{"speed": 2}'),
        ("seed", str(2**63)),
        ("exits", "0"),
        ("exits", ","),
        ("host", ""),
        ("host", "a" * 64),
        ("uds", ""),
        ("config", ""),
        ("api_key_file", ""),
    ],
)
def test_a_value_out_of_bounds_is_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}"):
        load_settings({flag: value})


@pytest.mark.parametrize("name", ["num_threads", "max_model_len", "kv_cache_memory"])
def test_auto_is_the_default_from_wherever_it_comes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: auto\n")

    assert getattr(load_settings({"config": str(file)}), name) is None
    monkeypatch.setenv(f"SORTSERVE_{name.upper()}", "700")
    assert getattr(load_settings(), name) == 700
    assert getattr(load_settings({name: "auto"}), name) is None


@pytest.mark.parametrize(("flag", "yes"), [("max_num_seqs", "yes"), ("port", "true")])
def test_a_switch_is_no_number(flag: str, yes: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{flag}: {yes}\n")

    with pytest.raises(ConfigError, match="should be a number"):
        load_settings({"config": str(file)})


def test_a_default_budget_is_json_or_a_mapping_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("default-budget: {min_quality: 0.8, on_miss: truncate}\n")
    as_text = '{"min_quality": 0.8, "on_miss": "truncate"}'
    budget = Budget(min_quality=0.8, on_miss=OnMiss.TRUNCATE)

    assert load_settings({"config": str(file)}).budget_by_default == budget
    assert load_settings({"default_budget": as_text}).budget_by_default == budget
    assert load_settings({}).budget_by_default == Budget()


def test_a_default_budget_that_says_something_twice_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="min_quality is given twice"):
        load_settings({"default_budget": '{"min_quality": 0.8, "min_quality": 0.2}'})


def test_a_default_budget_that_is_none_is_told_what_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError, match=r"budget\.min_quality=2 .* a number from 0 to 1"):
        load_settings({"default_budget": '{"min_quality": 2}'})


# Weights.


def test_tiers_that_are_not_given_keep_their_weights(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tier-weights: {priority: 10}\n")

    for settings in (
        load_settings({"config": str(file)}),
        load_settings({"tier_weights": ["priority=10"]}),
    ):
        assert settings.weight_rules.tiers == {"flex": 0.25, "default": 1.0, "priority": 10.0}
    assert load_settings({}).weight_rules == WeightRules()


def test_a_key_may_have_a_default_and_a_greatest_weight(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\nplain\n\nbatch default=0.5 max=1\n  vip   max=8 \nplain\n")

    settings = load_settings({"api_key_file": str(file), "api_key": ["other", "batch"]})

    assert settings.api_keys == ("other", "batch", "plain", "vip")
    assert settings.key_weights == {
        "plain": KeyWeights(),
        "batch": KeyWeights(default=0.5, most=1.0),
        "vip": KeyWeights(most=8.0),
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("key-1 hunter2", "default=WEIGHT and max=WEIGHT"),
        ("key-1 min=3", "default=WEIGHT and max=WEIGHT"),
        ("key-1 max=much", "max should be a number from 0.001 to 1000"),
        ("key-1 max=0", "max should be a number from 0.001 to 1000"),
        ("key-1 default=nan", "default should be a number from 0.001 to 1000"),
        ("key-1 max=1 max=2", "max twice"),
        ("key-1 default=2 max=1", "default=2 is above max=1"),
        ("first max=2", "an earlier line gives other weights"),
        ("key\x07-1", "control characters"),
    ],
)
def test_a_wrong_line_of_the_key_file_is_named_by_its_number_and_never_quoted(
    line: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"first\n{line}\n")

    with pytest.raises(ConfigError) as error:
        load_settings({"api_key_file": str(file)})

    assert said in error.value.message
    assert "line 2" in error.value.message
    assert not any(secret in error.value.message for secret in ("key-1", "hunter2"))
