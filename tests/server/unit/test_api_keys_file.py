"""The file of named keys: what it may hold, what is said of mistakes, and reading it anew."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from sortserve.admission.key_ledger import KeyLedger
from sortserve.cli import main
from sortserve.core.api_keys import KeyObserver, KeyPolicy, key_digest
from sortserve.core.errors import ConfigError
from sortserve.core.weights import KeyWeights
from sortserve.process import key_reload
from sortserve.process.api_keys import check_exits, parse_keys, read_named_keys
from sortserve.process.config import load_settings
from sortserve.process.key_reload import KeyReloader

HASH = key_digest("k")
WHOLE = f"""
keys:
  - name: alice
    sha256: "{HASH}"
    requests_per_minute: 60
    tokens_per_minute: 100000
    max_concurrency: 4
    max_exit_layer: 18
    default_priority: 5
    max_priority: -3
  - name: bob
    sha256: ["{key_digest("old").upper()}", "{key_digest("new")}"]
"""


def test_every_field_of_an_entry_has_its_place_in_the_policy() -> None:
    alice, bob = parse_keys(WHOLE, "keys.yaml", base=2.0)

    assert alice == KeyPolicy(
        name="alice",
        digests=(HASH,),
        requests_per_minute=60,
        tokens_per_minute=100_000,
        max_concurrency=4,
        max_exit_layer=18,
        default_priority=5,
        weights=KeyWeights(most=8.0),
    )
    assert bob == KeyPolicy(name="bob", digests=(key_digest("old"), key_digest("new")))


def entry(**fields: Any) -> str:
    return str(yaml.safe_dump({"keys": [{"name": "a", "sha256": HASH, **fields}]}))


BIG = 2**31
WRONG = [
    ("", "it should hold `keys:`"),
    ("[]", "it should hold `keys:`"),
    ("keys:", "keys: None is not allowed"),
    ("keys: [1]", "it should hold `keys:`"),
    ("keys: [{name: a}]", "keys.0.sha256 is missing"),
    ("a: {b", "it is not valid YAML"),
    ("keys: [{name: a, sha256: *x}]", "it is not valid YAML"),
    (entry() + "keys: []", "a key stands twice in one mapping in line 4"),
    (entry(max_concurrency=1) + "  max_concurrency: 9", "a key stands twice in one mapping"),
    (entry(rpm=3), "keys.0.rpm is not a field: choose among name, sha256, requests_per_minute"),
    ("keys: []\nother: 1", "other is not a field: choose among keys"),
    (entry(name="a b"), "keys.0.name: 'a b' is not allowed"),
    (entry(name="other"), "keys.0.name: 'other' is not allowed"),
    (entry(name=""), "keys.0.name: '' is not allowed"),
    (entry(sha256=[]), "keys.0.sha256: '***' is not allowed"),
    (entry(sha256=12345), "keys.0.sha256.0: '***' is not allowed"),
    (entry(requests_per_minute=0), "keys.0.requests_per_minute: 0 is not allowed: it should be"),
    (entry(tokens_per_minute=-3), "keys.0.tokens_per_minute: -3 is not allowed"),
    (entry(tokens_per_minute=BIG), f"keys.0.tokens_per_minute: {BIG} is not allowed"),
    (f"keys: 0x{'f' * 9000}", "keys: a number of too many digits is not allowed"),
    (entry(max_concurrency=1.5), "keys.0.max_concurrency: 1.5 is not allowed"),
    (entry(max_concurrency="4"), "keys.0.max_concurrency: '4' is not allowed"),
    (entry(max_exit_layer=True), "keys.0.max_exit_layer: True is not allowed"),
    (entry(default_priority=101), "keys.0.default_priority: 101 is not allowed"),
    (entry(max_priority=-101), "keys.0.max_priority: -101 is not allowed"),
    (entry(max_priority=2), "keys.0: default_priority=0 is earlier than max_priority=2"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_mistake_is_one_line_with_field_value_and_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_keys(text, "--api-keys-file keys.yaml", base=1.1)

    assert refused.value.message.startswith("--api-keys-file keys.yaml: ")
    assert said in refused.value.message
    assert "\n" not in refused.value.message


def test_a_key_in_clear_in_the_hashs_place_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_keys(entry(sha256="sk-very-secret"), "f", base=1.1)

    assert "secret" not in refused.value.message
    assert "sortserve keys new" in refused.value.message


def test_names_and_keys_are_there_once() -> None:
    same_name = WHOLE + f'  - name: alice\n    sha256: "{key_digest("x")}"\n'
    same_key = WHOLE + f'  - name: carol\n    sha256: "{HASH}"\n'

    with pytest.raises(ConfigError, match=r"keys\.2\.name: 'alice' is the name of another key"):
        parse_keys(same_name, "f", base=1.1)
    with pytest.raises(ConfigError, match=r"keys\.2\.sha256: the key of carol is that of alice"):
        parse_keys(same_key, "f", base=1.1)
    with pytest.raises(ConfigError, match="is that of --api-key or --api-key-file"):
        parse_keys(WHOLE, "f", base=1.1, others=[HASH])


def test_a_deepest_exit_is_one_of_the_checkpoint() -> None:
    policies = parse_keys(WHOLE, "f", base=1.1)

    check_exits(policies, (9, 18, 30))
    with pytest.raises(ConfigError, match=r"'alice', max_exit_layer: 18 .* exits, 9, 30\."):
        check_exits(policies, (9, 30))


@pytest.mark.parametrize("text", ["keys:\n  - name: a\n", "keys: 3\n", "\n"])
def test_a_malformed_file_ends_the_start_with_exit_code_2(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)

    assert main(["serve", "--api-keys-file", str(file), "--print-config"]) == 2

    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--api-keys-file {file}: " in said


def test_keys_of_both_kinds_are_accepted_together(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(WHOLE)

    settings = load_settings({"api_keys_file": str(file), "api_key": ["plain"]})

    assert settings.is_guarded
    plain, alice, bob = settings.key_policies()
    assert plain == KeyPolicy(digests=(key_digest("plain"),))
    assert (alice.name, bob.name) == ("alice", "bob")
    with pytest.raises(ConfigError, match="is that of --api-key"):
        load_settings({"api_keys_file": str(file), "api_key": ["k"]})


def test_an_empty_list_still_guards(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: []\n")

    settings = load_settings({"api_keys_file": str(file)})

    assert settings.is_guarded
    assert settings.key_policies() == ()


# Reading it anew.


class Told(KeyObserver):
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def on_reloaded(self, outcome: str) -> None:
        self.outcomes.append(outcome)


class Server:
    """A ledger over a file, and what it is told."""

    def __init__(self, file: Path) -> None:
        self.file, self.told = file, Told()
        self.ledger = KeyLedger(self.read())
        self.reloader = KeyReloader(file, self.read, self.ledger, self.told)

    def read(self) -> tuple[KeyPolicy, ...]:
        return read_named_keys(self.file, base=1.1)

    def opens(self, key: str) -> bool:
        return self.ledger.find(key.encode()) is not None


@pytest.fixture
async def server(tmp_path: Path) -> Server:
    file = tmp_path / "keys.yaml"
    file.write_text(entry())
    server = Server(file)
    await server.reloader.look()
    return server


async def test_a_file_that_did_not_change_is_not_told_of(server: Server) -> None:
    await server.reloader.look()

    assert server.told.outcomes == []


async def test_a_file_that_changed_counts(server: Server) -> None:
    server.file.write_text(entry(sha256=key_digest("k2")))

    await server.reloader.look()

    assert (server.opens("k"), server.opens("k2")) == (False, True)
    assert server.told.outcomes == ["ok"]


async def test_a_change_within_the_same_tick_of_the_clock_counts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = server.file.stat()
    monkeypatch.setattr(key_reload, "os", SimpleNamespace(stat=lambda path: status))
    await server.reloader.look()
    server.file.write_text(entry(sha256=key_digest("k2")))

    await server.reloader.look()

    assert (server.opens("k"), server.opens("k2")) == (False, True)


async def test_a_file_that_has_long_been_the_same_is_not_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_reload, "SETTLED_S", -1.0)  # as if it had been written long ago
    await server.reloader.look()
    monkeypatch.setattr(server.reloader, "_read", lambda: 1 / 0)

    await server.reloader.look()


async def test_a_file_that_is_replaced_counts(server: Server) -> None:
    """As Kubernetes does with a mounted secret: a link that suddenly means another file."""
    old, new = server.file.with_name("old"), server.file.with_name("new")
    server.file.rename(old)
    server.file.symlink_to(old)
    await server.reloader.look()
    new.write_text(entry(sha256=key_digest("k2")))
    link = server.file.with_name("link")
    link.symlink_to(new)

    os.replace(link, server.file)
    await server.reloader.look()

    assert (server.opens("k"), server.opens("k2")) == (False, True)


@pytest.mark.parametrize("broken", ["keys:\n  - name: a\n", "", None])
async def test_a_broken_file_keeps_the_old_keys_and_is_told_once(
    server: Server, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if broken is None:
        server.file.unlink()
    else:
        server.file.write_text(broken)

    await server.reloader.look()
    await server.reloader.look()

    assert server.opens("k")
    assert server.told.outcomes == ["failed"]
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "the old ones stay" in record.message

    server.file.write_text(entry(sha256=key_digest("k3")))
    await server.reloader.look()
    assert server.opens("k3")
    assert server.told.outcomes == ["failed", "ok"]


async def test_who_asks_is_answered_though_nothing_changed(server: Server) -> None:
    await server.reloader.look(is_asked=True)

    assert server.told.outcomes == ["ok"]


async def test_the_watch_takes_up_what_it_is_asked_to(server: Server) -> None:
    asked = asyncio.Event()
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server.told.on_reloaded = told.set_result  # type: ignore[method-assign, assignment]
    watching = asyncio.create_task(server.reloader.run(asked))
    server.file.write_text(entry(sha256=key_digest("k2")))

    asked.set()

    async with asyncio.timeout(30):
        assert await told == "ok"
    watching.cancel()
    assert server.opens("k2")


async def test_a_file_that_could_not_be_opened_once_is_read_a_second_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.file.write_text(entry(sha256=key_digest("k2")))
    with monkeypatch.context() as without_files:
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        without_files.setattr(Path, "open", Mock(side_effect=error))
        await server.reloader.look()
        await server.reloader.look()
    assert (server.opens("k"), server.told.outcomes) == (True, ["failed"])

    await server.reloader.look()

    assert (server.opens("k2"), server.told.outcomes) == (True, ["failed", "ok"])


async def test_no_failure_of_any_kind_ends_the_watch(server: Server) -> None:
    outcomes: asyncio.Queue[str] = asyncio.Queue()
    server.told.on_reloaded = outcomes.put_nowait  # type: ignore[method-assign, assignment]
    read, asked = server.reloader._read, asyncio.Event()

    def fail() -> tuple[KeyPolicy, ...]:
        server.reloader._read = read
        raise RuntimeError("can't start new thread")

    server.reloader._read = fail
    asked.set()
    watching = asyncio.create_task(server.reloader.run(asked))

    async with asyncio.timeout(30):
        assert await outcomes.get() == "failed"
        server.file.write_text(entry(sha256=key_digest("k2")))
        assert await outcomes.get() == "ok"
    watching.cancel()
    assert server.opens("k2")


# `sortserve keys new`.


def test_a_new_key_opens_what_its_entry_guards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"

    assert main(["keys", "new", "alice", "--file", str(file), "--requests-per-minute", "60"]) == 0
    first = capsys.readouterr().out.strip()
    assert main(["keys", "new", "team/bob", "--file", str(file), "--max-exit-layer", "18"]) == 0
    second = capsys.readouterr().out.strip()

    ledger = KeyLedger(read_named_keys(file, base=1.1))
    [alice, bob] = [ledger.find(key.encode()) for key in (first, second)]
    assert alice is not None
    assert bob is not None
    assert (alice[1].name, alice[1].requests_per_minute) == ("alice", 60)
    assert (bob[1].name, bob[1].max_exit_layer) == ("team/bob", 18)
    assert first not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_entry_that_is_printed_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "no", "--tokens-per-minute", "5000"]) == 0

    printed = capsys.readouterr().out
    key = printed.split()[1]
    [policy] = parse_keys(f"keys:\n{printed}", "f", base=1.1)
    assert policy == KeyPolicy(name="no", digests=(key_digest(key),), tokens_per_minute=5000)


@pytest.mark.parametrize(
    "arguments",
    [
        ["a b"],
        [""],
        ["other"],
        ["a", "--requests-per-minute", "0"],
        ["a", "--max-priority", "1000"],
        ["a", "--default-priority", "-5", "--max-priority", "0"],
        ["a", "--requests-per-minute", "x"],
    ],
)
def test_what_a_server_would_refuse_is_not_made(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"

    assert main(["keys", "new", *arguments, "--file", str(file)]) == 2

    assert not file.exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", [entry(), WHOLE, "keys: []\r\n", "# none yet\nkeys:\n"])
def test_an_entry_is_added_to_a_list_however_it_is_indented(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)

    assert main(["keys", "new", "carol", "--file", str(file)]) == 0
    assert main(["keys", "new", "dora", "--file", str(file), "--max-concurrency", "3"]) == 0

    *_, carol, dora = read_named_keys(file, base=1.1)
    assert (carol.name, dora.name, dora.max_concurrency) == ("carol", "dora", 3)


def test_of_keys_that_are_made_at_once_none_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    def add(number: int) -> int:
        return main(["keys", "new", f"n{number}", "--file", str(file)])

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(add, range(16))) == {0}

    assert {policy.name for policy in read_named_keys(file, base=1.1)} == {
        f"n{number}" for number in range(16)
    }


@pytest.mark.parametrize("kind", ["bytes", "pipe", "folder"])
def test_what_is_no_file_of_keys_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    match kind:
        case "bytes":
            file.write_bytes(b"\xff\xfe")
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()

    assert main(["keys", "new", "a", "--file", str(file)]) == 2

    assert "--file" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_what_root_adds_stays_readable_to_who_owns_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(WHOLE)
    file.chmod(0o600)
    os.chown(file, 10001, 10002)

    assert main(["keys", "new", "carol", "--file", str(file)]) == 0

    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (10001, 10002, 0o600)


def test_a_name_that_is_taken_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(WHOLE)
    file.chmod(0o640)

    assert main(["keys", "new", "bob", "--file", str(file)]) == 2
    assert file.read_text() == WHOLE

    assert main(["keys", "new", "carol", "--file", str(file)]) == 0
    assert file.stat().st_mode & 0o777 == 0o640
    assert file.read_text().startswith(WHOLE)
