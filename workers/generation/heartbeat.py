"""Heartbeat: renews the leases of dispatches in flight, and stops those whose lease is lost."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.periodic import PeriodicTask
from darkroom.queue import dispatches
from workers.generation.in_flight import InFlightDispatch

logger = logging.getLogger(__name__)


class LeaseHeartbeat:
    """Renewal of the dispatches in flight, three times a lease, while the process lives.

    Only of those in flight: if the thread that runs a dispatch fails, its lease must lapse, or its
    jobs would stay `running` as long as this process lives. A second thread watches the first,
    which may hang in the database: without a renewal for two thirds of a lease all are stopped.
    """

    def __init__(self, sessions: Sessions, *, lease: timedelta) -> None:
        self._sessions = sessions
        self._lease = lease
        self._in_flight: dict[int, InFlightDispatch] = {}
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._accepting = True
        self._renewed_at = time.monotonic()
        transient = (DBAPIError, PoolTimeout)
        self._tasks = [
            PeriodicTask("heartbeat", self._renew, interval=lease / 3, transient=transient),
            PeriodicTask("heartbeat-watch", self._watch, interval=lease / 30),
        ]

    def start(self) -> None:
        """Start to renew."""
        for task in self._tasks:
            task.start()

    def close(self) -> None:
        """Stop renewing; the leases of dispatches still in flight lapse."""
        for task in self._tasks:
            task.close()

    def healthy(self) -> bool:
        """Return False after two thirds of a lease without a renewal: claim nothing then."""
        return time.monotonic() - self._renewed_at < self._lease.total_seconds() * 2 / 3

    def busy(self) -> bool:
        """Return whether a dispatch is in flight."""
        return bool(self._in_flight)

    def in_flight(self) -> dict[int, InFlightDispatch]:
        """Return the dispatches in flight, by id."""
        with self._lock:
            return dict(self._in_flight)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no dispatch is in flight; return False if one still is after that time."""
        with self._released:
            return self._released.wait_for(lambda: not self._in_flight, seconds)

    def stop_accepting(self) -> None:
        """Stop all dispatches in flight, and those that are still to be kept."""
        with self._lock:
            self._accepting = False
        self._stop_all()

    def _stop_all(self) -> None:
        for in_flight in self.in_flight().values():
            in_flight.stop()

    @contextmanager
    def keep(self, dispatch_id: int) -> Iterator[InFlightDispatch]:
        """Renew the dispatch while the block runs."""
        in_flight = InFlightDispatch()
        with self._lock:
            self._in_flight[dispatch_id] = in_flight
            accepting = self._accepting
        if not accepting:
            in_flight.stop()
        try:
            yield in_flight
        finally:
            with self._released:
                del self._in_flight[dispatch_id]
                self._released.notify_all()

    def _renew(self) -> None:
        before = self.in_flight()
        with self._sessions.begin() as session:
            renewed = dispatches.renew(session, before.keys(), lease=self._lease)
        self._renewed_at = time.monotonic()
        with self._lock:
            lost = before.keys() & self._in_flight.keys() - renewed
        for dispatch_id in lost:
            before[dispatch_id].stop()

    def _watch(self) -> None:
        if not self.healthy():
            self._stop_all()
