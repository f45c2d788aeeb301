"""Support for benchmarks: temporary servers, a temporary stack, many requests at once."""

import asyncio
import os
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psycopg

from darkroom.db.connection import migrate
from darkroom.local import process as child_process
from darkroom.local import servers
from darkroom.local.data_dir import private_dir
from darkroom.local.ports import free_port
from darkroom.local.postgres import postgres


@contextmanager
def database_server(folder: Path) -> Iterator[str]:
    """Start PostgreSQL as `darkroom up` does. Yield an administrator's URL."""
    private_dir(folder)
    password, log = secrets.token_urlsafe(16), folder / "postgres.log"
    spec = postgres(folder / "postgres", port=free_port(), password=password, log=log)
    with child_process.running(spec) as server:
        yield server.url


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Start Redis as `darkroom up` does. Yield its URL."""
    private_dir(folder)
    password, log = secrets.token_urlsafe(16), folder / "redis.log"
    spec = servers.redis(folder / "redis", port=free_port(), password=password, log=log)
    with child_process.running(spec) as server:
        yield server.url


def new_database(admin_url: str) -> str:
    """Create a migrated, empty database and return its URL."""
    name = f"benchmark_{uuid.uuid4().hex}"
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    url = f"{admin_url.rpartition('/')[0]}/{name}"
    migrate(url)
    return url


@contextmanager
def serving(
    command: Sequence[str], environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start an API process. Yield it and its address."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | environment | {"DARKROOM_API_PORT": port},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not _is_up(url):
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)} did not start")
            time.sleep(0.1)
        yield process, url
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz").is_success
    except httpx2.TransportError:
        return False


@contextmanager
def stack(data_dir: Path) -> Iterator[str]:
    """Start a whole stack. Yield its address."""
    ready = data_dir / "address"
    data_dir.mkdir(parents=True, exist_ok=True)
    wait = (
        f"import os, sys; open({str(ready)!r}, 'w').write(os.environ['DARKROOM_API']);"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-m", "darkroom.cli", "up", "--port=0", f"--data-dir={data_dir}"]
    process = subprocess.Popen(
        [*command, "--", sys.executable, "-c", wait], stdin=subprocess.PIPE, env=os.environ
    )
    try:
        while not (ready.exists() and ready.read_text()):
            if process.poll() is not None:
                sys.exit("the stack did not start")
            time.sleep(0.1)
        yield ready.read_text()
    finally:
        process.communicate()


@dataclass(frozen=True)
class Load:
    """Measurements of many requests: the latency of each, and the elapsed time."""

    latencies_s: Sequence[float]
    elapsed_s: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies_s) / self.elapsed_s

    def quantile_ms(self, share: float) -> float:
        """Return the latency in milliseconds at this quantile."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def post_many(url: str, body: bytes, *, requests: int, connections: int) -> Load:
    """POST the JSON `requests` times; any response but 202 ends the benchmark.

    Uses bare sockets: a full HTTP client would be slower than the server that it measures.
    """
    return asyncio.run(_post_many(url, body, requests, connections))


async def _post_many(url: str, body: bytes, requests: int, connections: int) -> Load:
    parts = urlsplit(url)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    latencies: list[float] = []
    remaining = iter(range(requests))

    async def post_in_turn() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for _ in remaining:
            began = time.perf_counter()
            writer.write(head.encode() + body)
            await _accepted(reader)
            latencies.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(post_in_turn() for _ in range(connections)))
    return Load(latencies, time.perf_counter() - began)


async def _accepted(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    if b" 202 " not in head[:16]:
        sys.exit(f"not accepted: {head!r} {body!r}")
