"""Cleaner: deletes what is no longer kept, and stored objects that no job refers to."""

import logging
from datetime import timedelta
from typing import Final

from darkroom import idempotency
from darkroom.db.connection import Sessions
from darkroom.db.locks import AdvisoryLock, try_lock
from darkroom.jobs import deletion, retention
from darkroom.storage.images import ImageStore
from darkroom.webhooks import delivery_log

_CHUNK: Final = 500

logger = logging.getLogger(__name__)


class Cleaner:
    """One pass at a time over the database and the store, in chunks."""

    def __init__(
        self,
        sessions: Sessions,
        store: ImageStore,
        *,
        retention_days: int | None,
        orphan_age: timedelta,
    ) -> None:
        self._sessions = sessions
        self._store = store
        self._retention_days = retention_days
        self._orphan_age = orphan_age
        self._listed_to = ""  #: key of the store after which the next pass looks for orphans

    def clean(self) -> bool:
        """Run one pass, unless another process runs one; return whether more is due now."""
        with try_lock(self._sessions, AdvisoryLock.CLEAN) as leads:
            return leads and self._delete_chunks()

    def _delete_chunks(self) -> bool:
        """Delete one chunk of each kind; return whether more is due now."""
        self._delete_old_rows()
        redacted, removed = self._redact(), self._remove_images()
        self._remove_orphans()
        return _CHUNK in {redacted, removed}

    def _delete_old_rows(self) -> None:
        with self._sessions.begin() as session:
            idempotency.delete_expired(session)
            delivery_log.delete_expired(session)

    def _redact(self) -> int:
        with self._sessions.begin() as session:
            done = retention.redact_due(session, default_days=self._retention_days, limit=_CHUNK)
        if done:
            logger.info("retention: redacted %d jobs older than their retention period", done)
        return done

    def _remove_images(self) -> int:
        """Remove the images of redacted jobs; a row loses its key only once its image is gone."""
        with self._sessions.begin() as session:
            left = deletion.unswept_images(session, limit=_CHUNK)
        for key in left.values():
            self._store.delete(key)
        with self._sessions.begin() as session:
            deletion.forget_image(session, sorted(left))
        return len(left)

    def _remove_orphans(self) -> None:
        """Remove the orphans on one page of the store; the next pass looks at the next page."""
        found = self._store.page(after=self._listed_to, limit=_CHUNK)
        self._listed_to = found[-1].key if found else ""
        with self._sessions.begin() as session:
            keys = retention.orphans(session, found, older_than=self._orphan_age)
        for key in keys:
            self._store.delete(key)
        if keys:
            logger.warning("removed %d stored objects that no job refers to", len(keys))
