"""Retention of images and prompts, and removal of objects that belong to no job.

The days count from the end of a batch, or of a single job. They are the batch's, else its tenant's,
else the installation's. Jobs become tombstones first (`darkroom.jobs.deletion`), then their images
leave the store, so that a crash in between leaves no image behind.
"""

import re
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, Integer, Select, and_, cast, delete, func, select, update
from sqlalchemy.orm import InstrumentedAttribute as Attribute
from sqlalchemy.orm import Session

from darkroom.db.tables import Batch, Dispatch, Job, RejectedRowChunk, Tenant
from darkroom.jobs import deletion
from darkroom.status import DispatchStatus
from darkroom.storage.images import Stored

_OUR_KEY: Final = re.compile(r"[^/]+/(job_[0-9a-f]{32})/([0-9]{1,18})\.(?:png|jpg|webp)", re.ASCII)


def redact_due(session: Session, *, default_days: int | None, limit: int) -> int:
    """Redact up to `limit` jobs older than their retention period; return how many."""
    due = session.scalars(_due_in_batches(default_days).limit(limit)).all()
    if len(due) < limit:
        single = _due_single(default_days).limit(limit - len(due))
        due = [*due, *session.scalars(single)]
    deletion.redact(session, sorted(due))
    _close_batches(session, default_days)
    return len(due)


def _is_over(
    finished_at: Attribute[datetime | None],
    days: Sequence[Attribute[int | None]],
    default_days: int | None,
) -> ColumnElement[bool]:
    """Match if the first of `days` that is set has passed; never if none is."""
    period = func.coalesce(*days, cast(default_days, Integer))
    return finished_at < func.now() - func.make_interval(0, 0, 0, period)


def _batch_is_over(default_days: int | None) -> ColumnElement[bool]:
    days = (Batch.retention_days, Tenant.retention_days)
    return and_(
        Batch.tenant_id == Tenant.id,
        Batch.deleted_at.is_(None),
        _is_over(Batch.finished_at, days, default_days),
    )


def _due_in_batches(default_days: int | None) -> Select[str]:
    return (
        select(Job.id)
        .join(Batch, Job.batch_id == Batch.id)
        .join(Tenant, Batch.tenant_id == Tenant.id)
        .where(_batch_is_over(default_days), Job.deleted_at.is_(None))
    )


def _due_single(default_days: int | None) -> Select[str]:
    return (
        select(Job.id)
        .join(Tenant, Job.tenant_id == Tenant.id)
        .where(
            Job.batch_id.is_(None),
            Job.deleted_at.is_(None),
            _is_over(Job.finished_at, [Tenant.retention_days], default_days),
        )
    )


def _close_batches(session: Session, default_days: int | None) -> None:
    """Redact batches that are over and have no job that is not a tombstone."""
    kept = select(Job.id).where(Job.batch_id == Batch.id, Job.deleted_at.is_(None))
    closed = session.scalars(
        update(Batch)
        .where(_batch_is_over(default_days), ~kept.exists())
        .values(deleted_at=func.now(), label=None, webhook_url=None)
        .returning(Batch.id)
        .execution_options(synchronize_session=False)
    ).all()
    session.execute(delete(RejectedRowChunk).where(RejectedRowChunk.batch_id.in_(closed)))


def orphans(session: Session, objects: Collection[Stored], *, older_than: timedelta) -> list[str]:
    """Return the keys of objects that no job has or will have.

    An upload precedes its row, so an object is no orphan while it is young or its dispatch is open.
    An object whose key has another form than an image's is not ours.
    """
    horizon = session.execute(select(func.now())).scalar_one() - older_than
    ours = {
        stored.key: match
        for stored in objects
        if stored.modified_at < horizon and (match := _OUR_KEY.fullmatch(stored.key))
    }
    used = session.scalars(
        select(Job.image_key).where(
            Job.id.in_({match[1] for match in ours.values()}), Job.image_key.is_not(None)
        )
    )
    running = session.scalars(
        select(Dispatch.id).where(
            Dispatch.id.in_({int(match[2]) for match in ours.values()}),
            Dispatch.status == DispatchStatus.RUNNING,
        )
    )
    keys, dispatch_ids = frozenset(used), frozenset(running)
    return [
        key for key, match in ours.items() if key not in keys and int(match[2]) not in dispatch_ids
    ]
