"""What the API holds in memory while it streams a batch's results, and whether they are true.

`python -m benchmarks.result_streaming [--images 1000]` has a stack of its own draw so many small
images, reads the manifest and images.zip in the middle of that and at the end, and checks both:
each image of the archive against the manifest's SHA-256, each object of the store too. Memory is
that of the API process at its highest while it streams, above what it held just before.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks._support import stack

CSV: Final = {"Content-Type": "text/csv"}
MIB: Final = 2**20


@dataclass(frozen=True)
class Reading:
    """Both files as they were at one moment."""

    when: str
    pictures: int
    zip_bytes: int
    seconds: float
    peak_bytes: int  #: of the API, above what it held before


def rows(images: int) -> str:
    """As small and quick as the demo model draws."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["prompt", "seed", "steps", "cfg", "width", "height"])
    subjects = ("a red apple", "a blue bird", "a green tree", "a yellow sun")
    for number in range(images):
        writer.writerow([subjects[number % len(subjects)], number, 4, 1, 64, 64])
    return file.getvalue()


def api_process(address: str) -> psutil.Process:
    """Whoever listens there."""
    port = urlsplit(address).port
    for process in psutil.Process().children(recursive=True):
        held = process.net_connections("tcp4")
        if any(
            each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            for each in held
        ):
            return process
    sys.exit(f"nobody of ours listens at {address}")


@contextmanager
def watched(server: psutil.Process) -> Iterator[list[int]]:
    """Its memory as it was before, and all through the block."""
    seen, done = [server.memory_info().rss], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(server.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def read(http: httpx2.Client, server: psutil.Process, batch: dict[str, Any], when: str) -> Reading:
    """The archive, then the manifest, which knows at least as much by then; both checked."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as file, watched(server) as seen:
        with http.stream("GET", batch["urls"]["images"]) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                file.write(chunk)
        size, seconds = file.tell(), time.perf_counter() - began
        text = http.get(batch["urls"]["manifest"]).raise_for_status().text
        pictures = check(file, [json.loads(line) for line in text.splitlines()])
    return Reading(when, pictures, size, seconds, max(seen) - seen[0])


def check(file: Any, lines: list[dict[str, Any]]) -> int:
    """How many images there are, every one of which is what the manifest says."""
    by_name = {line["file"]: line for line in lines if line["file"]}
    with zipfile.ZipFile(file) as archive:
        if broken := archive.testzip():
            sys.exit(f"{broken} is damaged in the archive")
        names = archive.namelist()
        for name in names:
            if hashlib.sha256(archive.read(name)).hexdigest() != by_name[name]["sha256"]:
                sys.exit(f"{name} is not what the manifest says")
    return len(names)


def check_objects(http: httpx2.Client, batch: dict[str, Any]) -> int:
    """How many objects of the store, read by their URLs, fit the manifest's hashes."""
    text = http.get(batch["urls"]["manifest"]).raise_for_status().text
    fitting = 0
    with httpx2.Client(timeout=60) as store:
        for line in map(json.loads, text.splitlines()):
            content = store.get(line["url"]).raise_for_status().content
            fitting += hashlib.sha256(content).hexdigest() == line["sha256"]
    return fitting


def wait_for(http: httpx2.Client, batch: dict[str, Any], images: int, *, within_s: float) -> float:
    """Until so many are drawn; the seconds it took."""
    began = time.perf_counter()
    while True:
        counts = http.get(batch["urls"]["self"]).raise_for_status().json()["counts"]
        if counts["succeeded"] >= images:
            return time.perf_counter() - began
        if time.perf_counter() - began > within_s:
            sys.exit(f"too slow: {counts}")
        time.sleep(0.5)


def measure(address: str, images: int) -> None:
    """Draw, read twice, print."""
    server = api_process(address)
    with httpx2.Client(base_url=address, timeout=300) as http:
        http.get("/v1/models").raise_for_status()
        idle = server.memory_info().rss
        answer = http.post("/v1/batches", content=rows(images), headers=CSV).raise_for_status()
        batch = answer.json()
        first = wait_for(http, batch, images // 3, within_s=1800)
        middle = read(http, server, batch, "while it is drawn")
        drawn = first + wait_for(http, batch, images, within_s=1800)
        end = read(http, server, batch, "at the end")
        fitting = check_objects(http, batch)
        last = server.memory_info().rss
    table = Table("read", "pictures", "ZIP, MiB", "seconds", "API's peak over before, MiB")
    for each in (middle, end):
        size, peak = each.zip_bytes / MIB, each.peak_bytes / MIB
        table.add_row(
            each.when, str(each.pictures), f"{size:.1f}", f"{each.seconds:.1f}", f"+{peak:.1f}"
        )
    Console(width=110).print(table)
    print(f"drawn in about {drawn:.0f} s; {fitting} of {images} objects fit the manifest's hashes")
    print(f"API, MiB: idle before the batch {idle / MIB:.0f}, at the end {last / MIB:.0f}")
    print(f"load of the machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def main() -> None:
    """All of it, on a stack of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="(default 1000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder) / "data") as address:
        measure(address, arguments.images)


if __name__ == "__main__":
    main()
