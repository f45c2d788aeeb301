"""The same request sent twice is carried out once: keys that clients choose, kept for a day."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from darkroom.db.tables import IdempotencyKey
from darkroom.errors import DarkroomError

KEPT: Final = timedelta(hours=24)


class IdempotencyKeyReused(DarkroomError):
    """The key came before with another request; nothing was done."""


@dataclass(frozen=True)
class StoredResponse:
    """What the client reads: the first answer to this request, byte for byte."""

    body: str
    replayed: bool


def once(
    session: Session, tenant_id: str, key: str | None, *, request: bytes, act: Callable[[], str]
) -> StoredResponse:
    """Do `act` and keep its answer, or repeat the answer kept for this key; without one, just act.

    `request` is all that decides what is done; the same key with another one raises KeyReused.
    Part of the caller's transaction: what did not commit leaves no answer behind. Another request
    with this key that is under way is waited for.
    """
    if key is None:
        return StoredResponse(act(), replayed=False)
    session.execute(select(func.pg_advisory_xact_lock(_lock_of(tenant_id, key))))
    fingerprint = hashlib.sha256(request).hexdigest()
    kept = session.scalar(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at > func.now() - KEPT,
        )
    )
    if kept is None:
        return _first(session, tenant_id, key, fingerprint, act)
    if kept.request_sha256 != fingerprint:
        raise IdempotencyKeyReused(
            "this Idempotency-Key was used for another request; choose a new one"
        )
    return StoredResponse(kept.response, replayed=True)


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
    """Drop what no request may ask for any more."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - KEPT))


def delete_responses(session: Session, tenant_id: str, object_id: str) -> None:
    """Drop the answers that repeat this object, because it was deleted."""
    session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.response.contains(object_id)
        )
    )


def _lock_of(tenant_id: str, key: str) -> int:
    """A number for the advisory lock; two keys that share one only wait for each other."""
    digest = hashlib.sha256(f"{tenant_id}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
