"""Seconds and memory from the upload of a file of rows until all of its jobs are queued.

`python -m benchmarks.file_import [--rows 100000] [--rounds 3] [--tasks 20000]` sends, to one API
process with real servers and no worker: a file of rows, several times; ten files at once with as
many rows together; and half as many rows of which 1 % are bad, which are skipped, corrected and
sent again. In turn with the first, another process sends one Celery task per row: the first
`--tasks` rows, scaled to all. Memory is the peak of the API process, above its idle memory.
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks._support import database_server, new_database, redis_server, serving

CSV = {"Content-Type": "text/csv"}
MIB = 2**20


@dataclass
class Run:
    """Duration and peak memory of one measurement."""

    seconds: float = 0
    peak_bytes: int = 0  #: above the idle process


def rows(count: int, bad_every: int | None = None) -> bytes:
    """Write a file of rows; every `bad_every`-th row is bad, with zero steps."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["prompt", "seed", "steps", "custom_id"])
    for number in range(1, count + 1):
        steps = 0 if bad_every and number % bad_every == 0 else 4
        prompt = f"a red apple on a wooden table, number {number}"
        writer.writerow([prompt, number, steps, f"row-{number}"])
    return file.getvalue().encode()


@contextmanager
def measured(server: psutil.Process) -> Iterator[Run]:
    """Measure the block's duration and the server's peak memory in it."""
    run, done = Run(), threading.Event()
    idle = server.memory_info().rss

    def watch() -> None:
        while not done.wait(0.005):
            run.peak_bytes = max(run.peak_bytes, server.memory_info().rss - idle)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        yield run
    finally:
        run.seconds = time.perf_counter() - began
        done.set()
        watcher.join()


def send(url: str, body: bytes, **query: str) -> dict[str, Any]:
    """Send a file and return its batch; exit unless it was accepted."""
    response = httpx2.post(
        f"{url}/v1/batches", content=body, params=query, headers=CSV, timeout=300
    )
    if response.status_code != httpx2.codes.ACCEPTED:
        sys.exit(f"not accepted: {response.status_code} {response.text[:500]}")
    batch: dict[str, Any] = response.json()
    return batch


def one_file(url: str, body: bytes, count: int) -> None:
    """Send all rows in one file."""
    check_queued(send(url, body), count)


def ten_at_once(url: str, body: bytes, count: int) -> None:
    """Send ten files, each by its own client."""
    with ThreadPoolExecutor(10) as clients:
        for batch in clients.map(lambda _: send(url, body), range(10)):
            check_queued(batch, count)


def check_queued(batch: dict[str, Any], count: int) -> None:
    """Exit unless all jobs are queued."""
    if batch["counts"]["queued"] != count:
        sys.exit(f"{count} rows were sent; the counts are {batch['counts']}")


def skip_and_correct(url: str, count: int) -> str:
    """Send a file with 1 % bad rows, then its corrected errors.csv. Return a summary."""
    batch = send(url, rows(count, bad_every=100), on_error="skip")
    errors = httpx2.get(url + batch["urls"]["errors"], timeout=60).text
    found = list(csv.DictReader(io.StringIO(errors, newline="")))
    numbers = [int(row["row_number"]) for row in found]
    corrected = io.StringIO(newline="")
    writer = csv.DictWriter(corrected, list(found[0]))
    writer.writeheader()
    writer.writerows(row | {"steps": "4"} for row in found)
    again = send(url, corrected.getvalue().encode())
    exact = numbers == list(range(100, count + 1, 100))
    sent = again["counts"]["queued"] == len(found) and again["counts"]["rejected"] == 0
    return (
        f"{count:,} rows, 1 % bad: {batch['counts']['queued']:,} queued, errors.csv has "
        f"{len(found):,} rows ({'exactly' if exact else 'NOT'} the bad ones), corrected and sent: "
        f"{again['counts']['queued']:,} queued{'' if sent else ' (WRONG)'}"
    )


def task_each(environment: dict[str, str], body: bytes, tasks: int, count: int) -> float:
    """Time `tasks` Celery tasks in another process, and scale the seconds to `count`."""
    command = [sys.executable, "-m", "benchmarks.baselines.celery_task_per_row", str(tasks)]
    done = subprocess.run(
        command, input=body, capture_output=True, check=True, env=os.environ | environment
    )
    return float(json.loads(done.stdout)["seconds"]) * count / tasks


def measure(arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run all measurements."""
    body, part = rows(arguments.rows), rows(arguments.rows // 10)
    ours: list[Run] = []
    at_once: list[Run] = []
    theirs: list[float] = []
    with serving(["-m", "api"], environment) as (process, url):
        server = psutil.Process(process.pid)
        one_file(url, rows(100), 100)  # first: loads what a process loads once
        for _ in range(arguments.rounds):
            ours.append(timed(server, lambda: one_file(url, body, arguments.rows)))
            theirs.append(task_each(environment, body, arguments.tasks, arguments.rows))
            at_once.append(timed(server, lambda: ten_at_once(url, part, arguments.rows // 10)))
        corrected = skip_and_correct(url, arguments.rows // 2)
    report(arguments, ours, at_once, theirs)
    print(corrected)


def timed(server: psutil.Process, work: Callable[[], None]) -> Run:
    """Measure one call."""
    with measured(server) as run:
        work()
    return run


def report(
    arguments: argparse.Namespace, ours: Sequence[Run], at_once: Sequence[Run], theirs: list[float]
) -> None:
    """Print medians, and every round."""
    table = Table(f"{arguments.rows:,} rows", "seconds, median", "each", "peak over idle, MiB")
    for name, runs in (("one file", ours), ("ten files at once", at_once)):
        seconds = [run.seconds for run in runs]
        peak = max(run.peak_bytes for run in runs) / MIB
        table.add_row(
            name, f"{statistics.median(seconds):.2f}", format_rounds(seconds), f"+{peak:.0f}"
        )
    task = f"a Celery task each ({arguments.tasks:,}, scaled)"
    table.add_row(task, f"{statistics.median(theirs):.2f}", format_rounds(theirs), "")
    ratio = statistics.median(
        task_s / run.seconds for task_s, run in zip(theirs, ours, strict=True)
    )
    table.add_row("ratio", f"{ratio:.1f}", "", "")
    Console(width=110).print(table)
    print(f"load average: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def format_rounds(seconds: Sequence[float]) -> str:
    """List the seconds of every round."""
    return ", ".join(f"{each:.2f}" for each in seconds)


def main() -> None:
    """Run on temporary servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="of the file (default 100000)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    parser.add_argument("--tasks", type=int, default=20_000, help="of Celery (default 20000)")
    arguments = parser.parse_args()
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
        measure(arguments, environment)


if __name__ == "__main__":
    main()
