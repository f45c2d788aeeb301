"""Worker that generates at once, without Ray or a model: claims, stores and settles as one does."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from threading import Event

from darkroom.db.connection import Sessions
from darkroom.db.tables import Job
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.settings import Settings
from darkroom.storage.images import S3Store, image_key

LIMITS = {"darkroom-demo": 8}
LEASE = timedelta(seconds=300)


def store_of(environment: Mapping[str, str]) -> S3Store:
    """Return the image store of processes with this environment."""
    names = ("endpoint_url", "access_key_id", "secret_access_key", "bucket")
    return S3Store(
        Settings(**{f"s3_{name}": environment[f"DARKROOM_S3_{name.upper()}"] for name in names})
    )


def image_of(job: Job) -> bytes:
    """Return bytes that stand for the job's image, different for each job."""
    return b"\x89PNG\r\n\x1a\n" + f"{job.id} {job.prompt} {job.seed}".encode() * 20


class FakeWorker:
    """Worker that runs microbatches on request; a prompt with `poison` fails."""

    def __init__(
        self, sessions: Sessions, store: S3Store, image: Callable[[Job], bytes] = image_of
    ) -> None:
        self.sessions = sessions
        self.store = store
        self._image = image

    def claim(self) -> Sequence[Job]:
        with self.sessions.begin() as session:
            return claims.claim(session, "fake-worker", max_microbatch=LIMITS, lease=LEASE)

    def settle(self, microbatch: Sequence[Job]) -> bool:
        outcomes = [self._generate(job) for job in microbatch]
        dispatch_id = microbatch[0].dispatch_id
        assert dispatch_id is not None
        with self.sessions.begin() as session:
            return dispatches.settle(session, dispatch_id, outcomes)

    def run(self, microbatches: int | None = None) -> None:
        """Run so many microbatches, or until the queue is empty."""
        done = 0
        while microbatches is None or done < microbatches:
            microbatch = self.claim()
            if not microbatch:
                return
            self.settle(microbatch)
            done += 1

    def run_until(self, stopped: Event, pause_s: float = 0.0) -> None:
        while not stopped.is_set():
            microbatch = self.claim()
            if microbatch:
                self.settle(microbatch)
            time.sleep(pause_s if microbatch else 0.02)

    def _generate(self, job: Job) -> Succeeded | Failed:
        if "poison" in job.prompt:
            return Failed(job.id, "poisoned", "it was poison", retryable=True)
        image = self._image(job)
        key = image_key(job.tenant_id, job.id, job.dispatch_id or 0, "png")
        self.store.put(key, image, "image/png")
        digest = hashlib.sha256(image).hexdigest()
        return Succeeded(job.id, key, digest, len(image), inference_ms=7, upload_ms=1)
