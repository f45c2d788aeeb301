"""Closed network for webhooks: every address in it leads to one canary.

`closed_network.run("bench")` runs that command of this file in new network and mount namespaces.
There, loopback is up, every IPv4 and IPv6 address is a local one, and a name server answers as
`ZONE` says. So whatever our transport connects to, the canary records the address and the port.
Nothing leaves the machine; the namespaces end with their last process.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.certificates import make_certificates
from tests.support.closed_network_servers import (
    DOWN,
    HOSTILE,
    NAT64,
    PUBLIC,
    PUBLIC_4,
    PUBLIC_6,
    WEB_PORTS,
)

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
DEADLINE_S = 6.0
BODY = b'{"type":"webhook.test"}'
UNAVAILABLE = "unavailable"  #: key of the reason where namespaces are not allowed


def run(command: str, *arguments: str, timeout_s: float = 100) -> dict[str, Any]:
    """Run a command in new namespaces; return what it printed, or `{UNAVAILABLE: reason}`."""
    if shutil.which("unshare") is None:
        return {UNAVAILABLE: "unshare is not installed"}
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", *as_root, "--net", "--mount", sys.executable, HERE, command, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.stderr.startswith("unshare:"):
        return {UNAVAILABLE: done.stderr.strip()}
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def close_off() -> None:
    """Set loopback up, make all addresses local, and our name server the only one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        up = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(control, 0x8914, up)  # SIOCSIFFLAGS
    for family in (socket.AF_INET, socket.AF_INET6):
        _add_route(family, kind=2)  # RTN_LOCAL: `ip route add local default dev lo table local`
    _add_route(socket.AF_INET, kind=7, to=socket.inet_aton(DOWN))  # RTN_UNREACHABLE
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("nameserver 127.0.0.1\n")
        file.flush()
        subprocess.run(["mount", "--bind", file.name, "/etc/resolv.conf"], check=True)


def _add_route(family: socket.AddressFamily, *, kind: int, to: bytes = b"") -> None:
    """Add a route over netlink: the program `ip` may not be installed."""
    table, protocol, scope = 255, 3, 254
    route = struct.pack("=BBBBBBBBI", family, 8 * len(to), 0, 0, table, protocol, scope, kind, 0)
    if to:
        route += struct.pack("=HH", 4 + len(to), 1) + to  # RTA_DST
    else:
        route += struct.pack("=HHI", 8, 4, socket.if_nametoindex("lo"))  # RTA_OIF
    create_and_acknowledge = 0x1 | 0x4 | 0x400
    header = struct.pack("=IHHII", 16 + len(route), 24, create_and_acknowledge, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(header + route)
        (error,) = struct.unpack_from("=i", kernel.recv(4096), 16)
    assert error == 0, os.strerror(-error)


class NetworkServers:
    """Process of the servers, and the connections that it got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_certificates(folder)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.closed_network_servers", str(folder)]
        )
        while not (folder / "ready").exists():
            assert self._process.poll() is None, "the servers did not start"
            time.sleep(0.02)

    def hits(self) -> list[list[Any]]:
        """Return the address and port of each connection so far."""
        return [json.loads(line) for line in (self.folder / "hits").read_text().splitlines()]

    def leaks(self) -> list[list[Any]]:
        """Return the connections that no webhook may make."""
        return [hit for hit in self.hits() if hit[0] not in PUBLIC or hit[1] not in WEB_PORTS]

    def names(self) -> list[str]:
        """Return the names that TLS clients asked for."""
        return (self.folder / "names").read_text().split()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def transport_in(folder: Path, *, timeout_s: float = 30, **policy):
    """Return the transport of a sender, with plain http too if `policy` says so."""
    from darkroom.webhooks.url_policy import UrlPolicy
    from workers.webhooks.resolver import DnsResolver
    from workers.webhooks.transport import WebhookTransport, tls_context

    tls = tls_context(folder / "ca.pem")
    return WebhookTransport(UrlPolicy(**policy), DnsResolver(), tls=tls, timeout_s=timeout_s)


PLAIN_TOO = {"schemes": frozenset({"http", "https"}), "ports": frozenset({80, 443, 8443})}


def rss_mib() -> float:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def bench(servers: NetworkServers, urls: list[str]) -> dict[str, Any]:
    """POST to all URLs at once, then to the hostile receiver."""
    import ipaddress

    plain, strict = transport_in(servers.folder, **PLAIN_TOO), transport_in(servers.folder)
    denying = transport_in(
        servers.folder,
        denied_networks=tuple(map(ipaddress.ip_network, ("93.184.217.0/24", f"{NAT64}/96"))),
        denied_names=("other.example",),
        **PLAIN_TOO,
    )

    async def post(transport, url: str) -> str:
        """POST, again after a timeout: this machine may be busy."""
        response = await transport.post(url, BODY, {})
        if response.outcome in {"unreachable", "timeout"}:
            response = await transport.post(url, BODY, {})
        return str(response.outcome)

    async def post_all(transport, those: list[str]) -> dict[str, str]:
        outcomes = await asyncio.gather(*(post(transport, url) for url in those))
        return dict(zip(those, outcomes, strict=True))

    secure = [f"https{url.removeprefix('http')}" for url in urls if url.startswith("http://")]
    found: dict[str, Any] = {
        "urls": await post_all(plain, urls),
        "secure": await post_all(strict, secure),
    }
    found["rebind"] = [await post(plain, "http://rebind.example/") for _ in range(10)]
    found["denied"] = await post_all(
        denying,
        [
            "http://denied.example/",
            "http://other.example/",
            "http://a.other.example/",
            "http://operators.example/",
            f"http://[{NAT64}a9fe:a9fe]/",
            f"http://[{NAT64}7f00:1]/",
        ],
    )
    found["leaks"] = servers.leaks()
    found["allowed"] = await post_all(
        plain, ["http://ok.example/hook", "http://ok6.example/hook", "http://second.example/hook"]
    )
    found["tls"] = await post_all(
        strict,
        [
            "https://ok.example/hook",
            "https://ok6.example:8443/hook",
            "https://other.example/hook",
            "https://badca.example/hook",
            "https://expired.example/hook",
            f"https://{PUBLIC_4}/hook",
            f"https://[{PUBLIC_6}]/hook",
        ],
    )
    found["names"] = servers.names()
    found["hostile"] = await _post_hostile(
        transport_in(servers.folder, timeout_s=DEADLINE_S, **PLAIN_TOO)
    )
    found["leaks_after"] = servers.leaks()
    found["naive"] = await _naive(servers)
    found["hits"] = len(servers.hits())
    return found


async def _post_hostile(plain) -> dict[str, list[Any]]:
    """Return outcome, seconds and growth in memory of a POST to each hostile path."""
    before = rss_mib()

    async def post(path: str) -> list[Any]:
        started = time.monotonic()
        response = await plain.post(f"http://ok.example{path}", BODY, {})
        return [str(response.outcome), time.monotonic() - started, rss_mib() - before]

    results = await asyncio.gather(*map(post, HOSTILE))
    return dict(zip(HOSTILE, results, strict=True))


async def _naive(servers: NetworkServers) -> list[list[Any]]:
    """Return what a usual client hits: proof that the canary notices leaks."""
    import httpx2

    async with httpx2.AsyncClient(follow_redirects=True, timeout=2) as client:
        for url in (
            "http://127.0.0.1:6379/",
            "http://[::ffff:169.254.169.254]/",
            "http://mixedrev.example/",
            "http://ok.example/redir?http://10.0.0.1:8265/",
        ):
            with contextlib.suppress(httpx2.HTTPError):
                await client.post(url)
    return servers.leaks()


async def names(servers: NetworkServers) -> dict[str, Any]:
    """POST to 180 slow or failing names at once, and to a healthy one beside them."""
    plain = transport_in(servers.folder, **PLAIN_TOO)

    async def post(url: str) -> list[Any]:
        started = time.monotonic()
        response = await plain.post(url, b"{}", {})
        return [str(response.outcome), time.monotonic() - started]

    bad = ("slow.example", "servfail.example", "nowhere.example")
    slow = [asyncio.create_task(post(f"http://{bad[n % 3]}/{n}")) for n in range(180)]
    await asyncio.sleep(0.2)
    healthy = [await post("http://ok.example/hook") for _ in range(20)]
    return {"healthy": healthy, "slow": [await task for task in slow]}


def firewall(rules: str, uid: str, *places: str) -> dict[str, Any]:
    """Load our rules; return what the sender's user and other users still reach."""
    folder, _, file = rules.rpartition("/")
    subprocess.run(["nft", "-I", folder, "-f", file], check=True, cwd=folder)
    as_sender = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    return {"sender": _probe(places, *as_sender), "others": _probe(places)} if places else {}


_PROBE = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor

def reach(place):
    host, _, port = place.rpartition("|")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
        return f"{place} open"
    except OSError as error:
        return f"{place} refused"

print("\\n".join(ThreadPoolExecutor(len(sys.argv)).map(reach, sys.argv[1:])))
"""


def _probe(places: tuple[str, ...], *prefix: str) -> dict[str, str]:
    """Probe with the system's Python: another user may not read our folders."""
    python = next(
        path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()
    )
    done = subprocess.run(
        [*prefix, python, "-I", "-c", _PROBE, *places],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def main() -> None:
    command, *arguments = sys.argv[1:]
    close_off()
    with tempfile.TemporaryDirectory() as folder:
        servers = NetworkServers(Path(folder))
        try:
            if command == "bench":
                found = asyncio.run(bench(servers, json.loads(sys.argv[2])))
            elif command == "names":
                found = asyncio.run(names(servers))
            else:
                found = firewall(f"{arguments[0]}/{arguments[1]}", *arguments[2:])
        finally:
            servers.end()
    print(json.dumps(found))  # noqa: T201  # to `run`, in the process outside


if __name__ == "__main__":
    main()
