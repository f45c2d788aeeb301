"""Reaper: expires lapsed leases and overdue jobs, and wakes workers for what is queued."""

import logging
import time
from datetime import timedelta

from darkroom.db.connection import Sessions
from darkroom.db.locks import AdvisoryLock, try_lock_in_transaction
from darkroom.jobs import lifecycle
from darkroom.queue import claims, dispatches
from darkroom.queue.notifier import WorkNotifier

logger = logging.getLogger(__name__)


class Reaper:
    """One pass at a time over leases and deadlines."""

    def __init__(
        self, sessions: Sessions, notifier: WorkNotifier, *, lease: timedelta, max_attempts: int
    ) -> None:
        self._sessions = sessions
        self._notifier = notifier
        self._lease_s = lease.total_seconds()
        self._max_attempts = max_attempts
        self._expire_from = 0.0  #: by the monotonic clock

    def reap(self) -> None:
        """Run one pass, unless another process runs one.

        After a failure no lease expires for the length of one: while the database was away, no
        worker could renew.
        """
        try:
            claimable = self._expire()
        except Exception:
            self._expire_from = time.monotonic() + self._lease_s
            raise
        if claimable:
            self._notifier.notify_workers()

    def _expire(self) -> bool:
        """Expire leases and overdue jobs, unless another process does; return whether jobs wait."""
        with self._sessions.begin() as session:
            if not try_lock_in_transaction(session, AdvisoryLock.REAP):
                return False
            expired = 0
            if time.monotonic() >= self._expire_from:
                expired = dispatches.expire_leases(session, max_attempts=self._max_attempts)
            lifecycle.expire_overdue(session)
            claimable = claims.has_claimable(session)
        if expired:
            logger.warning("expired %d leases without a heartbeat; requeued their jobs", expired)
        return claimable
