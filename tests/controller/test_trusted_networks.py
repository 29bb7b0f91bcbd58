from __future__ import annotations

import socket

import pytest

from controller.trusted_networks import TrustedNetworks, TrustedResolver, is_loopback
from registry.errors import InvalidRequestError, OverloadedError, PermissionDeniedError


@pytest.mark.parametrize(
    ("networks", "address", "trusted"),
    [
        ("127.0.0.0/8,::1/128", "127.8.8.8", True),
        ("127.0.0.0/8,::1/128", "::1", True),
        ("127.0.0.0/8", "::1", False),
        ("127.0.0.0/8", "::ffff:127.0.0.1", True),
        ("10.0.0.0/8", "::ffff:127.0.0.1", False),
        ("10.0.0.0/8", "127.0.0.1", False),
        (" 10.1.2.3 , 192.168.0.0/16", "10.1.2.3", True),
        ("0.0.0.0/0", "fe80::1%eth0", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("", "127.0.0.1", False),
        ("127.0.0.0/8", "not an address", False),
    ],
)
def test_membership(networks: str, address: str, trusted: bool) -> None:
    assert (address in TrustedNetworks.parse(networks)) is trusted


@pytest.mark.parametrize("text", ["nonsense", "10.0.0.0/99", "10.0.0.1/8"])
def test_malformed_networks(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="--trusted-workers"):
        TrustedNetworks.parse(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("LOCALHOST", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Addresses of names, in place of the system's resolver."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: int, *args: object, **options: object) -> list[tuple]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


async def test_a_name_is_trusted_only_with_all_its_addresses(names: dict[str, list[str]]) -> None:
    trusted = TrustedNetworks.parse("10.0.0.0/8")
    names["gpu1"] = ["10.0.0.1"]
    await trusted.check_url("http://gpu1:21002")
    names["gpu1"] = ["10.0.0.1", "192.0.2.1"]
    with pytest.raises(PermissionDeniedError, match=r"leads to 192\.0\.2\.1.*--trusted-workers"):
        await trusted.check_url("http://gpu1:21002")


async def test_a_name_that_is_not_known_yet_may_be_tried_again(names: dict[str, list[str]]) -> None:
    with pytest.raises(OverloadedError, match="gpu1"):
        await TrustedNetworks.parse("10.0.0.0/8").check_url("http://gpu1:21002")


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999", "//127.0.0.1:1", "http://:1", "http://h:1?x"])
async def test_malformed_urls(url: str) -> None:
    with pytest.raises(InvalidRequestError):
        await TrustedNetworks.parse("127.0.0.0/8").check_url(url)


async def test_a_name_that_moves_away_later_is_not_connected_to(names: dict[str, list[str]]) -> None:
    names["gpu1"] = ["10.0.0.1", "192.0.2.1"]
    resolver = TrustedResolver(TrustedNetworks.parse("10.0.0.0/8"))
    assert [result["host"] for result in await resolver.resolve("gpu1", 1)] == ["10.0.0.1"]
    names["gpu1"] = ["192.0.2.1"]
    with pytest.raises(OSError, match="trusted"):
        await resolver.resolve("gpu1", 1)
    await resolver.close()
