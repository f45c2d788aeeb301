"""A worker that paints at once, without Ray or a model: claims, stores and settles as one does."""

import hashlib
import time
from datetime import timedelta

from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from darkroom.settings import Settings
from darkroom.storage.images import S3Store, image_key

LIMITS = {"darkroom-demo": 8}
LEASE = timedelta(seconds=300)


def store_of(environment):
    """The image store of processes with this environment."""
    names = ("endpoint_url", "access_key_id", "secret_access_key", "bucket")
    return S3Store(
        Settings(**{f"s3_{name}": environment[f"DARKROOM_S3_{name.upper()}"] for name in names})
    )


def picture_of(job):
    """What stands for its picture: bytes of its own."""
    return b"\x89PNG\r\n\x1a\n" + f"{job.id} {job.prompt} {job.seed}".encode() * 20


class Painter:
    """Paints microbatches when told to; a prompt with `poison` fails."""

    def __init__(self, sessions, store, picture=picture_of):
        self.sessions = sessions
        self.store = store
        self._picture = picture

    def claim(self):
        with self.sessions.begin() as session:
            return claims.claim(session, "painter", max_microbatch=LIMITS, lease=LEASE)

    def settle(self, microbatch):
        outcomes = [self._paint(job) for job in microbatch]
        with self.sessions.begin() as session:
            return dispatches.settle(session, microbatch[0].dispatch_id, outcomes)

    def paint(self, microbatches=None):
        """So many microbatches, or until nothing is left to claim."""
        done = 0
        while microbatches is None or done < microbatches:
            microbatch = self.claim()
            if not microbatch:
                return
            self.settle(microbatch)
            done += 1

    def paint_until(self, stopped, pause_s=0.0):
        while not stopped.is_set():
            microbatch = self.claim()
            if microbatch:
                self.settle(microbatch)
            time.sleep(pause_s if microbatch else 0.02)

    def _paint(self, job):
        if "poison" in job.prompt:
            return Failed(job.id, "poisoned", "it was poison", retryable=True)
        image = self._picture(job)
        key = image_key(job.tenant_id, job.id, job.dispatch_id, "png")
        self.store.put(key, image, "image/png")
        digest = hashlib.sha256(image).hexdigest()
        return Succeeded(job.id, key, digest, len(image), inference_ms=7, upload_ms=1)
