"""A whole running Darkroom for tests: `darkroom up`, its API, its database and its processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

from darkroom.db.connection import Sessions, open_sessions
from darkroom.status import FINISHED

SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
LEASE_S = 4
POISON = "cyanide"  # a prompt with this word kills the model, in these stacks only
HANGS_S = 240  # after which a wait has failed; a busy machine may need half of it


class RunningStack:
    """`darkroom up` in a process of its own."""

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
        except AssertionError:  # the caller gets no object to stop
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(40)
            raise
        self.http = httpx2.Client(base_url=address, timeout=60)
        url = (data_dir / "secrets" / "darkroom_database_url").read_text()
        self.sessions: Sessions = open_sessions(url, pool_size=2)

    def _address(self) -> str:
        self.until(lambda: "API " in self.said() or self.process.poll() is not None)
        found = re.search(r"API +(http\S+)", self.said())
        assert found, self.said()
        return found[1]

    def until(self, holds: Callable[[], bool], *, within_s: float = HANGS_S) -> None:
        """Return once the condition holds; fail with the logs if it does not in time."""
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, f"{self.said()}\n{self.log('worker-1')[-3000:]}"
            time.sleep(0.05)

    def said(self) -> str:
        """Return what `up` has printed so far."""
        return self._log.read_text()

    def log(self, name: str) -> str:
        """Return what a process has logged so far."""
        log = self.data_dir / "logs" / f"{name}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def find(self, *words: str) -> list[psutil.Process]:
        """Return the stack's processes whose command line contains all of these words."""
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
        """Submit a small job; return its id."""
        response = self.http.post("/v1/jobs", json={"prompt": "a red apple"} | SMALL | fields)
        assert response.status_code == 202, response.text
        return response.json()["id"]

    def job(self, job_id: str) -> dict:
        """Return the job as the API shows it."""
        return self.http.get(f"/v1/jobs/{job_id}").json()

    def wait(self, job_ids: list[str], *, within_s: float = HANGS_S) -> list[dict]:
        """Return the jobs once all of them have finished."""
        for job_id in job_ids:  # one by one: polling all of them would slow the stack
            self.until(
                lambda job_id=job_id: self.job(job_id)["status"] in FINISHED, within_s=within_s
            )
        return [self.job(job_id) for job_id in job_ids]

    def wait_until_running(self, job_ids: list[str]) -> None:
        """Return as soon as one of the jobs is running."""
        self.until(lambda: any(self.job(job_id)["status"] == "running" for job_id in job_ids))

    def wait_until_generating(self, job_ids: list[str], *, steps: int = 1) -> None:
        """Return as soon as every running job, of at least one, has done this many steps."""

        def done() -> bool:
            jobs = [self.job(job_id) for job_id in job_ids]
            running = [job["progress"]["step"] or 0 for job in jobs if job["progress"]]
            return bool(running) and min(running) >= steps

        self.until(done)

    def image(self, job_id: str) -> bytes:
        """Return a job's image, as a client downloads it."""
        response = self.http.get(f"/v1/jobs/{job_id}/image")
        assert response.status_code == 302, response.text
        return httpx2.get(response.headers["location"]).raise_for_status().content

    def stop(self) -> int:
        """Send SIGTERM; return the exit code of `up`."""
        self.http.close()
        self.sessions.kw["bind"].dispose()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


def dead(process: psutil.Process) -> bool:
    """Return whether a process has exited, reaped or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def running_stack(data_dir: Path, *, workers: int = 1) -> Iterator[RunningStack]:
    """Run a stack during the block; check that it leaves no process behind."""
    stack = RunningStack(data_dir, workers=workers)
    try:
        yield stack
    finally:
        family = psutil.Process(stack.process.pid).children(recursive=True)
        code = stack.stop()
        left = [process for process in family if process.is_running() and not dead(process)]
        assert not left, left
        assert code == 0, stack.said()
