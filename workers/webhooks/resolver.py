"""Name resolution with a deadline for each name, for any number of names at once.

The system's resolver blocks a thread for each name, so that a slow name server would block them
all. `DnsResolver` asks over DNS itself, for absolute names: search domains would turn a client's
`intranet` into `intranet.example`. For development, `SystemResolver` also knows /etc/hosts.
"""

import asyncio
import socket
from typing import Final, Protocol

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver

TIMEOUT_S: Final = 3.0


class NoAddress(Exception):
    """The name has no address, or no name server answered in time."""


class Resolver(Protocol):
    """Resolver without a cache: a kept answer gives an attacker time to change it."""

    async def addresses(self, name: str) -> list[str]:
        """Return all addresses of the name, IPv4 first. Raise NoAddress."""
        ...


class DnsResolver:
    """Resolver that asks the servers of /etc/resolv.conf. Raises SetupError when it names none."""

    def __init__(self) -> None:
        self._resolver = dns.asyncresolver.Resolver()
        self._resolver.lifetime = TIMEOUT_S
        self._resolver.timeout = TIMEOUT_S / 2  # of one server, so that a second one can be asked

    async def addresses(self, name: str) -> list[str]:
        """Return the A and AAAA records; a failure of one kind does not hide the other."""
        both = await asyncio.gather(self._ask(name, "A"), self._ask(name, "AAAA"))
        found = [address for each in both for address in each]
        if not found:
            raise NoAddress(name)
        return found

    async def _ask(self, name: str, kind: str) -> list[str]:
        try:
            absolute = dns.name.from_text(name)
            answer = await self._resolver.resolve(absolute, kind, search=False)
        except (dns.exception.DNSException, OSError, EOFError):
            return []
        return [str(record.address) for record in answer]


class SystemResolver:
    """Resolver that calls getaddrinfo: it knows hosts files, containers and single labels."""

    async def addresses(self, name: str) -> list[str]:
        """Return what other programs of this machine see."""
        loop = asyncio.get_running_loop()
        lookup = loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.wait_for(lookup, TIMEOUT_S)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise NoAddress(name) from error
        return sorted({str(entry[4][0]) for entry in found}, key=lambda address: ":" in address)
