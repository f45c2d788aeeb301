"""What lies between a worker and its servers: forwarders that are slow, a network that is cut.

A `TcpProxy` is a TCP relay of this process. A `NetworkSegment` is a network namespace that reaches
the servers over relays only, through one pair of virtual interfaces. It is cut by giving a side a
wrong hardware address for the other: what it sends is then dropped in silence, as by a dead switch,
each way by itself; neither side gets an error, and no firewall is needed.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

OURS, THEIRS = "10.231.64.1", "10.231.64.2"
_NOWHERE = "02:00:00:00:00:ff"


class TcpProxy:
    """Relays whatever connects to it; `delay_s` holds back each piece that goes up."""

    def __init__(self, to_port: int, *, host: str = "127.0.0.1", delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self._to = ("127.0.0.1", to_port)
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server((host, 0), backlog=128)
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()
        self.drop()

    def drop(self) -> None:
        """Forget all connections, as a host does that has lost its power."""
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=[near], daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._to, timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        self._open |= {near, far}
        back = threading.Thread(
            target=self._pump, args=[far, near], kwargs={"up": False}, daemon=True
        )
        back.start()
        self._pump(near, far, up=True)
        back.join()
        self._open -= {near, far}
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, *, up: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                if up and self.delay_s:
                    time.sleep(self.delay_s)
                sink.sendall(piece)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def moved(url: str, host: str, port: int) -> str:
    """The URL, at another address."""
    parts = urlsplit(url)
    account = parts.netloc.rpartition("@")[0]
    return parts._replace(
        netloc=f"{account}@{host}:{port}" if account else f"{host}:{port}"
    ).geturl()


class NetworkSegment:
    """A namespace with one way out, which can be cut."""

    def __init__(self, name: str) -> None:
        self.name, self._near, self._far = name, f"{name}n", f"{name}f"
        _ip("netns", "add", name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", name)
        _ip("addr", "add", f"{OURS}/30", "dev", self._near)
        _ip("link", "set", self._near, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{THEIRS}/30", "dev", self._far),
            ("link", "set", self._far, "up"),
        ):
            _ip("-n", name, *command)
        self._addresses = {
            OURS: _mac("link", "show", self._near),
            THEIRS: _mac("-n", name, "link", "show", self._far),
        }
        self.recover()

    @property
    def inside(self) -> tuple[str, ...]:
        """The command that runs another in there."""
        return "ip", "netns", "exec", self.name

    def cut(self, *, out: bool = True, back: bool = True) -> None:
        """Drop what is sent from in there, what is sent to there, or both."""
        self._neighbours(_NOWHERE if out else None, _NOWHERE if back else None)

    def recover(self) -> None:
        self._neighbours(None, None)

    def _neighbours(self, ours: str | None, theirs: str | None) -> None:
        how = ("nud", "permanent")
        ours, theirs = ours or self._addresses[OURS], theirs or self._addresses[THEIRS]
        _ip("-n", self.name, "neigh", "replace", OURS, "lladdr", ours, "dev", self._far, *how)
        _ip("neigh", "replace", THEIRS, "lladdr", theirs, "dev", self._near, *how)

    def remove(self) -> None:
        _ip("netns", "del", self.name)  # the interfaces go with it


@contextmanager
def segment() -> Iterator[NetworkSegment]:
    """Raises OSError and CalledProcessError where this process may not make one."""
    if shutil.which("ip") is None:
        raise FileNotFoundError("the program ip is not here")
    made = NetworkSegment(f"dr{os.getpid() % 100_000}")
    try:
        yield made
    finally:
        made.remove()


def connections_to(pid: int, port: int) -> set[str]:
    """The local ends of a process's namespace's established connections to that port."""
    established = "01"
    found = set()
    with Path(f"/proc/{pid}/net/tcp").open() as file:
        for line in list(file)[1:]:
            _, local, remote, state, *_ = line.split()
            if state == established and int(remote.split(":")[1], 16) == port:
                found.add(local)
    return found


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _mac(*arguments: str) -> str:
    words = _ip(*arguments).split()
    return words[words.index("link/ether") + 1]
