"""The heartbeat: renews the dispatches that are being worked on, and notices when one was lost."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from darkroom.db.connection import Sessions
from darkroom.queue import dispatches
from workers.generation.in_flight import InFlightDispatch

logger = logging.getLogger(__name__)


class LeaseHeartbeat:
    """A thread that renews what is held, three times a lease, while the process lives.

    Only what is held: a dispatch whose pump fell over must run out, or its jobs would stay
    `running` for as long as this process lives. Another thread watches the first, which may hang
    in the database: what could not be renewed for two thirds of a lease is given up.
    """

    def __init__(self, sessions: Sessions, *, lease: timedelta) -> None:
        self._sessions = sessions
        self._lease = lease
        self._held: dict[int, InFlightDispatch] = {}
        self._lock = threading.Lock()
        self._let_go = threading.Condition(self._lock)
        self._retired = False
        self._closing = threading.Event()
        self._renewed_at = time.monotonic()
        self._threads = [
            threading.Thread(target=self._run, name="heartbeat", daemon=True),
            threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True),
        ]

    def start(self) -> None:
        """Begin to beat."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop beating; what is still held runs out by itself."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def healthy(self) -> bool:
        """False once two thirds of a lease passed without a renewal: claim nothing then."""
        return time.monotonic() - self._renewed_at < self._lease.total_seconds() * 2 / 3

    def busy(self) -> bool:
        """Whether anything is held."""
        return bool(self._held)

    def held(self) -> dict[int, InFlightDispatch]:
        """What is held now, by dispatch."""
        with self._lock:
            return dict(self._held)

    def idle_within(self, seconds: float) -> bool:
        """Wait until nothing is held. False when there still is something after that time."""
        with self._let_go:
            return self._let_go.wait_for(lambda: not self._held, seconds)

    def retire(self) -> None:
        """Have every pump stop drawing what it holds, and what it may still claim."""
        with self._lock:
            self._retired = True
        self._give_up()

    def _give_up(self) -> None:
        for hold in self.held().values():
            hold.give_up()

    @contextmanager
    def holding(self, dispatch_id: int) -> Iterator[InFlightDispatch]:
        """While the block runs, the dispatch is renewed."""
        hold = InFlightDispatch()
        with self._lock:
            self._held[dispatch_id] = hold
            retired = self._retired
        if retired:
            hold.give_up()
        try:
            yield hold
        finally:
            with self._let_go:
                del self._held[dispatch_id]
                self._let_go.notify_all()

    def _run(self) -> None:
        while not self._closing.wait(self._lease.total_seconds() / 3):
            try:
                self._beat()
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("heartbeat failed, will try again")

    def _beat(self) -> None:
        before = self.held()
        with self._sessions.begin() as session:
            ours = dispatches.renew(session, before.keys(), lease=self._lease)
        self._renewed_at = time.monotonic()
        with self._lock:
            lost = [hold for key, hold in before.items() if key in self._held and key not in ours]
        for hold in lost:
            hold.give_up()

    def _watch(self) -> None:
        while not self._closing.wait(self._lease.total_seconds() / 30):
            if not self.healthy():
                self._give_up()
