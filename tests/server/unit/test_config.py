"""Settings: where a value comes from, and what is said of a wrong one."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sortserve.core.errors import ConfigError
from sortserve.process.config import ServeSettings, load_settings, settings_yaml
from sortserve.process.flags import GROUPS, add_flags, configuration_markdown
from sortserve.process.sources import FOREIGN_VARIABLES
from sortserve.scheduling.policies.table import POLICIES

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("SORTSERVE_"):
            monkeypatch.delenv(variable)


def write(path: Path, text: str) -> Path:
    file = path / "config.yaml"
    file.write_text(text)
    return file


def parse(*arguments: str) -> dict[str, Any]:
    parser = ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def message_of(flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    return caught.value.message


# Precedence


def test_nothing_given_means_the_defaults() -> None:
    settings = load_settings()

    assert settings.model == "sorted-smollm2-135m"
    assert (settings.host, settings.port, settings.policy) == ("127.0.0.1", 8000, "deadline")
    assert settings.max_body_size == 4 * 2**20


def test_the_file_wins_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 9001\nmax_num_seqs: 3\n")

    settings = load_settings({"config": str(file)})

    assert (settings.port, settings.max_num_seqs) == (9001, 3)


def test_the_environment_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_PORT", "9002")
    file = write(tmp_path, "port: 9001\nmax-num-seqs: 3\n")

    settings = load_settings({"config": str(file)})

    assert (settings.port, settings.max_num_seqs) == (9002, 3)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_PORT", "9002")

    assert load_settings(parse("--port", "9003")).port == 9003


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 9001\nmodel: from-file\n")

    settings = load_settings(parse("from-flag", "--port=9003", "--config", str(file)))

    assert (settings.port, settings.model) == (9003, "from-flag")


def test_the_environment_wins_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_POLICY", "lockstep")

    assert load_settings().policy == "lockstep"


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_CONFIG", str(write(tmp_path, "port: 9001\n")))

    assert load_settings().port == 9001


def test_null_in_the_file_and_an_empty_variable_count_as_unset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_POLICY", "")

    settings = load_settings({"config": str(write(tmp_path, "port:\n"))})

    assert (settings.port, settings.policy) == (8000, "deadline")


# Values


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("2GiB", 2**31), ("512 MiB", 2**29), ("1MB", 10**6), ("4096", 4096)]
)
def test_sizes_are_written_for_people(text: str, num_bytes: int) -> None:
    assert load_settings({"kv_cache_memory": text}).kv_cache_memory == num_bytes


def test_lists_are_the_same_from_flags_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_flags = load_settings(parse("--exits", "9,18", "--exits", "30")).exits
    from_file = load_settings({"config": str(write(tmp_path, "exits: [9, 18, 30]\n"))}).exits
    monkeypatch.setenv("SORTSERVE_EXITS", "9, 18, 30")

    assert from_flags == from_file == load_settings().exits == (9, 18, 30)


def test_switches_have_an_off_flag() -> None:
    assert load_settings(parse("--no-enable-prefix-caching")).enable_prefix_caching is False
    assert load_settings(parse("--log-prompts")).log_prompts is True


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = load_settings()

    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


def test_keys_come_from_the_environment_and_the_key_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("# the team's\nthird\n\nfirst\n")
    monkeypatch.setenv("SORTSERVE_API_KEY", "first,second")

    settings = load_settings({"api_key_file": str(key_file)})

    assert settings.api_keys == ("first", "second", "third")


def test_secrets_are_never_shown() -> None:
    settings = load_settings({"api_key": ["hunter2"], "port": 0})

    assert "hunter2" not in repr(settings) + str(settings.masked()) + settings_yaml(settings)
    assert "hunter2" not in message_of({"api_key": {"a": "hunter2"}})


def test_the_printed_configuration_can_be_served_from(tmp_path: Path) -> None:
    settings = load_settings({"exits": "9,30", "kv_cache_memory": "2GiB", "port": "9"})

    again = load_settings({"config": str(write(tmp_path, settings_yaml(settings)))})

    assert again.model_copy(update={"config": None}) == settings


# Mistakes


def test_an_unknown_key_is_refused_with_the_closest_match(tmp_path: Path) -> None:
    file = write(tmp_path, "max-num-seq: 3\n")

    assert message_of({"config": str(file)}) == (
        f"unknown key 'max-num-seq' in {file}: did you mean 'max-num-seqs'?"
    )


def test_an_unknown_variable_is_refused_with_the_closest_match(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SORTSERVE_PROT", "1")

    assert message_of() == (
        "environment variable SORTSERVE_PROT is not a setting: did you mean 'SORTSERVE_PORT'?"
    )


@pytest.mark.parametrize("service", ["SORTSERVE", "SORTSERVE_PROD", "SORTSERVE_2_CANARY"])
def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "tcp://10.0.0.1:8000"
    for name, value in {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "PORT": address,
        "PORT_8000_TCP": address,
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(f"{service}_{name}", value)

    assert load_settings().port == 8000


@pytest.mark.parametrize("variable", sorted(FOREIGN_VARIABLES))
def test_variables_of_other_parts_are_no_mistake_and_are_documented(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "somewhere")

    assert load_settings() is not None
    assert f"`{variable}`" in configuration_markdown()


def test_a_wrong_flag_is_named_with_its_value_and_what_is_allowed() -> None:
    assert message_of(parse("--port", "99999")) == (
        "--port: '99999' is not allowed: it should be less than or equal to 65535."
    )
    assert message_of(parse("--policy", "edf")) == (
        "--policy: 'edf' is not allowed: it should be 'deadline', 'fair' or 'lockstep'."
    )


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_MAX_NUM_SEQS", "0")

    assert message_of().startswith("environment variable SORTSERVE_MAX_NUM_SEQS: '0' is not")


def test_a_wrong_key_is_named_with_its_file(tmp_path: Path) -> None:
    file = write(tmp_path, "block-size: big\n")

    assert message_of({"config": str(file)}).startswith(f"key 'block-size' in {file}: 'big' is not")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("- a\n- b\n", "not a list", id="not-a-mapping"),
        pytest.param("port: [1\n", "is not valid YAML", id="not-yaml"),
        pytest.param("port: 1\nport: 2\n", "a key stands twice", id="twice"),
        pytest.param("keep-alive: 1\nkeep_alive: 2\n", "has keep-alive twice", id="both-ways"),
        pytest.param("config: other.yaml\n", "unknown key 'config'", id="a-file-names-no-file"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    message = message_of({"config": str(write(tmp_path, text))})

    assert said in message
    assert "\n" not in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in message_of({"config": str(tmp_path / "none.yaml")})


@pytest.mark.parametrize("name", ["keep_alive", "header_timeout", "body_timeout", "write_timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_a_connection_cannot_have_is_refused(name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")

    assert message_of({name: value}).startswith(f"{flag}: {value!r} is not allowed")


@pytest.mark.parametrize("name", ["max_connections", "max_num_headers", "max_header_size"])
def test_a_limit_that_lets_nothing_through_is_refused(name: str) -> None:
    assert "is not allowed" in message_of({name: "0"})


@pytest.mark.parametrize("value", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.1 10.0.0.2"])
def test_a_proxy_that_is_no_address_is_refused(value: str) -> None:
    assert message_of({"forwarded_allow_ips": f"127.0.0.1,{value}"}) == (
        f"--forwarded-allow-ips {value!r} is not an address, a network or *."
    )


def test_half_of_a_certificate_is_refused(tmp_path: Path) -> None:
    assert "go together" in message_of({"ssl_certfile": str(write(tmp_path, ""))})


def test_a_key_file_without_keys_does_not_open_the_server(tmp_path: Path) -> None:
    assert "has no key in it" in message_of({"api_key_file": str(write(tmp_path, "# none\n"))})


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "--api-key-file" in message_of({"api_key_file": str(tmp_path / "none")})


# The fields, the flags, the page


def test_every_field_has_a_flag_a_description_and_a_group() -> None:
    parser = ArgumentParser()
    add_flags(parser)
    flags = {action.dest for action in parser._actions}

    for name, field in ServeSettings.model_fields.items():
        assert name in flags
        assert field.description
        assert field.description.endswith(".")
    assert set(GROUPS) <= set(ServeSettings.model_fields)


def test_every_policy_can_be_chosen() -> None:
    for policy in POLICIES:
        assert load_settings({"policy": policy}).policy == policy


def test_the_page_of_settings_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()

    assert page == configuration_markdown(), "run `make docs`"
