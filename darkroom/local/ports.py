"""TCP ports: which are free, which respond, and which are open to the network."""

import http.client
import ipaddress
import random
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import psutil

LOOPBACK: Final = "127.0.0.1"
#: Below the range that the kernel hands to outgoing connections: a port chosen here is still free
#: when its server is restarted an hour later.
PORT_RANGE: Final = range(20_000, 32_000)


def free_port() -> int:
    """Return a port that is free, and outside the range of outgoing connections."""
    while True:
        port = random.choice(PORT_RANGE)  # noqa: S311  # it is no secret
        if is_free(port):
            return port


def free_ports(count: int) -> list[int]:
    """Return different free ports."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def is_free(port: int) -> bool:
    """Return whether a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def accepts(port: int) -> Callable[[], bool]:
    """Return a check that the port accepts connections."""

    def ready() -> bool:
        try:
            socket.create_connection((LOOPBACK, port), timeout=0.5).close()
        except OSError:
            return False
        return True

    return ready


def answers(port: int, path: str) -> Callable[[], bool]:
    """Return a check that GET responds with 200."""

    def ready() -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return ready


@dataclass(frozen=True)
class Listener:
    """TCP socket that accepts connections."""

    program: str
    address: str
    port: int

    @property
    def open_to_the_network(self) -> bool:
        return not _is_loopback(self.address)

    def __str__(self) -> str:
        address = "*" if ipaddress.ip_address(self.address).is_unspecified else self.address
        return f"{self.program} {address}:{self.port}"


def listeners(processes: Iterable[psutil.Process]) -> list[Listener]:
    """Return every TCP socket on which one of these processes listens, as the kernel says."""
    found = set()
    for process in processes:
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address = connection.laddr
                    found.add(Listener(process.name(), address.ip, address.port))
        except psutil.Error:
            continue  # it exited meanwhile
    return sorted(found, key=str)


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
