"""A world of its own for webhooks: every address there is leads to one canary.

`closed_network.run("bench")` runs that command of this file in new network and mount namespaces.
In there loopback is up, every IPv4 and IPv6 address is a local one, and a name server answers as
`ZONE` says. So whatever our transport connects to, the canary is hit and knows by which address
and port. Nothing leaves the machine; the namespaces end with their last process.
"""

import asyncio
import contextlib
import fcntl
import gzip
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.support.certificates import make_certificates

HERE = Path(__file__).resolve()
PUBLIC_4, PUBLIC_6 = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"
ELSEWHERE, DOWN = "93.184.216.35", "93.184.216.36"  # another public host, and one without servers
PUBLIC = {PUBLIC_4, PUBLIC_6, ELSEWHERE}
NAT64 = "2a00:1098:2b::"  # an operator's own translation prefix, within what is public
WEB_PORTS = {80, 443, 8443}
PORTS = sorted(WEB_PORTS | {22, 25, 5432, 6379, 8000, 8080, 8265})
ZONE = {
    "ok": [PUBLIC_4],
    "ok6": [PUBLIC_6],
    "other": [PUBLIC_4],
    "badca": [ELSEWHERE],
    "second": [DOWN, PUBLIC_4],
    "internal": ["10.0.0.1"],
    "meta": ["169.254.169.254"],
    "loop4": ["127.0.0.1"],
    "localhost": ["127.0.0.1"],
    "loop6": ["::1"],
    "mapped": ["::ffff:127.0.0.1"],
    "nat64": ["64:ff9b::a9fe:a9fe"],
    "sixtofour": ["2002:a9fe:a9fe::1"],
    "ula": ["fd00::1"],
    "zero": ["0.0.0.0"],
    "cgnat": ["100.64.0.1"],
    "azure": ["168.63.129.16"],
    "mixed": [PUBLIC_4, "127.0.0.1"],
    "mixedrev": ["127.0.0.1", PUBLIC_4],
    "dual": [PUBLIC_4, "::1"],
    "denied": ["93.184.217.1"],
    "127.0.0.1.nip.org": ["127.0.0.1"],
    "127.0.0.1.nip.io": ["127.0.0.1"],
    "a9fea9fe.nip.io": ["169.254.169.254"],
    "169-254-169-254.sslip.io": ["169.254.169.254"],
    "localtest.me": ["127.0.0.1"],
    "ok.localtest.me": ["127.0.0.1"],
    "spoofed.burpcollaborator.net": ["127.0.0.1"],
    "xn--bcher-kva": ["10.0.0.1"],
    "compat": ["::a9fe:a9fe"],
    "site": ["fec0::1"],
    "segments": ["5f00::1"],
    "nat64local": ["64:ff9b:1::a9fe:a9fe"],
    "teredo": ["2001:0:7f00:1::1"],
    "relay": ["192.88.99.1"],
    "documentation": ["203.0.113.1", "2001:db8::1"],
    "multicast": ["224.0.0.1", "ff02::1"],
    "mappedmeta": ["::ffff:169.254.169.254"],
    "ec2v6": ["fd00:ec2::254"],
    "linklocal": ["fe80::1"],
    "classe": ["240.0.0.1"],
    "dualrev": [PUBLIC_6, "10.0.0.1"],
    "crowd": [*(f"93.184.218.{n}" for n in range(30)), "192.168.0.1"],
    "operators": [f"{NAT64}a9fe:a9fe"],
    "expired": [PUBLIC_4],
}
ALIASES = {"cname": "internal.example", "alias": "localhost.example"}
DEADLINE_S = 6.0
BODY = b'{"type":"webhook.test"}'
IN_VAIN = "in vain"  #: printed by `run` where namespaces are not allowed


def run(command: str, *arguments: str, timeout_s: float = 100) -> dict:
    """What the command found, as it printed it. `{IN_VAIN: why}` where it could not begin."""
    if shutil.which("unshare") is None:
        return {IN_VAIN: "unshare is not here"}
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", *as_root, "--net", "--mount", sys.executable, HERE, command, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[2])},
    )
    if done.stderr.startswith("unshare:"):
        return {IN_VAIN: done.stderr.strip()}
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- the namespaces -------------------------------------------------------------------------------


def close_off() -> None:
    """Loopback up, all addresses local, our name server the only one."""
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
    """Into the kernel's table of local addresses; the program `ip` may not be here."""
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


# --- the servers, in a process of their own so that the sender's memory is its own ----------------


def serve(folder: Path) -> None:
    """Canary, hostile receiver and name server, until killed."""
    asyncio.run(_serve(folder))


async def _serve(folder: Path) -> None:
    name_server()
    hits = (folder / "hits").open("a", buffering=1)
    contexts = _contexts(folder)

    async def meet(reader, writer):
        address, port = writer.get_extra_info("sockname")[:2]
        hits.write(json.dumps([address.removeprefix("::ffff:"), port]) + "\n")
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()

    for port in PORTS:
        secure = contexts if port in {443, 8443} else None
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            listening = socket.socket(family)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            await asyncio.start_server(meet, sock=listening, ssl=secure, backlog=1000)
    (folder / "ready").touch()
    await asyncio.Event().wait()


async def answer(reader, writer) -> None:
    """By the path: as a good receiver, or in one of the ways to hurt a sender."""
    line = (await reader.readline()).decode("latin-1")
    if " " not in line:
        return  # only looked whether the port is open
    target = line.split(" ")[1]
    while await reader.readline() not in {b"\r\n", b""}:
        pass
    path, _, query = target.partition("?")
    if path == "/redir":
        writer.write(f"HTTP/1.1 302 Found\r\nLocation: {query}\r\n\r\n".encode())
    else:
        await HOSTILE.get(path, _well)(writer)
    await writer.drain()


async def _well(writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


async def _big(writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 137363456\r\n\r\n")
    for _ in range(2096):
        writer.write(bytes(65536))
        await writer.drain()


async def _bomb(writer) -> None:
    packed = gzip.compress(bytes(2**20)) * 200  # one member after the other is one file
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n")
    writer.write(packed)


async def _drip_body(writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    await _drip(writer, b"x")


async def _drip_headers(writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await _drip(writer, b"X-A: b\r\n")


async def _hang(_writer) -> None:
    await asyncio.sleep(60)


async def _big_header(writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 5_000_000)


async def _continue(writer) -> None:
    for _ in range(1000):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        await writer.drain()
    await _well(writer)


async def _reset(writer) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _garbage(writer) -> None:
    writer.write(b"\x00\xff garbage \r\n\r\n")


HOSTILE = {
    "/big": _big,
    "/gzbomb": _bomb,
    "/drip": _drip_body,
    "/hdrdrip": _drip_headers,
    "/hang": _hang,
    "/hdrbig": _big_header,
    "/100": _continue,
    "/garbage": _garbage,
    "/reset": _reset,
}


async def _drip(writer, drop: bytes) -> None:
    for _ in range(60):
        writer.write(drop)
        await writer.drain()
        await asyncio.sleep(1)


def name_server() -> None:
    """Answers as ZONE says; `rebind` changes its mind, `slow` takes 20 s, some are broken."""
    from dnslib import AAAA, CNAME, QTYPE, RCODE, RR, A
    from dnslib.server import BaseResolver, DNSServer

    asked = {"rebind": 0}

    class Zone(BaseResolver):
        def resolve(self, request, _handler):
            reply = request.reply()
            name = str(request.q.qname).removesuffix(".").lower()
            kind = QTYPE[request.q.qtype]
            label = name.removesuffix(".example")
            if label == "slow":
                time.sleep(20)
            if label == "servfail":
                reply.header.rcode = RCODE.SERVFAIL
                return reply
            if label == "rebind" and kind == "A":
                asked["rebind"] += 1
                odd = asked["rebind"] % 2
                reply.add_answer(
                    RR(name, QTYPE.A, ttl=0, rdata=A(PUBLIC_4 if odd else "127.0.0.1"))
                )
                return reply
            alias = ALIASES.get(label)
            addresses = ZONE.get(alias.removesuffix(".example") if alias else label)
            if addresses is None and label != "rebind":
                reply.header.rcode = RCODE.NXDOMAIN
                return reply
            owner = alias or name
            if alias:
                reply.add_answer(RR(name, QTYPE.CNAME, ttl=0, rdata=CNAME(owner)))
            for address in addresses or []:
                v6 = ":" in address
                if kind == ("AAAA" if v6 else "A"):
                    record = AAAA(address) if v6 else A(address)
                    reply.add_answer(RR(owner, request.q.qtype, ttl=0, rdata=record))
            return reply

    for tcp in (False, True):
        DNSServer(Zone(), address="127.0.0.1", port=53, tcp=tcp).start_thread()


# --- TLS -----------------------------------------------------------------------------------------


def _contexts(folder: Path) -> ssl.SSLContext:
    """By the name that the client asks for; the names asked for are written down."""
    names_of = {"": "ok", "badca.example": "badca", "expired.example": "expired"}
    contexts = {name: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for name in names_of}
    for name, file in names_of.items():
        contexts[name].load_cert_chain(folder / f"{file}.pem")
    names = (folder / "names").open("a", buffering=1)

    def choose(connection, name, _context):
        names.write(f"{name}\n")
        if name in contexts:
            connection.context = contexts[name]

    contexts[""].sni_callback = choose
    return contexts[""]


# --- the bench ------------------------------------------------------------------------------------


class World:
    """The servers in their process, and what hit them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_certificates(folder)
        self._process = subprocess.Popen([sys.executable, HERE, "serve", str(folder)])
        while not (folder / "ready").exists():
            assert self._process.poll() is None, "the servers did not start"
            time.sleep(0.02)

    def hits(self) -> list[list]:
        """Address and port of each connection so far."""
        return [json.loads(line) for line in (self.folder / "hits").read_text().splitlines()]

    def leaks(self) -> list[list]:
        """Those that no webhook may ever make."""
        return [hit for hit in self.hits() if hit[0] not in PUBLIC or hit[1] not in WEB_PORTS]

    def names(self) -> list[str]:
        """What clients of TLS asked for."""
        return (self.folder / "names").read_text().split()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def outbound(folder: Path, *, timeout_s: float = 30, **policy):
    """Our transport as a sender uses it; with plain http too if `policy` says so."""
    from darkroom.webhooks.url_policy import UrlPolicy
    from workers.webhooks.resolver import DnsResolver
    from workers.webhooks.transport import WebhookTransport, tls_context

    tls = tls_context(folder / "ca.pem")
    return WebhookTransport(UrlPolicy(**policy), DnsResolver(), tls=tls, timeout_s=timeout_s)


PLAIN_TOO = {"schemes": frozenset({"http", "https"}), "ports": frozenset({80, 443, 8443})}


def rss_mib() -> float:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def bench(world: World, urls: list[str]) -> dict:
    """POST to each URL, all at once; then to the hostile receivers, one after the other's end."""
    import ipaddress

    plain, strict = outbound(world.folder, **PLAIN_TOO), outbound(world.folder)
    denying = outbound(
        world.folder,
        denied_networks=tuple(map(ipaddress.ip_network, ("93.184.217.0/24", f"{NAT64}/96"))),
        denied_names=("other.example",),
        **PLAIN_TOO,
    )

    async def post(transport, url: str) -> str:
        """Twice where nobody answered: this machine may be busy."""
        answer = await transport.post(url, BODY, {})
        if answer.outcome in {"unreachable", "timeout"}:
            answer = await transport.post(url, BODY, {})
        return str(answer.outcome)

    async def post_all(transport, those: list[str]) -> dict[str, str]:
        outcomes = await asyncio.gather(*(post(transport, url) for url in those))
        return dict(zip(those, outcomes, strict=True))

    secure = [f"https{url.removeprefix('http')}" for url in urls if url.startswith("http://")]
    found: dict = {"urls": await post_all(plain, urls), "secure": await post_all(strict, secure)}
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
    found["leaks"] = world.leaks()
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
    found["names"] = world.names()
    found["hostile"] = await _suffer(outbound(world.folder, timeout_s=DEADLINE_S, **PLAIN_TOO))
    found["leaks_after"] = world.leaks()
    found["naive"] = await _naive(world)
    found["hits"] = len(world.hits())
    return found


async def _suffer(plain) -> dict[str, list]:
    """Each hostile answer: its outcome, its seconds, and what all of them cost in memory."""
    before = rss_mib()

    async def post(path: str) -> list:
        began = time.monotonic()
        answer = await plain.post(f"http://ok.example{path}", BODY, {})
        return [str(answer.outcome), time.monotonic() - began, rss_mib() - before]

    suffered = await asyncio.gather(*map(post, HOSTILE))
    return dict(zip(HOSTILE, suffered, strict=True))


async def _naive(world: World) -> list[list]:
    """What a usual client would have hit: the canary must be able to sing."""
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
    return world.leaks()


async def names(world: World) -> dict:
    """Sixty slow names at once, and how long the healthy one takes beside them."""
    plain = outbound(world.folder, **PLAIN_TOO)

    async def post(url: str) -> list:
        began = time.monotonic()
        answer = await plain.post(url, b"{}", {})
        return [str(answer.outcome), time.monotonic() - began]

    bad = ("slow.example", "servfail.example", "nowhere.example")
    crowd = [asyncio.create_task(post(f"http://{bad[n % 3]}/{n}")) for n in range(180)]
    await asyncio.sleep(0.2)
    healthy = [await post("http://ok.example/hook") for _ in range(20)]
    return {"healthy": healthy, "crowd": [await task for task in crowd]}


def firewall(rules: str, uid: str, *places: str) -> dict:
    """Load our rules; then what the sender's user and others still reach, with plain sockets."""
    folder, _, file = rules.rpartition("/")
    subprocess.run(["nft", "-I", folder, "-f", file], check=True, cwd=folder)
    as_sender = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    return {"sender": _reach(places, *as_sender), "others": _reach(places)} if places else {}


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


def _reach(places: tuple[str, ...], *prefix: str) -> dict[str, str]:
    """A system Python: another user may not read our folders."""
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
    if command == "serve":
        serve(Path(arguments[0]))
        return
    close_off()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            if command == "bench":
                found = asyncio.run(bench(world, json.loads(sys.argv[2])))
            elif command == "names":
                found = asyncio.run(names(world))
            else:
                found = firewall(f"{arguments[0]}/{arguments[1]}", *arguments[2:])
        finally:
            world.end()
    print(json.dumps(found))  # noqa: T201  # to `run`, in the process outside


if __name__ == "__main__":
    threading.stack_size(256 * 1024)  # the name server takes a thread for each slow name
    main()
