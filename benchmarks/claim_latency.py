"""Milliseconds of a claim, and claims per second, by the length of the queue and its keys.

`python -m benchmarks.claim_latency [--rounds 200]` fills databases of its own with 1, 10,000 and
1,000,000 queued jobs under 1, 10 and 100 microbatch keys, and claims from them in turn, so that
whatever else the machine does falls on all of them alike. A claim is the whole transaction, commit
included.

Then, of each, a poll: reading a job picked at random, its place in the queue and its forecast; and
the look at the queue that all polls of a second share, with and without the scan of a long queue.
"""

import argparse
import hashlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import text

from benchmarks._support import database_server, new_database
from darkroom.db.connection import Sessions, open_sessions
from darkroom.db.tables import DEFAULT_TENANT, Job
from darkroom.forecast import queue_position, snapshot
from darkroom.generation.model_registry import ModelRegistry, load_registry
from darkroom.generation.params import JobInput
from darkroom.jobs import lifecycle
from darkroom.jobs.bulk_insert import NewJob
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed
from darkroom.settings import Settings

QUEUED = (1, 10_000, 1_000_000)
KEYS = (1, 10, 100)
LEASE = timedelta(seconds=30)
WARM_UP = 10


@dataclass
class Queue:
    """A database with so many jobs queued, and what claiming from it took."""

    sessions: Sessions
    queued: int
    keys: int
    claims_s: list[float] = field(default_factory=list)
    polls_s: list[float] = field(default_factory=list)
    looks_s: list[float] = field(default_factory=list)
    scan_s: float = 0.0


def submit_one(sessions: Sessions, registry: ModelRegistry) -> str:
    """A small bulk job."""
    job = JobInput(prompt="a red apple", width=64, height=64, priority="bulk")  # type: ignore[arg-type]
    params = registry.resolve(job)
    key = registry.models[params.model].microbatch_key(params)
    with sessions.begin() as session:
        [job_id] = lifecycle.submit(session, DEFAULT_TENANT, [NewJob.of(job, params, key)])
    return job_id


def fill(queue: Queue, registry: ModelRegistry) -> None:
    """Copy one job, on the server, as often as asked."""
    first = submit_one(queue.sessions, registry)
    own = {"id", "start_tag", "microbatch_key"}
    columns = ", ".join(column.name for column in Job.__table__.columns if column.name not in own)
    with queue.sessions.begin() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(
            text(
                f"INSERT INTO job (id, start_tag, microbatch_key, {columns}) "  # noqa: S608  # our names
                f"SELECT 'job_' || md5(n::text), n, 'key ' || n % :keys, {columns} "
                "FROM job, generate_series(1, :queued - 1) n WHERE id = :first"
            ),
            {"first": first, "keys": queue.keys, "queued": queue.queued},
        )
    with queue.sessions.begin() as session:
        session.execute(text("ANALYZE job"))


def claim_once(queue: Queue, limits: dict[str, int]) -> None:
    """One claim, timed, and its end."""
    began = time.perf_counter()
    with queue.sessions.begin() as session:
        taken = claims.claim(session, "benchmark", max_microbatch=limits, lease=LEASE)
    queue.claims_s.append(time.perf_counter() - began)
    ends = [Failed(job.id, "benchmark", "not drawn") for job in taken]
    with queue.sessions.begin() as session:
        dispatches.settle(session, taken[0].dispatch_id or 0, ends)


def ask_about(queue: Queue, registry: ModelRegistry, polls: int) -> None:
    """What a poll of any waiting job costs; and the look behind it, with and without its scan."""
    chance = random.Random(1)  # the same jobs each time
    began = time.perf_counter()
    with queue.sessions.begin() as session:
        look = snapshot.take_snapshot(session, registry)
    queue.scan_s = time.perf_counter() - began
    for _ in range(polls):
        began = time.perf_counter()
        with queue.sessions.begin() as session:
            look = snapshot.take_snapshot(session, registry, replace(look.scan, due=math.inf))
        queue.looks_s.append(time.perf_counter() - began)
        number = chance.randrange(max(1, queue.queued - 1)) + 1
        job_id = f"job_{hashlib.md5(str(number).encode()).hexdigest()}"  # noqa: S324  # as in `fill`
        began = time.perf_counter()
        with queue.sessions.begin() as session:
            job = session.get(Job, job_id)
            if job is not None:
                queue_position.position(session, job)
                look.ask(job)
        queue.polls_s.append(time.perf_counter() - began)


def main() -> None:
    """Fill the queues, claim from them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="claims of each (default 200)")
    rounds = parser.parse_args().rounds
    settings = Settings()
    registry = load_registry(settings.models_dir, settings.default_model)
    limits = {model.name: model.max_microbatch for model in registry.models.values()}
    with tempfile.TemporaryDirectory() as folder, database_server(Path(folder)) as admin_url:
        queues = [
            Queue(open_sessions(new_database(admin_url), pool_size=1), queued, keys)
            for keys in KEYS
            for queued in QUEUED
        ]
        for queue in track(queues, "filling", console=Console(stderr=True)):
            fill(queue, registry)
        for _ in track(range(rounds + WARM_UP), "claiming", console=Console(stderr=True)):
            for queue in queues:
                if queue.queued == 1:
                    submit_one(queue.sessions, registry)
                claim_once(queue, limits)
        for queue in queues:
            ask_about(queue, registry, polls=rounds)
            queue.sessions.kw["bind"].dispose()
    print_table(queues)
    print_polls(queues)


def print_table(queues: Sequence[Queue]) -> None:
    """A line for each queue; the ratio is to the 10,000 jobs of as many keys."""
    table = Table("keys", "queued", "claim, ms", "p95, ms", "claims/s", "ratio")
    middle = {queue.keys: _median(queue) for queue in queues if queue.queued == QUEUED[1]}
    for queue in queues:
        ordered = sorted(queue.claims_s[WARM_UP:])
        table.add_row(
            str(queue.keys),
            f"{queue.queued:,}",
            f"{1000 * _median(queue):.2f}",
            f"{1000 * ordered[int(0.95 * len(ordered))]:.2f}",
            f"{1 / _median(queue):.0f}",
            f"{_median(queue) / middle[queue.keys]:.2f}",
        )
    Console().print(table)


def print_polls(queues: Sequence[Queue]) -> None:
    """A line for each queue."""
    table = Table("keys", "queued", "poll, ms", "p95, ms", "look, ms", "with its scan, ms")
    for queue in queues:
        polls = sorted(queue.polls_s)
        table.add_row(
            str(queue.keys),
            f"{queue.queued:,}",
            f"{1000 * statistics.median(polls):.2f}",
            f"{1000 * polls[int(0.95 * len(polls))]:.2f}",
            f"{1000 * statistics.median(queue.looks_s):.1f}",
            f"{1000 * queue.scan_s:.0f}",
        )
    Console().print(table)


def _median(queue: Queue) -> float:
    return statistics.median(queue.claims_s[WARM_UP:])


if __name__ == "__main__":
    main()
