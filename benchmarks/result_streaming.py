"""Memory of the API while it streams a batch's results, and a check of those results.

`python -m benchmarks.result_streaming [--images 1000]` generates small images on a temporary stack,
and reads the manifest and images.zip when a third is done and at the end. It compares each image of
the archive, and each object in the store, with the manifest's SHA-256. Memory is the peak of the
API process while it streams, above its memory just before.
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
class Download:
    """Both files at one moment."""

    when: str
    images: int
    zip_bytes: int
    seconds: float
    peak_bytes: int  #: of the API, above what it held before


def rows(images: int) -> str:
    """Write rows for the smallest and fastest images of the demo model."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["prompt", "seed", "steps", "cfg", "width", "height"])
    subjects = ("a red apple", "a blue bird", "a green tree", "a yellow sun")
    for number in range(images):
        writer.writerow([subjects[number % len(subjects)], number, 4, 1, 64, 64])
    return file.getvalue()


def api_process(address: str) -> psutil.Process:
    """Return the process of ours that listens at `address`."""
    port = urlsplit(address).port
    for process in psutil.Process().children(recursive=True):
        sockets = process.net_connections("tcp4")
        if any(
            each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            for each in sockets
        ):
            return process
    sys.exit(f"no process of ours listens at {address}")


@contextmanager
def watched(server: psutil.Process) -> Iterator[list[int]]:
    """Sample the server's memory, before and during the block."""
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


def read(http: httpx2.Client, server: psutil.Process, batch: dict[str, Any], when: str) -> Download:
    """Read the archive, then the (newer) manifest, and compare them."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as file, watched(server) as seen:
        with http.stream("GET", batch["urls"]["images"]) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
        size, seconds = file.tell(), time.perf_counter() - began
        text = http.get(batch["urls"]["manifest"]).raise_for_status().text
        images = check(file, [json.loads(line) for line in text.splitlines()])
    return Download(when, images, size, seconds, max(seen) - seen[0])


def check(file: Any, lines: list[dict[str, Any]]) -> int:
    """Count the archive's images; exit if one differs from the manifest."""
    by_name = {line["file"]: line for line in lines if line["file"]}
    with zipfile.ZipFile(file) as archive:
        if broken := archive.testzip():
            sys.exit(f"{broken} is damaged in the archive")
        names = archive.namelist()
        for name in names:
            if hashlib.sha256(archive.read(name)).hexdigest() != by_name[name]["sha256"]:
                sys.exit(f"{name} differs from its hash in the manifest")
    return len(names)


def check_objects(http: httpx2.Client, batch: dict[str, Any]) -> int:
    """Count the objects in the store that match the manifest's hashes, read by their URLs."""
    text = http.get(batch["urls"]["manifest"]).raise_for_status().text
    matching = 0
    with httpx2.Client(timeout=60) as store:
        for line in map(json.loads, text.splitlines()):
            content = store.get(line["url"]).raise_for_status().content
            matching += hashlib.sha256(content).hexdigest() == line["sha256"]
    return matching


def wait_for(http: httpx2.Client, batch: dict[str, Any], images: int, *, within_s: float) -> float:
    """Wait until `images` are generated. Return the seconds it took."""
    began = time.perf_counter()
    while True:
        counts = http.get(batch["urls"]["self"]).raise_for_status().json()["counts"]
        if counts["succeeded"] >= images:
            return time.perf_counter() - began
        if time.perf_counter() - began > within_s:
            sys.exit(f"too slow: {counts}")
        time.sleep(0.5)


def measure(address: str, images: int) -> None:
    """Generate, read twice, and print."""
    server = api_process(address)
    with httpx2.Client(base_url=address, timeout=300) as http:
        http.get("/v1/models").raise_for_status()
        idle = server.memory_info().rss
        response = http.post("/v1/batches", content=rows(images), headers=CSV)
        batch = response.raise_for_status().json()
        first = wait_for(http, batch, images // 3, within_s=1800)
        middle = read(http, server, batch, "at a third")
        generated_s = first + wait_for(http, batch, images, within_s=1800)
        end = read(http, server, batch, "at the end")
        matching = check_objects(http, batch)
        last = server.memory_info().rss
    table = Table("read", "images", "ZIP, MiB", "seconds", "API's peak over before, MiB")
    for each in (middle, end):
        size, peak = each.zip_bytes / MIB, each.peak_bytes / MIB
        table.add_row(
            each.when, str(each.images), f"{size:.1f}", f"{each.seconds:.1f}", f"+{peak:.1f}"
        )
    Console(width=110).print(table)
    print(
        f"generated in about {generated_s:.0f} s; {matching} of {images} objects match the manifest"
    )
    print(f"API, MiB: idle before the batch {idle / MIB:.0f}, at the end {last / MIB:.0f}")
    print(f"load average: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def main() -> None:
    """Run on a temporary stack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="to generate (default 1000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder) / "data") as address:
        measure(address, arguments.images)


if __name__ == "__main__":
    main()
