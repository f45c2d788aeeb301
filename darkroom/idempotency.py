"""Idempotency keys: a request that is sent twice is carried out once, for a day."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from darkroom.db.tables import IdempotencyKey
from darkroom.errors import DarkroomError

RETENTION: Final = timedelta(hours=24)


class IdempotencyKeyReused(DarkroomError):
    """The key was used for another request; nothing was done."""


@dataclass(frozen=True)
class StoredResponse:
    """First response to a request, byte for byte."""

    body: str
    replayed: bool


def once(
    session: Session, tenant_id: str, key: str | None, *, request: bytes, act: Callable[[], str]
) -> StoredResponse:
    """Call `act` and store its response, or return the response stored for this key.

    Without a key, just call `act`. `request` is everything that determines the effect; the same key
    with another request raises IdempotencyKeyReused. The response is part of the caller's
    transaction. A concurrent request with this key is waited for.
    """
    if key is None:
        return StoredResponse(act(), replayed=False)
    session.execute(select(func.pg_advisory_xact_lock(_lock_of(tenant_id, key))))
    fingerprint = hashlib.sha256(request).hexdigest()
    stored = session.scalar(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at > func.now() - RETENTION,
        )
    )
    if stored is None:
        return _first(session, tenant_id, key, fingerprint, act)
    if stored.request_sha256 != fingerprint:
        raise IdempotencyKeyReused(
            "this Idempotency-Key was used for another request; choose a new one"
        )
    return StoredResponse(stored.response, replayed=True)


def _first(
    session: Session, tenant_id: str, key: str, fingerprint: str, act: Callable[[], str]
) -> StoredResponse:
    body = act()
    outdated = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == key)
    session.execute(delete(IdempotencyKey).where(*outdated))
    session.execute(
        insert(IdempotencyKey).values(
            tenant_id=tenant_id, key=key, request_sha256=fingerprint, response=body
        )
    )
    return StoredResponse(body, replayed=False)


def delete_expired(session: Session) -> None:
    """Delete responses past their retention."""
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - RETENTION)
    )


def delete_responses(session: Session, tenant_id: str, object_id: str) -> None:
    """Delete responses that contain an object that was deleted."""
    session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.response.contains(object_id)
        )
    )


def _lock_of(tenant_id: str, key: str) -> int:
    """Return the advisory lock of a key; two keys that share one only wait for each other."""
    digest = hashlib.sha256(f"{tenant_id}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
