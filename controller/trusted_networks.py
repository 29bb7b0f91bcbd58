"""The networks to which the controller connects for workers.

A worker says itself where it is to be reached, so its URL is data from outside: it is checked when the worker
registers, and names are checked again each time that they are resolved for a connection.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from registry.errors import InvalidRequestError, OverloadedError, PermissionDeniedError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_address(text: str) -> IPAddress | None:
    """The IP address that `text` spells, an IPv4 one where it is mapped into IPv6; None where it is not an address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, stays on this machine."""
    address = parse_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


@dataclass(frozen=True, slots=True)
class TrustedNetworks:
    networks: tuple[IPNetwork, ...]

    @classmethod
    def parse(cls, text: str) -> TrustedNetworks:
        """Read comma-separated CIDR networks or addresses.

        Raises:
            InvalidRequestError: one of them is not a network.
        """
        networks: list[IPNetwork] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(part))
            except ValueError as error:
                raise InvalidRequestError(
                    f"--trusted-workers: {part!r} is not a network ({error}); write for example 10.0.0.0/8",
                    param="trusted_workers",
                ) from None
        return cls(tuple(networks))

    def __contains__(self, address: str) -> bool:
        parsed = parse_address(address)
        return parsed is not None and any(
            parsed.version == network.version and parsed in network for network in self.networks
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.networks)) or "no network"

    async def check_url(self, url: str) -> None:
        """Check the URL under which a worker wants to be reached.

        Raises:
            InvalidRequestError: not of the form http://host:port.
            OverloadedError: the host has no address now; name services may be late, so the worker may try again.
            PermissionDeniedError: one of its addresses is outside of these networks.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidRequestError(f"the worker's URL {url!r} is malformed: {error}", param="url") from None
        plain = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme not in ("http", "https") or not parts.hostname or port is None or not plain:
            raise InvalidRequestError(
                f"the worker's URL {url!r} must have the form http://host:port and nothing more", param="url"
            )
        addresses = await _addresses(parts.hostname, port)
        refused = [address for address in addresses if address not in self]
        if refused or not addresses:
            raise PermissionDeniedError(
                f"the worker's URL {url!r} leads to {', '.join(refused) or 'no address'}, and this controller trusts "
                f"workers in {self} only; start it with --trusted-workers to add a network",
                param="url",
            )


async def _addresses(host: str, port: int) -> list[str]:
    if parse_address(host) is not None:
        return [host]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OverloadedError(
            f"the worker's host {host!r} cannot be resolved now ({error}); announce an address instead", param="url"
        ) from None
    return sorted({str(sockaddr[0]) for *_, sockaddr in found})


class TrustedResolver(AbstractResolver):
    """Resolves names for connections to workers, and leaves out the addresses that are not trusted."""

    def __init__(self, trusted: TrustedNetworks) -> None:
        self._trusted = trusted
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found: Sequence[ResolveResult] = await self._resolver.resolve(host, port, family)
        allowed = [result for result in found if result["host"] in self._trusted]
        if not allowed:
            raise OSError(f"{host} has no address in the trusted networks ({self._trusted})")
        return allowed

    async def close(self) -> None:
        await self._resolver.close()
