"""The process's view of the queue: looked at by one thread, at most once a second, if asked."""

import logging
import threading
import time
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.forecast import snapshot
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.generation.model_registry import ModelRegistry

FRESH_S: Final = 1.0  #: a look this old is looked up anew, and used meanwhile
USABLE_S: Final = 5.0  #: one older than this is not used
_PATIENCE_S: Final = 1.0  #: how long a request waits for the first look; it can do without

logger = logging.getLogger(__name__)


class SnapshotCache:
    """A thread that looks at the queue whenever somebody has asked and the last look is old."""

    def __init__(self, sessions: Sessions, registry: ModelRegistry) -> None:
        self._sessions = sessions
        self._registry = registry
        self._latest: QueueSnapshot | None = None
        self._wanted = threading.Event()
        self._looked = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outlook", daemon=True)
        self._thread.start()

    def recall(self) -> QueueSnapshot | None:
        """The last look, unless it is too old to be used. Does not block."""
        latest = self._latest
        age_s = float("inf") if latest is None else time.monotonic() - latest.taken_at
        if age_s > FRESH_S and not self._wanted.is_set():
            self._wanted.set()
        return latest if age_s <= USABLE_S else None

    def now(self) -> QueueSnapshot | None:
        """The same, but waits a moment for a look where there is none; None if none comes."""
        with self._looked:
            self._looked.wait_for(lambda: self.recall() is not None, _PATIENCE_S)
        return self.recall()

    def age_s(self, look: QueueSnapshot) -> float:
        """How long ago it was."""
        return round(time.monotonic() - look.taken_at, 3)

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._wanted.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self._closing.is_set():
                return
            try:
                self._look()
            except (DBAPIError, PoolTimeout) as error:
                logger.warning("the queue could not be looked at: %s", type(error).__name__)
                self._closing.wait(FRESH_S)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("the queue could not be looked at")
                self._closing.wait(FRESH_S)
            self._wanted.clear()

    def _look(self) -> None:
        before = None if self._latest is None else self._latest.scan
        with self._sessions.begin() as session:
            latest = snapshot.take_snapshot(session, self._registry, before)
        with self._looked:
            self._latest = latest
            self._looked.notify_all()
