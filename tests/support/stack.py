"""A whole running Darkroom for tests: `darkroom up`, its API, its database and its processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

from darkroom.db.connection import Sessions, open_sessions
from darkroom.status import FINISHED

SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
LEASE_S = 4
POISON = "cyanide"  # a prompt with this word kills the model, in these stacks only
HANGS_S = 240  # who waits for that long waits for nothing; a busy machine may take half of it


class Stack:
    """`darkroom up` in a process of its own; what a test may ask of it and do to it."""

    def __init__(self, data_dir: Path, *, workers: int = 1) -> None:
        self.data_dir = data_dir
        self._log = data_dir.with_suffix(".log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "darkroom.cli", "up", "--port=0"),
                    *(f"--data-dir={data_dir}", f"--workers={workers}"),
                ],
                env=os.environ
                | {
                    "DARKROOM_LEASE_S": str(LEASE_S),
                    "DARKROOM_MAINTENANCE_INTERVAL_S": "1",
                    "DARKROOM_SHUTDOWN_GRACE_S": "1",
                    "DARKROOM_REPLICA_IDLE_TIMEOUT_S": "2",
                    "DARKROOM_FAULT_POISON": POISON,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            address = self._address()
        except AssertionError:  # nobody else knows of it
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(40)
            raise
        self.http = httpx2.Client(base_url=address, timeout=60)
        url = (data_dir / "secrets" / "darkroom_database_url").read_text()
        self.sessions: Sessions = open_sessions(url, pool_size=2)

    def _address(self) -> str:
        deadline = time.monotonic() + HANGS_S
        while time.monotonic() < deadline:
            said = re.search(r"API +(http\S+)", self.said())
            if said:
                return said[1]
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)
        raise AssertionError(self.said())

    def said(self) -> str:
        """What `up` has printed so far."""
        return self._log.read_text()

    def log(self, name: str) -> str:
        """What a child has logged so far."""
        return (self.data_dir / "logs" / f"{name}.log").read_text(errors="replace")

    def find(self, *words: str) -> list[psutil.Process]:
        """The stack's processes whose command line holds all of these words."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if all(word in line for word in words):
                found.append(process)
        return found

    def submit(self, **fields: object) -> str:
        """The id of a job that was accepted."""
        response = self.http.post("/v1/jobs", json={"prompt": "a red apple"} | SMALL | fields)
        assert response.status_code == 202, response.text
        return response.json()["id"]

    def job(self, job_id: str) -> dict:
        """As the API shows it."""
        return self.http.get(f"/v1/jobs/{job_id}").json()

    def wait(self, job_ids: list[str], *, within_s: float = HANGS_S) -> list[dict]:
        """The jobs once all of them have ended."""
        deadline = time.monotonic() + within_s
        while True:
            found = [self.job(job_id) for job_id in job_ids]
            if all(job["status"] in FINISHED for job in found):
                return found
            states = [job["status"] for job in found]
            assert time.monotonic() < deadline, f"{states}\n{self.log('worker-1')[-3000:]}"
            time.sleep(0.2)

    def wait_until_running(self, job_ids: list[str], *, within_s: float = HANGS_S) -> None:
        """Returns as soon as one of them is being drawn."""
        deadline = time.monotonic() + within_s
        while not any(self.job(job_id)["status"] == "running" for job_id in job_ids):
            assert time.monotonic() < deadline, self.log("worker-1")[-3000:]
            time.sleep(0.02)

    def image(self, job_id: str) -> bytes:
        """The finished picture, as a client gets it."""
        response = self.http.get(f"/v1/jobs/{job_id}/image")
        assert response.status_code == 302, response.text
        return httpx2.get(response.headers["location"]).raise_for_status().content

    def stop(self) -> int:
        """SIGTERM, and what `up` left with."""
        self.http.close()
        self.sessions.kw["bind"].dispose()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


def dead(process: psutil.Process) -> bool:
    """Ended, though nobody has asked how yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def running_stack(data_dir: Path, *, workers: int = 1) -> Iterator[Stack]:
    """A stack for the length of the block; nothing of it is left afterwards."""
    stack = Stack(data_dir, workers=workers)
    try:
        yield stack
    finally:
        family = psutil.Process(stack.process.pid).children(recursive=True)
        code = stack.stop()
        left = [process for process in family if process.is_running() and not dead(process)]
        assert not left, left
        assert code == 0, stack.said()
