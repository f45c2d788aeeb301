"""Names into addresses, each within its time, and any number at once.

The system's resolver blocks a thread for each name, and a slow name server would hold them all.
So names are asked for over DNS by ourselves; absolute, without the search domains that would make
`intranet.example` out of a stranger's `intranet`. For development there is the system's as well:
it knows /etc/hosts.
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
    """The name has none, or nobody told us in time."""


class Resolver(Protocol):
    """Asked anew for every call: an answer kept is an answer that others had time to change."""

    async def addresses(self, name: str) -> list[str]:
        """All of the name's, IPv4 first. Raises NoAddress."""
        ...


class DnsResolver:
    """Asks the name servers of /etc/resolv.conf. Raises SetupError when it names none."""

    def __init__(self) -> None:
        self._resolver = dns.asyncresolver.Resolver()
        self._resolver.lifetime = TIMEOUT_S
        self._resolver.timeout = TIMEOUT_S / 2  # of one server: a second one gets its chance

    async def addresses(self, name: str) -> list[str]:
        """One family that cannot be had does not spoil the other."""
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
    """getaddrinfo in the loop's threads: hosts files, containers' names, single labels."""

    async def addresses(self, name: str) -> list[str]:
        """As the machine's own programs see it."""
        loop = asyncio.get_running_loop()
        asked = loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.wait_for(asked, TIMEOUT_S)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise NoAddress(name) from error
        return sorted({str(entry[4][0]) for entry in found}, key=lambda address: ":" in address)
