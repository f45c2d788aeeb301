"""The janitor: takes away what has been kept long enough, and objects that no job knows of.

A thread of every worker process, beside the sweeper, which must not wait for the store.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.db.locks import AdvisoryLock
from darkroom.errors import StorageUnavailable
from darkroom.jobs import deletion, retention
from darkroom.storage.images import ImageStore

_CHUNK: Final = 500

logger = logging.getLogger(__name__)


class Cleaner:
    """A thread that cleans until closed."""

    def __init__(
        self,
        sessions: Sessions,
        store: ImageStore,
        *,
        every: timedelta,
        retention_days: int | None,
        orphan_age: timedelta,
    ) -> None:
        self._sessions = sessions
        self._store = store
        self._every_s = every.total_seconds()
        self._retention_days = retention_days
        self._orphan_age = orphan_age
        self._listed_to = ""  # where in the store to look for orphans next
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def start(self) -> None:
        """Begin to clean."""
        self._thread.start()

    def close(self) -> None:
        """Stop cleaning."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self.clean()
            except (StorageUnavailable, DBAPIError, PoolTimeout) as error:
                logger.warning("could not clean, will try again: %s", error)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("could not clean, will try again")

    def clean(self) -> None:
        """One round; nothing, when another process's is under way."""
        with _alone(self._sessions) as alone:
            if not alone:
                return
            while self._redact() == _CHUNK and not self._closing.is_set():
                pass
            while self._remove_images() == _CHUNK and not self._closing.is_set():
                pass
            self._remove_orphans()

    def _redact(self) -> int:
        with self._sessions.begin() as session:
            done = retention.redact_due(session, default_days=self._retention_days, limit=_CHUNK)
        if done:
            logger.info("%d jobs were kept long enough; tombstones are left", done)
        return done

    def _remove_images(self) -> int:
        """Of tombstones. The row forgets an image only when it is gone."""
        with self._sessions.begin() as session:
            left = deletion.unswept_images(session, limit=_CHUNK)
        for key in left.values():
            self._store.delete(key)
        with self._sessions.begin() as session:
            deletion.forget_image(session, sorted(left))
        return len(left)

    def _remove_orphans(self) -> None:
        """Of one page of the store; the next round looks at the next."""
        found = self._store.page(after=self._listed_to, limit=_CHUNK)
        self._listed_to = found[-1].key if found else ""
        with self._sessions.begin() as session:
            keys = retention.orphans(session, found, older_than=self._orphan_age)
        for key in keys:
            self._store.delete(key)
        if keys:
            logger.warning("%d objects belonged to no job and were removed", len(keys))


@contextmanager
def _alone(sessions: Sessions) -> Iterator[bool]:
    """Whether no other process is at it; held by the connection, as the store is slow."""
    engine: Engine = sessions.kw["bind"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        taken = bool(connection.scalar(select(func.pg_try_advisory_lock(AdvisoryLock.CLEAN))))
        try:
            yield taken
        finally:
            if taken:
                connection.execute(select(func.pg_advisory_unlock(AdvisoryLock.CLEAN)))
