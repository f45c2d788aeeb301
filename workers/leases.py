"""The heartbeat: renews the dispatches that are being worked on, and notices when one was lost."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from darkroom import dispatches
from darkroom.database import Sessions

logger = logging.getLogger(__name__)


def _nothing() -> None:
    """Nothing is under way yet that could be stopped."""


@dataclass
class Hold:
    """A dispatch while somebody works on it. `on_lost` is called if it is no longer ours."""

    on_lost: Callable[[], None] = _nothing


class Leases:
    """A thread that renews what is held, three times a lease, while the process lives.

    Only what is held: a dispatch whose pump fell over must run out, or its jobs would stay
    `running` for as long as this process lives.
    """

    def __init__(self, sessions: Sessions, *, lease: timedelta) -> None:
        self._sessions = sessions
        self._lease = lease
        self._held: dict[int, Hold] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def close(self) -> None:
        """Stop beating; what is still held runs out by itself."""
        self._closing.set()
        self._thread.join(timeout=5)

    def healthy(self) -> bool:
        """False once two thirds of a lease passed without a renewal: claim nothing then."""
        return time.monotonic() - self._renewed_at < self._lease.total_seconds() * 2 / 3

    def busy(self) -> bool:
        """Whether anything is held."""
        return bool(self._held)

    @contextmanager
    def holding(self, dispatch_id: int) -> Iterator[Hold]:
        """While the block runs, the dispatch is renewed."""
        hold = Hold()
        with self._lock:
            self._held[dispatch_id] = hold
        try:
            yield hold
        finally:
            with self._lock:
                del self._held[dispatch_id]

    def _run(self) -> None:
        while not self._closing.wait(self._lease.total_seconds() / 3):
            try:
                self._beat()
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("heartbeat failed, will try again")

    def _beat(self) -> None:
        with self._lock:
            before = dict(self._held)
        with self._sessions.begin() as session:
            ours = dispatches.renew(session, before.keys(), lease=self._lease)
        self._renewed_at = time.monotonic()
        with self._lock:
            lost = [hold for key, hold in before.items() if key in self._held and key not in ours]
        for hold in lost:
            hold.on_lost()
