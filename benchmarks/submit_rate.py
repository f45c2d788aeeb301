"""Durable POSTs per second of one API process, and of the same app with a Celery task per job.

`python -m benchmarks.submit_rate [--requests 4000] [--connections 64] [--rounds 3] [--idle 60]`.
Both apps validate and respond alike; ours has then committed the job to PostgreSQL, the other has
put a message into Redis. They are loaded in turn, in one run; ratios are of medians. Then it
measures the time from a job's commit to its claim, on an idle stack with workers.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import func, select

from benchmarks._support import (
    Load,
    database_server,
    new_database,
    post_many,
    redis_server,
    serving,
    stack,
)
from darkroom.client.http import Client
from darkroom.db.connection import open_sessions
from darkroom.db.tables import Job

BODY = b'{"prompt": "a red apple", "width": 64, "height": 64, "num_inference_steps": 1}'


def compare(arguments: argparse.Namespace) -> None:
    """Load both apps in turn and print their rates."""
    ours: list[Load] = []
    theirs: list[Load] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        database_server(Path(folder)) as admin_url,
        redis_server(Path(folder)) as redis_url,
    ):
        environment = {
            "DARKROOM_DATABASE_URL": new_database(admin_url),
            "DARKROOM_REDIS_URL": redis_url,
            "DARKROOM_AUTH": "off",
        }
        task_per_job = ["-m", "benchmarks.baselines.celery_task_per_job"]
        with (
            serving(["-m", "api"], environment) as (_, our_url),
            serving(task_per_job, environment) as (_, their_url),
        ):
            for url in (our_url, their_url):
                load(url, arguments, requests=500)
            for _ in track(range(arguments.rounds), "loading", console=Console(stderr=True)):
                ours.append(load(our_url, arguments, requests=arguments.requests))
                theirs.append(load(their_url, arguments, requests=arguments.requests))
    print_comparison(ours, theirs)


def load(url: str, arguments: argparse.Namespace, *, requests: int) -> Load:
    """Send the same POST `requests` times."""
    return post_many(f"{url}/v1/jobs", BODY, requests=requests, connections=arguments.connections)


def print_comparison(ours: Sequence[Load], theirs: Sequence[Load]) -> None:
    """Print medians of the rounds, and their ratio."""
    table = Table("app", "POSTs/s", "p50, ms", "p99, ms")
    for name, loads in (("a committed row each", ours), ("a Celery task each", theirs)):
        rate = statistics.median(load.rate for load in loads)
        p50, p99 = (
            statistics.median(load.quantile_ms(share) for load in loads) for share in (0.5, 0.99)
        )
        table.add_row(name, f"{rate:.0f}", f"{p50:.1f}", f"{p99:.1f}")
    ratio = statistics.median(a.rate / b.rate for a, b in zip(ours, theirs, strict=True))
    table.add_row("ratio", f"{ratio:.2f}", "", "")
    Console().print(table)


def measure_idle(jobs: int) -> None:
    """Measure the time from commit to claim, one job at a time on an idle stack."""
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder) / "data") as address:
        secret = Path(folder) / "data" / "secrets" / "darkroom_database_url"
        small = {"prompt": "a red apple", "width": 64, "height": 64, "num_inference_steps": 1}
        with Client(address) as client:
            for _ in track(range(jobs + 5), "idle", console=Console(stderr=True)):
                job = client.submit(small)
                while job["status"] in {"queued", "running"}:
                    job = client.job(job["id"], wait=True)
        wait_ms = func.extract("epoch", Job.started_at - Job.created_at) * 1000
        with open_sessions(secret.read_text(), pool_size=1).begin() as session:
            waits = [float(ms) for ms in session.scalars(select(wait_ms).order_by(Job.id))]
    ordered = sorted(waits[5:])
    p50, p95 = ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
    Console().print(f"commit to claim, idle, {jobs} jobs: p50 {p50:.1f} ms, p95 {p95:.1f} ms")


def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000, help="of one round (default 4000)")
    parser.add_argument("--connections", type=int, default=64, help="at once (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    parser.add_argument(
        "--idle",
        type=int,
        default=60,
        help="jobs, one at a time, on an idle stack; 0 skips it (default 60)",
    )
    arguments = parser.parse_args()
    compare(arguments)
    if arguments.idle:
        measure_idle(arguments.idle)


if __name__ == "__main__":
    main()
