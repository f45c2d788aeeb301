"""The sweeper: takes back what silent workers hold, and rings for work that waits.

Every worker process has one; of those that are awake at once, the database picks the leader.
"""

import logging
import threading
import time
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from darkroom import idempotency
from darkroom.db.connection import Sessions
from darkroom.db.locks import AdvisoryLock
from darkroom.jobs import lifecycle
from darkroom.queue import claims, dispatches
from darkroom.queue.notifier import WorkNotifier

logger = logging.getLogger(__name__)


class Reaper:
    """A thread that sweeps until closed."""

    def __init__(
        self,
        sessions: Sessions,
        notifier: WorkNotifier,
        *,
        every: timedelta,
        lease: timedelta,
        max_attempts: int,
    ) -> None:
        self._sessions = sessions
        self._notifier = notifier
        self._every_s = every.total_seconds()
        self._lease_s = lease.total_seconds()
        self._max_attempts = max_attempts
        self._expire_from = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin to sweep."""
        self._thread.start()

    def close(self) -> None:
        """Stop sweeping."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self._sweep()
            except Exception:  # whatever it was: a thread that ends silently is worse
                # Nobody could renew while the database was away: give them a lease's time to.
                self._expire_from = time.monotonic() + self._lease_s
                logger.exception("could not sweep, will try again")

    def _sweep(self) -> None:
        with self._sessions.begin() as session:
            if not _leads(session):
                return
            if time.monotonic() >= self._expire_from:
                expired = dispatches.expire_leases(session, max_attempts=self._max_attempts)
                if expired:
                    logger.warning(
                        "%d dispatches went silent; their jobs are queued again", expired
                    )
            lifecycle.expire_overdue(session)
            idempotency.delete_expired(session)
            waiting = claims.has_claimable(session)
        if waiting:
            self._notifier.notify_workers()


def _leads(session: Session) -> bool:
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(AdvisoryLock.REAP))))
