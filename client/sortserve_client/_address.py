"""Where the server is and who asks, checked before anything is sent. No I/O.

What is wrong here is a ``ValueError`` at once, and its message never holds a key or a password.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
from dataclasses import dataclass

import httpx

__all__ = ["Address", "bearer", "parse_address"]

_MAX_PORT = 65_535
MAX_SHOWN = 200
"""Characters of an address that a message quotes."""


@dataclass(frozen=True)
class Address:
    """A base URL without the secrets it may have held."""

    url: str
    """Scheme, host, port and path prefix, without a slash at the end."""
    host: str
    authorization: str | None = None
    """The header that a user name and password in the URL stand for."""

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine by its very name, so that no proxy can lead to it."""
        name = self.host.rstrip(".").lower()
        if name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(name)
        except ValueError:
            try:
                ip = ipaddress.IPv4Address(socket.inet_aton(name))  # such as 127.1
            except OSError:
                return False
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return ip.is_loopback or ip.is_unspecified


def parse_address(base_url: str) -> Address:
    """The parts of a base URL.

    Raises:
        ValueError: it has no http(s) scheme or no host, is no URL, or has a query or fragment.
    """
    if not isinstance(base_url, str):
        raise ValueError(f"base_url must be a text, not {type(base_url).__name__}.")
    if not base_url.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"base_url={_without_secrets(base_url)!r} must start with http:// or https://."
        )
    try:
        url = httpx.URL(base_url)
        url.host.encode("idna")  # refuses labels that the resolver would choke on
    except (httpx.InvalidURL, ValueError) as error:
        reason = str(error).partition(",")[0]
        if _userinfo_of(base_url):
            reason = "write the user name and the password percent-encoded"
        raise ValueError(
            f"base_url={_without_secrets(base_url)!r} is no valid URL: {reason}."
        ) from None
    shown = _without_secrets(base_url)
    if not url.host or "%" in url.host or " " in base_url:
        raise ValueError(f"base_url={shown!r} names no host.")
    if url.port is not None and not 0 < url.port <= _MAX_PORT:
        raise ValueError(f"base_url={shown!r}: a port is a number from 1 to {_MAX_PORT}.")
    if "?" in base_url or "#" in base_url:
        raise ValueError(f"base_url={shown!r} must end with its path: no ?query and no #fragment.")
    authorization = None
    if url.userinfo:
        pair = f"{url.username}:{url.password}".encode()
        authorization = f"Basic {base64.b64encode(pair).decode()}"
    plain = str(url.copy_with(userinfo=b"")).rstrip("/")
    return Address(plain, url.host, authorization)


def bearer(api_key: str) -> str:
    """The value of the ``Authorization`` header.

    Raises:
        ValueError: no header can carry the key. The message does not show it.
    """
    if not isinstance(api_key, str):
        raise ValueError(f"api_key must be a text, not {type(api_key).__name__}.")
    if not api_key:
        raise ValueError("api_key is empty: leave it out where the server wants none.")
    if not all("!" <= character <= "~" for character in api_key):
        raise ValueError(
            "api_key holds a character that no HTTP header carries: it must be printable ASCII "
            "without spaces. Strip the line end of a key that was read from a file."
        )
    return f"Bearer {api_key}"


def _userinfo_of(base_url: str) -> str:
    rest = base_url.partition("://")[2]
    return rest.rpartition("@")[0]


def _without_secrets(base_url: str) -> str:
    """A URL to be shown, cut before its query, and without what stands before an ``@``."""
    scheme, separator, rest = base_url.partition("://")
    if not separator:
        scheme, rest = "", base_url
    rest = rest.rpartition("@")[2].partition("?")[0].partition("#")[0]
    return f"{scheme}{separator}{rest}"[:MAX_SHOWN]
