"""Webhooks per second of one sender process to a receiver on loopback, and commit to receipt.

`python -m benchmarks.webhook_delivery [--deliveries 4000] [--rounds 3] [--events 400] [--rate 20]`.
First a batch is canceled: one transaction with an event per job, timed from its commit until the
receiver has the last POST. Then jobs finish one at a time at a steady rate, each timed from its
commit to its receipt. The receiver is another process that only reads and responds 200, over plain
HTTP or TLS (every POST is a new connection, with its own handshake). The sender's CPU time per
webhook is the figure that a busy machine changes least.
"""

import argparse
import asyncio
import multiprocessing
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import update

from benchmarks._support import database_server, new_database, redis_server
from darkroom import batches
from darkroom.db.connection import Sessions, open_sessions
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.db.webhook_tables import WebhookEndpoint
from darkroom.event_types import EventType
from darkroom.generation.model_registry import ModelRegistry, load_registry
from darkroom.generation.params import JobInput
from darkroom.jobs import lifecycle
from darkroom.jobs.bulk_insert import NewJob
from darkroom.queue.notifier import WorkNotifier
from darkroom.settings import Settings
from darkroom.webhooks import endpoints as webhook_endpoints
from darkroom.webhooks.secret_box import SecretBox

_TIMEOUT_S: Final = 120.0
_SHAPES: Final = (("http", 1), ("http", 20), ("https", 1), ("https", 20))

Receipts = list[tuple[float, bytes]]  #: the wall-clock time and the whole POST


# --- the receiver ---------------------------------------------------------------------------------


class Reader(asyncio.Protocol):
    """Connection that reads one POST, responds 200 and closes."""

    def __init__(self, receipts: Receipts) -> None:
        self._receipts = receipts
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for the response."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Respond once the body is complete."""
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().partition(b"content-length: ")[2].split()[0]):
            self._receipts.append((time.time(), self._read))
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            self._transport.close()


def receive(control: Connection, certificate: str) -> None:
    """Serve both schemes until `end`; answer any other message with the POSTs since the last."""
    asyncio.run(_receive(control, certificate))


async def _receive(control: Connection, certificate: str) -> None:
    receipts: Receipts = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    ports = {}
    for scheme, context in (("http", None), ("https", tls)):
        server = await loop.create_server(
            lambda: Reader(receipts), "127.0.0.1", 0, ssl=context, backlog=4096
        )
        ports[scheme] = server.sockets[0].getsockname()[1]
    control.send(ports)
    while await loop.run_in_executor(None, control.recv) != "end":
        control.send(receipts[:])
        receipts.clear()


def make_certificate(file: Path) -> None:
    """Write a self-signed certificate for 127.0.0.1, with its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a receiver")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(certificate.public_bytes(Encoding.PEM) + private)


# --- the measurements -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """Database, receiver and sender of one benchmark."""

    sessions: Sessions
    notifier: WorkNotifier
    registry: ModelRegistry
    receiver: Connection
    ports: Mapping[str, int]
    sender: int  #: process id

    def sender_cpu_s(self) -> float:
        """Return the CPU seconds of the sender so far, in user and system mode."""
        fields = Path(f"/proc/{self.sender}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def replace_endpoints(self, scheme: str, endpoints: int) -> None:
        """Replace all endpoints by `endpoints` new ones."""
        with self.sessions.begin() as session:
            session.execute(update(WebhookEndpoint).values(deleted_at=datetime.now(UTC)))
            for number in range(endpoints):
                webhook_endpoints.create(
                    session,
                    DEFAULT_TENANT,
                    url=f"{scheme}://127.0.0.1:{self.ports[scheme]}/{number}",
                    event_types={EventType.JOB_CANCELED},
                    secret_box=SecretBox(""),
                    max_endpoints=10_000,
                )

    def queue_batch(self, count: int) -> str:
        """Queue a batch of `count` jobs. Return its id."""
        jobs = [_new_job(self.registry, number) for number in range(1, count + 1)]
        with self.sessions.begin() as session:
            batch = batches.create(
                session, DEFAULT_TENANT, total=count, label="b", webhook_url=None
            )
            lifecycle.submit(session, DEFAULT_TENANT, jobs, batch_id=batch.id)
            return batch.id

    def received(self) -> Receipts:
        """Return the POSTs since the last call."""
        self.receiver.send("take")
        receipts: Receipts = self.receiver.recv()
        return receipts

    def wait_for(self, count: int) -> Receipts:
        """Wait for `count` POSTs."""
        receipts: Receipts = []
        deadline = time.monotonic() + _TIMEOUT_S
        while len(receipts) < count:
            receipts += self.received()
            if time.monotonic() > deadline:
                sys.exit(
                    f"only {len(receipts)} of {count} webhooks arrived within {_TIMEOUT_S:.0f} s"
                )
            time.sleep(0.05)
        return receipts


def _new_job(registry: ModelRegistry, row_number: int | None = None) -> NewJob:
    job = JobInput(prompt="a red apple")
    params = registry.resolve(job)
    key = registry.models[params.model].microbatch_key(params)
    return NewJob.of(job, params, key, row_number=row_number)


@dataclass(frozen=True)
class BurstResult:
    """Result from the commit of all events to the last receipt."""

    rate: float  #: webhooks per second
    cpu_ms: float  #: of the sender, per webhook


def burst(env: Environment, scheme: str, endpoints: int, deliveries: int) -> BurstResult:
    """Deliver all events at once."""
    env.replace_endpoints(scheme, endpoints)
    batch_id = env.queue_batch(deliveries // endpoints)
    with env.sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)
    committed, cpu_s = time.time(), env.sender_cpu_s()
    env.notifier.notify_webhook_senders()
    receipts = env.wait_for(deliveries // endpoints * endpoints)
    used_s = env.sender_cpu_s() - cpu_s
    rate = len(receipts) / (max(at for at, _ in receipts) - committed)
    return BurstResult(rate, 1000 * used_s / len(receipts))


def steady(env: Environment, scheme: str, events: int, rate: float) -> Sequence[float]:
    """Measure the milliseconds from the commit of a finished job to its receipt, one by one."""
    env.replace_endpoints(scheme, 1)
    jobs = [_new_job(env.registry) for _ in range(events)]
    with env.sessions.begin() as session:
        ids = lifecycle.submit(session, DEFAULT_TENANT, jobs)
    committed: dict[str, float] = {}
    began = time.monotonic()
    for number, job_id in enumerate(ids):
        time.sleep(max(began + number / rate - time.monotonic(), 0))
        with env.sessions.begin() as session:
            lifecycle.cancel(session, DEFAULT_TENANT, job_id)
        committed[job_id] = time.time()
        env.notifier.notify_webhook_senders()
    receipts = env.wait_for(events)
    return sorted(1000 * (at - committed[_job_of(post)]) for at, post in receipts)


def _job_of(post: bytes) -> str:
    return post.partition(b'"id":"')[2].partition(b'"')[0].decode()


@contextmanager
def environment(folder: Path) -> Iterator[Environment]:
    """Start the database, the receiver and a sender."""
    certificate = folder / "certificate.pem"
    make_certificate(certificate)
    with database_server(folder) as admin_url, redis_server(folder) as redis_url:
        database_url = new_database(admin_url)
        variables = {
            "DARKROOM_DATABASE_URL": database_url,
            "DARKROOM_REDIS_URL": redis_url,
            "DARKROOM_WEBHOOK_ALLOW_PRIVATE": "1",
            "DARKROOM_WEBHOOK_CA_FILE": str(certificate),
        }
        with receiver(certificate) as (control, ports), sender(folder, variables) as process:
            settings = Settings(database_url=database_url, redis_url=redis_url)
            notifier = WorkNotifier(settings)
            registry = load_registry(settings.models_dir, settings.default_model)
            yield Environment(
                open_sessions(database_url), notifier, registry, control, ports, process
            )
            notifier.close()


@contextmanager
def receiver(certificate: Path) -> Iterator[tuple[Connection, Mapping[str, int]]]:
    """Start a receiver process. Yield its connection, and its ports by scheme."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=receive, args=(theirs, str(certificate)))
    process.start()
    yield ours, ours.recv()
    ours.send("end")
    process.join()


@contextmanager
def sender(folder: Path, variables: Mapping[str, str]) -> Iterator[int]:
    """Start `python -m workers send-webhooks`. Yield its process id once it is ready."""
    ready, log = folder / "ready", folder / "sender.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "send-webhooks"],
            env=os.environ | variables | {"DARKROOM_READY_FILE": str(ready)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while not ready.exists():
            if process.poll() is not None:
                sys.exit(f"the sender did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Run both measurements for both schemes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deliveries", type=int, default=4000, help="of a round (default 4000)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating (default 3)")
    parser.add_argument("--events", type=int, default=400, help="one at a time (default 400)")
    parser.add_argument("--rate", type=float, default=20, help="of those, a second (default 20)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, environment(Path(folder)) as env:
        burst(env, "https", 20, 400)
        bursts: dict[tuple[str, int], list[BurstResult]] = {shape: [] for shape in _SHAPES}
        for _ in track(range(arguments.rounds), "bursts", console=Console(stderr=True)):
            for shape, results in bursts.items():
                results.append(burst(env, *shape, arguments.deliveries))
        waits = {
            scheme: steady(env, scheme, arguments.events, arguments.rate)
            for scheme in ("http", "https")
        }
    print_bursts(bursts, arguments.deliveries)
    print_waits(waits, arguments.rate)


def print_bursts(bursts: Mapping[tuple[str, int], Sequence[BurstResult]], deliveries: int) -> None:
    """Print the medians of the rounds, and every round."""
    titles = ("one sender process", "endpoints", f"webhooks/s, {deliveries} at once", "rounds")
    table = Table(*titles, "its CPU, ms each")
    for (scheme, endpoints), results in bursts.items():
        rates = [each.rate for each in results]
        rounds = " ".join(f"{rate:.0f}" for rate in rates)
        cpu_ms = statistics.median(each.cpu_ms for each in results)
        median = f"{statistics.median(rates):.0f}"
        table.add_row(scheme, str(endpoints), median, rounds, f"{cpu_ms:.2f}")
    Console().print(table)


def print_waits(waits: Mapping[str, Sequence[float]], rate: float) -> None:
    """Print the time from commit to receipt, one webhook at a time."""
    table = Table(f"commit to receipt, {rate:g} per second", "p50, ms", "p95, ms", "worst, ms")
    for scheme, times in waits.items():
        shares = (times[int(share * len(times))] for share in (0.5, 0.95))
        table.add_row(scheme, *(f"{each:.1f}" for each in (*shares, times[-1])))
    Console().print(table)


if __name__ == "__main__":
    main()
