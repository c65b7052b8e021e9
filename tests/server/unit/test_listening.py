"""The address and the certificate are ours, or it is one line, before anything is loaded."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sortserve.core.errors import ConfigError
from sortserve.process import listening as listening_module
from sortserve.process.config import ServeSettings, load_settings
from sortserve.process.listening import (
    BACKLOG,
    allow_open_files,
    is_loopback,
    listening,
    tls_context,
)
from support.tls import CERTIFICATE, ENCRYPTED_KEY, KEY, OTHER_KEY, write_tls_files


def refusal(**flags: object) -> str:
    with pytest.raises(ConfigError) as caught, listening(load_settings(flags)):
        pass
    assert "\n" not in caught.value.message
    return caught.value.message


# ---- TCP ----


def test_port_0_takes_a_free_one() -> None:
    with listening(load_settings({"port": 0})) as listener:
        assert listener.getsockname()[1] > 0


def test_who_has_the_socket_has_the_port() -> None:
    with listening(load_settings({"port": 0})) as listener:
        socket.create_connection(listener.getsockname()).close()


async def test_small_packets_leave_at_once() -> None:
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.Future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer)

    with listening(load_settings({"port": 0})) as listener:
        address = listener.getsockname()
        async with await asyncio.start_server(accept, sock=listener):
            _, client = await asyncio.open_connection(*address)
            server = (await accepted).get_extra_info("socket")

            assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0

            for writer in (client, accepted.result()):
                writer.close()
                await writer.wait_closed()


async def test_where_no_file_is_left_it_is_said_once_and_who_waits_is_taken_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio would say it once for each place in the backlog, and keep the event loop busy."""
    monkeypatch.setattr("asyncio.constants.ACCEPT_RETRY_DELAY", 0.01)
    monkeypatch.setattr(listening_module, "_SILENT_S", 0.005)
    loop, said = asyncio.get_running_loop(), asyncio.Event()
    errors: list[dict[str, Any]] = []
    taken: asyncio.Future[asyncio.BaseTransport] = loop.create_future()

    class Taken(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            taken.set_result(transport)

    def note(_: object, context: dict[str, Any]) -> None:
        errors.append(context)
        said.set()

    loop.set_exception_handler(note)
    with listening(load_settings({"port": 0})) as listener, monkeypatch.context() as without_files:
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        without_files.setattr(socket.socket, "accept", Mock(side_effect=error))
        async with await loop.create_server(Taken, sock=listener, backlog=BACKLOG):
            client, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname()[:2])
            await said.wait()
            num_said = len(errors)
            without_files.undo()
            (await asyncio.wait_for(taken, 60)).close()
            client.close()

    assert num_said < BACKLOG / 100


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with listening(load_settings({"port": 0})) as first:
        port = first.getsockname()[1]

        message = refusal(port=port)

    assert message.startswith(f"cannot listen on --host 127.0.0.1 --port {port}: Address already")


def test_a_port_that_another_took_since_it_was_bound_is_refused() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        with (
            listening(load_settings({"port": other.getsockname()[1]})),
            pytest.raises(OSError, match="in use"),
        ):
            other.listen()  # both were bound: the first to listen has it


@pytest.mark.parametrize(
    "host",
    ["", "999.1.1.1", "a..b", "x" * 300, "1.2.3.4", "host name", "::1::", "\0", "[", "ü" * 99],
)
def test_a_host_that_cannot_be_listened_on_is_one_line(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", without_network(socket.getaddrinfo))

    assert "--host" in refusal(host=host, port=0)


def without_network(lookup: object) -> object:
    """Looks numbers up and no names: a test must not ask a name server."""

    def numeric(host: str, port: int, **options: int) -> object:
        options["flags"] |= socket.AI_NUMERICHOST
        return lookup(host, port, **options)  # type: ignore[operator]

    return numeric


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        ("localhost", socket.AF_INET),
        ("::1", socket.AF_INET6),
        ("[::1]", socket.AF_INET6),
    ],
)
def test_names_and_both_kinds_of_address_can_be_listened_on(host: str, family: int) -> None:
    if family == socket.AF_INET6 and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with listening(load_settings({"host": host, "port": 0})) as listener:
        assert listener.family == family
        assert is_loopback(listener)


def test_a_name_without_an_ipv4_address_is_listened_on_by_its_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    found = socket.getaddrinfo("::1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)

    with listening(load_settings({"host": "box.lan", "port": 0})) as listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize("host", ["0.0.0.0", "0"])
def test_every_interface_is_not_loopback(host: str) -> None:
    with listening(load_settings({"host": host, "port": 0})) as listener:
        assert not is_loopback(listener)


# ---- Unix sockets ----


def on_path(path: Path | str) -> ServeSettings:
    return ServeSettings(uds=str(path))


def test_a_socket_file_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # closed without removing its file, as by a kill

    with listening(on_path(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_socket_is_not_replaced_even_if_it_takes_no_connections_now(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(path))  # until its queue is full

        message = refusal(uds=str(path))

        for client in clients:
            client.close()
    assert message.startswith(f"cannot listen on --uds {path}: Address already in use")
    assert path.is_socket()


def test_the_file_is_gone_when_the_server_is(tmp_path: Path) -> None:
    with listening(on_path(tmp_path / "server.sock")):
        assert (tmp_path / "server.sock").is_socket()

    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as successor:
        with listening(on_path(path)):
            path.unlink()
            successor.bind(str(path))
            os.utime(path)

        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link"])
def test_what_is_not_a_socket_is_not_touched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    mode = path.lstat().st_mode

    message = refusal(uds=str(path))

    assert "something that is not a socket is there" in message
    assert stat.S_IFMT(path.lstat().st_mode) == stat.S_IFMT(mode)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 200, "AF_UNIX path too long"),
        ("no/such/folder", "No such file or directory"),
        ("", "it must not be empty"),
        ("a\0b", "without control characters"),
    ],
)
def test_a_path_that_cannot_be_listened_on_is_one_line(
    tmp_path: Path, name: str, reason: str
) -> None:
    message = refusal(uds=f"{tmp_path}/{name}" if name else "")

    assert "--uds" in message
    assert reason in message


def test_of_many_that_replace_one_stale_socket_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    start, done = threading.Barrier(8), threading.Barrier(8)
    won: list[bool] = []

    def take() -> None:
        start.wait()
        try:
            with listening(on_path(path)):
                won.append(True)
                done.wait()
        except ConfigError:
            won.append(False)
            done.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(won) == [False] * 7 + [True]


# ---- TLS ----


def test_a_certificate_and_its_key_make_a_context(tmp_path: Path) -> None:
    certificate, key = write_tls_files(tmp_path)

    assert tls_context(ServeSettings(ssl_certfile=certificate, ssl_keyfile=key)) is not None
    assert tls_context(ServeSettings()) is None


@pytest.mark.parametrize(
    ("certificate", "key", "reason"),
    [
        (CERTIFICATE, OTHER_KEY, "the key is not the certificate's"),
        (CERTIFICATE, ENCRYPTED_KEY, "the key is encrypted: decrypt it with `openssl pkey"),
        (CERTIFICATE, "garbage", "not valid PEM"),
        (CERTIFICATE, "", "not valid PEM"),
        (CERTIFICATE, CERTIFICATE, "not valid PEM"),
        ("garbage", KEY, "not valid PEM"),
        ("", KEY, "not valid PEM"),
        (KEY, KEY, "not valid PEM"),
        (CERTIFICATE[:200] + CERTIFICATE[210:], KEY, "not valid PEM"),
    ],
)
def test_tls_files_that_cannot_be_used_are_one_line(
    tmp_path: Path, certificate: str, key: str, reason: str
) -> None:
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    for path, text in zip(files, (certificate, key), strict=True):
        path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        tls_context(ServeSettings(ssl_certfile=files[0], ssl_keyfile=files[1]))

    assert reason in caught.value.message
    assert f"--ssl-keyfile {files[1]}" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_not_a_file_is_not_read(tmp_path: Path, kind: str) -> None:
    certificate, key = write_tls_files(tmp_path)
    key.unlink()
    key.mkdir() if kind == "folder" else os.mkfifo(key)

    with pytest.raises(ConfigError, match=r"--ssl-keyfile .*key.pem cannot be read: it is"):
        tls_context(load_settings({"ssl_certfile": certificate, "ssl_keyfile": key}))


# ---- open files ----


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))

    assert allow_open_files(100) == 100
    assert limits == [(1024, 4096)]
    assert allow_open_files(1000) == 1000
    assert limits[-1] == (1256, 4096)
    assert allow_open_files(100_000) == 4096 - 256
    assert limits[-1] == (4096, 4096)
