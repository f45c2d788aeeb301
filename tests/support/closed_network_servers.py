"""Servers of the closed network: canary, hostile receiver and name server, in one process.

`python -m tests.support.closed_network_servers FOLDER`: a process of its own, so that the memory of
the sender is measured alone. It writes connections to FOLDER/hits, TLS names to FOLDER/names.
"""

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import struct
import sys
import threading
import time
from pathlib import Path

PUBLIC_4, PUBLIC_6 = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"
ELSEWHERE, DOWN = "93.184.216.35", "93.184.216.36"  # another public host; one without servers
PUBLIC = {PUBLIC_4, PUBLIC_6, ELSEWHERE}
NAT64 = "2a00:1098:2b::"  # an operator's own translation prefix, in public space
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
    "many": [*(f"93.184.218.{n}" for n in range(30)), "192.168.0.1"],
    "operators": [f"{NAT64}a9fe:a9fe"],
    "expired": [PUBLIC_4],
}
ALIASES = {"cname": "internal.example", "alias": "localhost.example"}


def serve(folder: Path) -> None:
    """Run canary, hostile receiver and name server until killed."""
    asyncio.run(_serve(folder))


async def _serve(folder: Path) -> None:
    name_server()
    hits = (folder / "hits").open("a", buffering=1)
    contexts = _contexts(folder)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
            await asyncio.start_server(handle, sock=listening, ssl=secure, backlog=1000)
    (folder / "ready").touch()
    await asyncio.Event().wait()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer like a good receiver, or by the path in one of the ways to hurt a sender."""
    line = (await reader.readline()).decode("latin-1")
    if " " not in line:
        return  # a probe whether the port is open
    target = line.split(" ")[1]
    while await reader.readline() not in {b"\r\n", b""}:
        pass
    path, _, query = target.partition("?")
    if path == "/redir":
        writer.write(f"HTTP/1.1 302 Found\r\nLocation: {query}\r\n\r\n".encode())
    else:
        await HOSTILE.get(path, _ok)(writer)
    await writer.drain()


async def _ok(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


async def _big(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 137363456\r\n\r\n")
    for _ in range(2096):
        writer.write(bytes(65536))
        await writer.drain()


async def _bomb(writer: asyncio.StreamWriter) -> None:
    packed = gzip.compress(bytes(2**20)) * 200  # one member after the other is one file
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n")
    writer.write(packed)


async def _drip_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    await _drip(writer, b"x")


async def _drip_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await _drip(writer, b"X-A: b\r\n")


async def _hang(_writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def _big_header(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 5_000_000)


async def _continue(writer: asyncio.StreamWriter) -> None:
    for _ in range(1000):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        await writer.drain()
    await _ok(writer)


async def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _garbage(writer: asyncio.StreamWriter) -> None:
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


async def _drip(writer: asyncio.StreamWriter, drop: bytes) -> None:
    for _ in range(60):
        writer.write(drop)
        await writer.drain()
        await asyncio.sleep(1)


def name_server() -> None:
    """Answer as ZONE says; `rebind` alternates, `slow` takes 20 s, `servfail` is broken."""
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


def _contexts(folder: Path) -> ssl.SSLContext:
    """Choose a certificate by SNI; write the requested names down."""
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


if __name__ == "__main__":
    threading.stack_size(256 * 1024)  # the name server starts a thread for each slow name
    serve(Path(sys.argv[1]))
