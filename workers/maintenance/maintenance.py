"""Maintenance of the installation: every worker process offers it, one at a time does it."""

from datetime import timedelta
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.db.locks import AdvisoryLock, try_lock
from darkroom.errors import StorageUnavailable
from darkroom.periodic import PeriodicTask
from workers.maintenance.cleaner import Cleaner
from workers.maintenance.reaper import Reaper

_CLEAN_INTERVAL: Final = timedelta(seconds=60)
_TRANSIENT: Final = (StorageUnavailable, DBAPIError, PoolTimeout)


class Maintenance:
    """Passes of the reaper and of the cleaner, in two threads: the reaper never waits for S3."""

    def __init__(
        self, sessions: Sessions, reaper: Reaper, cleaner: Cleaner, *, interval: timedelta
    ) -> None:
        self._sessions = sessions
        self._reaper, self._cleaner = reaper, cleaner
        self._reap = PeriodicTask("reaper", self.reap, interval=interval, transient=_TRANSIENT)
        self._clean = PeriodicTask(
            "cleaner", self.clean, interval=_CLEAN_INTERVAL, transient=_TRANSIENT
        )

    def start(self) -> None:
        """Start both threads."""
        self._reap.start()
        self._clean.start()

    def close(self) -> None:
        """End both threads."""
        self._reap.close()
        self._clean.close()

    def reap(self) -> None:
        """Run one pass of the reaper, unless another process runs one."""
        with try_lock(self._sessions, AdvisoryLock.REAP) as leads:
            if leads:
                self._reaper.reap()

    def clean(self) -> None:
        """Run one pass of the cleaner, unless another process runs one; soon the next if needed."""
        with try_lock(self._sessions, AdvisoryLock.CLEAN) as leads:
            if leads and self._cleaner.clean():
                self._clean.wake()
