"""Shared snapshot of the queue, taken by one thread at most once a second, on demand."""

import logging
import threading
import time
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.forecast.snapshot import QueueSnapshot, take_snapshot
from darkroom.generation.model_registry import ModelRegistry

FRESH_S: Final = 1.0  #: older snapshots are refreshed in the background and still served
USABLE_S: Final = 5.0  #: older snapshots are not served
_FIRST_TIMEOUT_S: Final = 1.0  #: how long a request waits for the first snapshot

logger = logging.getLogger(__name__)


class SnapshotCache:
    """Thread that takes a snapshot when one is asked for and the last is old."""

    def __init__(self, sessions: Sessions, registry: ModelRegistry) -> None:
        self._sessions = sessions
        self._registry = registry
        self._latest: QueueSnapshot | None = None
        self._requested = threading.Event()
        self._refreshed = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshot-cache", daemon=True)
        self._thread.start()

    def recall(self) -> QueueSnapshot | None:
        """Return the last snapshot, or None if it is older than `USABLE_S`. Does not block."""
        latest = self._latest
        age_s = float("inf") if latest is None else time.monotonic() - latest.taken
        if age_s > FRESH_S and not self._requested.is_set():
            self._requested.set()
        return latest if age_s <= USABLE_S else None

    def now(self) -> QueueSnapshot | None:
        """Return the last snapshot, or wait up to a second for one; None if none comes."""
        with self._refreshed:
            self._refreshed.wait_for(lambda: self.recall() is not None, _FIRST_TIMEOUT_S)
        return self.recall()

    def age_s(self, snapshot: QueueSnapshot) -> float:
        """Return the seconds since a snapshot was taken."""
        return round(time.monotonic() - snapshot.taken, 3)

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()
        self._requested.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._requested.wait()
            if self._closing.is_set():
                return
            try:
                self._take()
            except (DBAPIError, PoolTimeout) as error:
                logger.warning(
                    "queue snapshot failed: %s; retrying in %.1f s", type(error).__name__, FRESH_S
                )
                self._closing.wait(FRESH_S)
            except Exception:  # any error: a thread that ends silently is worse
                logger.exception("queue snapshot failed; retrying in %.1f s", FRESH_S)
                self._closing.wait(FRESH_S)
            self._requested.clear()

    def _take(self) -> None:
        before = None if self._latest is None else self._latest.scan
        with self._sessions.begin() as session:
            latest = take_snapshot(session, self._registry, before)
        with self._refreshed:
            self._latest = latest
            self._refreshed.notify_all()
