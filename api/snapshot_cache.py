"""Shared snapshot of the queue, taken by one thread at most once a second, on demand."""

import threading
import time
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.forecast.snapshot import QueueSnapshot, take_snapshot
from darkroom.generation.model_registry import ModelRegistry
from darkroom.periodic import PeriodicTask

FRESH_S: Final = 1.0  #: older snapshots are refreshed in the background and still served
USABLE_S: Final = 5.0  #: older snapshots are not served
_FIRST_TIMEOUT_S: Final = 1.0  #: how long a request waits for the first snapshot


class SnapshotCache:
    """Last snapshot, and the task that takes another when one is asked for and it is old."""

    def __init__(self, sessions: Sessions, registry: ModelRegistry) -> None:
        self._sessions = sessions
        self._registry = registry
        self._latest: QueueSnapshot | None = None
        self._refreshed = threading.Condition()
        self._task = PeriodicTask("queue-snapshot", self._take, transient=(DBAPIError, PoolTimeout))
        self._task.start()

    def recall(self) -> QueueSnapshot | None:
        """Return the last snapshot, or None if it is older than `USABLE_S`. Does not block."""
        latest = self._latest
        age_s = _age_s(latest)
        if age_s > FRESH_S:
            self._task.wake()
        return latest if age_s <= USABLE_S else None

    def now(self) -> QueueSnapshot | None:
        """Return the last snapshot, or wait up to a second for one; None if none comes."""
        with self._refreshed:
            self._refreshed.wait_for(lambda: self.recall() is not None, _FIRST_TIMEOUT_S)
        return self.recall()

    def age_s(self, snapshot: QueueSnapshot) -> float:
        """Return the seconds since a snapshot was taken."""
        return round(_age_s(snapshot), 3)

    def close(self) -> None:
        """Stop the thread."""
        self._task.close()

    def _take(self) -> None:
        before = self._latest
        if _age_s(before) <= FRESH_S:  # the task was woken again while it took this one
            return
        with self._sessions.begin() as session:
            latest = take_snapshot(session, self._registry, before.scan if before else None)
        with self._refreshed:
            self._latest = latest
            self._refreshed.notify_all()


def _age_s(snapshot: QueueSnapshot | None) -> float:
    return float("inf") if snapshot is None else time.monotonic() - snapshot.taken
