"""Maintenance of the installation: every worker process offers it, one at a time does it."""

from datetime import timedelta
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.errors import StorageUnavailable
from darkroom.periodic import PeriodicTask
from workers.maintenance.cleaner import Cleaner
from workers.maintenance.reaper import Reaper

_CLEAN_INTERVAL: Final = timedelta(seconds=60)
_TRANSIENT: Final = (StorageUnavailable, DBAPIError, PoolTimeout)


class Maintenance:
    """Passes of the reaper and of the cleaner, in two threads: the reaper never waits for S3."""

    def __init__(self, reaper: Reaper, cleaner: Cleaner, *, interval: timedelta) -> None:
        self._cleaner = cleaner
        self._reap = PeriodicTask("reaper", reaper.reap, interval=interval, transient=_TRANSIENT)
        self._clean = PeriodicTask(
            "cleaner", self._clean_once, interval=_CLEAN_INTERVAL, transient=_TRANSIENT
        )

    def start(self) -> None:
        """Start both threads."""
        self._reap.start()
        self._clean.start()

    def close(self) -> None:
        """End both threads."""
        self._reap.close()
        self._clean.close()

    def _clean_once(self) -> None:
        if self._cleaner.clean():
            self._clean.wake()
