"""Webhooks a second of one sender process to a receiver on loopback, and from commit to receipt.

`python -m benchmarks.webhook_delivery [--deliveries 4000] [--rounds 3] [--events 400] [--rate 20]`.
A batch is canceled, which is one transaction with an event a job; the clock runs from its commit
until the receiver has the last POST. Then jobs end one at a time at a steady rate, and for each the
time from its commit to its receipt is taken. The receiver is a process of its own that only reads
and answers 200, over plain HTTP or TLS (every POST is a new connection, and so a handshake each).
The sender's CPU time for each is the figure that a busy machine changes least.
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

_GIVE_UP_S: Final = 120.0
_SHAPES: Final = (("http", 1), ("http", 20), ("https", 1), ("https", 20))

Receipts = list[tuple[float, bytes]]  #: when by the wall clock, and the whole POST


# --- the receiver ---------------------------------------------------------------------------------


class Reader(asyncio.Protocol):
    """Reads one POST, answers 200, closes."""

    def __init__(self, receipts: Receipts) -> None:
        self._receipts = receipts
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what to answer by."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer once the body is whole."""
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().partition(b"content-length: ")[2].split()[0]):
            self._receipts.append((time.time(), self._read))
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            self._transport.close()


def receive(control: Connection, certificate: str) -> None:
    """Serve both schemes until told `end`; each other word is answered with what came since."""
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
    """Of 127.0.0.1, signed by itself; with its key."""
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


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A database, a receiver and a sender."""

    sessions: Sessions
    notifier: WorkNotifier
    registry: ModelRegistry
    receiver: Connection
    ports: Mapping[str, int]
    sender: int  #: its process

    def sender_cpu_s(self) -> float:
        """What the sender has used so far, in user and system mode."""
        fields = Path(f"/proc/{self.sender}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def listen(self, scheme: str, endpoints: int) -> None:
        """So many endpoints there, and no others."""
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
        """A batch of so many queued jobs; its id."""
        made = [_new_job(self.registry, number) for number in range(1, count + 1)]
        with self.sessions.begin() as session:
            batch = batches.create(
                session, DEFAULT_TENANT, total=count, label="b", webhook_url=None
            )
            lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
            return batch.id

    def received(self) -> Receipts:
        """What came since this was last asked."""
        self.receiver.send("take")
        taken: Receipts = self.receiver.recv()
        return taken

    def wait_for(self, count: int) -> Receipts:
        """That many POSTs."""
        came: Receipts = []
        deadline = time.monotonic() + _GIVE_UP_S
        while len(came) < count:
            came += self.received()
            if time.monotonic() > deadline:
                sys.exit(f"only {len(came)} of {count} webhooks came within {_GIVE_UP_S:.0f} s")
            time.sleep(0.05)
        return came


def _new_job(registry: ModelRegistry, row_number: int | None = None) -> NewJob:
    job = JobInput(prompt="a red apple")
    params = registry.resolve(job)
    key = registry.models[params.model].microbatch_key(params)
    return NewJob.of(job, params, key, row_number=row_number)


@dataclass(frozen=True)
class Flood:
    """From the commit of all events to the last receipt."""

    rate: float  #: webhooks a second
    cpu_ms: float  #: of the sender, for each


def flood(lab: Lab, scheme: str, endpoints: int, deliveries: int) -> Flood:
    """All at once."""
    lab.listen(scheme, endpoints)
    batch_id = lab.queue_batch(deliveries // endpoints)
    with lab.sessions.begin() as session:
        lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)
    committed, cpu_s = time.time(), lab.sender_cpu_s()
    lab.notifier.notify_webhook_senders()
    came = lab.wait_for(deliveries // endpoints * endpoints)
    used_s = lab.sender_cpu_s() - cpu_s
    rate = len(came) / (max(at for at, _ in came) - committed)
    return Flood(rate, 1000 * used_s / len(came))


def trickle(lab: Lab, scheme: str, events: int, rate: float) -> Sequence[float]:
    """Milliseconds from the commit of a job's end to its receipt, one job after the other."""
    lab.listen(scheme, 1)
    made = [_new_job(lab.registry) for _ in range(events)]
    with lab.sessions.begin() as session:
        ids = lifecycle.submit(session, DEFAULT_TENANT, made)
    committed: dict[str, float] = {}
    began = time.monotonic()
    for number, job_id in enumerate(ids):
        time.sleep(max(began + number / rate - time.monotonic(), 0))
        with lab.sessions.begin() as session:
            lifecycle.cancel(session, DEFAULT_TENANT, job_id)
        committed[job_id] = time.time()
        lab.notifier.notify_webhook_senders()
    came = lab.wait_for(events)
    return sorted(1000 * (at - committed[_job_of(post)]) for at, post in came)


def _job_of(post: bytes) -> str:
    return post.partition(b'"id":"')[2].partition(b'"')[0].decode()


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """All of it, for as long as the block."""
    certificate = folder / "certificate.pem"
    make_certificate(certificate)
    with database_server(folder) as admin_url, redis_server(folder) as redis_url:
        database_url = new_database(admin_url)
        environment = {
            "DARKROOM_DATABASE_URL": database_url,
            "DARKROOM_REDIS_URL": redis_url,
            "DARKROOM_WEBHOOK_ALLOW_PRIVATE": "1",
            "DARKROOM_WEBHOOK_CA_FILE": str(certificate),
        }
        with receiver(certificate) as (control, ports), sender(folder, environment) as process:
            settings = Settings(database_url=database_url, redis_url=redis_url)
            notifier = WorkNotifier(settings)
            registry = load_registry(settings.models_dir, settings.default_model)
            yield Lab(open_sessions(database_url), notifier, registry, control, ports, process)
            notifier.close()


@contextmanager
def receiver(certificate: Path) -> Iterator[tuple[Connection, Mapping[str, int]]]:
    """A receiver in a process of its own, and its ports by scheme."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=receive, args=(theirs, str(certificate)))
    process.start()
    yield ours, ours.recv()
    ours.send("end")
    process.join()


@contextmanager
def sender(folder: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """`python -m workers send-webhooks`, ready; its process."""
    ready, log = folder / "ready", folder / "sender.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "send-webhooks"],
            env=os.environ | environment | {"DARKROOM_READY_FILE": str(ready)},
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
    """Both measurements, for both schemes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deliveries", type=int, default=4000, help="of a round (default 4000)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating (default 3)")
    parser.add_argument("--events", type=int, default=400, help="one at a time (default 400)")
    parser.add_argument("--rate", type=float, default=20, help="of those, a second (default 20)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, lab(Path(folder)) as there:
        flood(there, "https", 20, 400)
        floods: dict[tuple[str, int], list[Flood]] = {shape: [] for shape in _SHAPES}
        for _ in track(range(arguments.rounds), "floods", console=Console(stderr=True)):
            for shape, found in floods.items():
                found.append(flood(there, *shape, arguments.deliveries))
        waits = {
            scheme: trickle(there, scheme, arguments.events, arguments.rate)
            for scheme in ("http", "https")
        }
    print_floods(floods, arguments.deliveries)
    print_waits(waits, arguments.rate)


def print_floods(floods: Mapping[tuple[str, int], Sequence[Flood]], deliveries: int) -> None:
    """The medians of the rounds, and the rounds."""
    titles = ("one sender process", "endpoints", f"webhooks/s, {deliveries} at once", "rounds")
    table = Table(*titles, "its CPU, ms each")
    for (scheme, endpoints), found in floods.items():
        rates = [each.rate for each in found]
        rounds = " ".join(f"{rate:.0f}" for rate in rates)
        cpu_ms = statistics.median(each.cpu_ms for each in found)
        median = f"{statistics.median(rates):.0f}"
        table.add_row(scheme, str(endpoints), median, rounds, f"{cpu_ms:.2f}")
    Console().print(table)


def print_waits(waits: Mapping[str, Sequence[float]], rate: float) -> None:
    """How long after the commit they came, when there was nothing else to send."""
    table = Table(f"commit to receipt, {rate:g} a second", "p50, ms", "p95, ms", "worst, ms")
    for scheme, found in waits.items():
        shares = (found[int(share * len(found))] for share in (0.5, 0.95))
        table.add_row(scheme, *(f"{each:.1f}" for each in (*shares, found[-1])))
    Console().print(table)


if __name__ == "__main__":
    main()
