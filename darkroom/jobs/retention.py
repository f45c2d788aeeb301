"""For how long pictures and prompts are kept, and what is done about objects that no job knows.

A batch's days count from its end, a single job's from its own. They are the batch's, else its
tenant's, else the installation's. What is due becomes tombstones first (`darkroom.jobs.deletion`),
then its images leave the store, so that a death in between leaves nothing that nobody will remove.
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
    """Make tombstones of jobs whose time is over, no more than `limit`; how many."""
    due = session.scalars(_due_of_batches(default_days).limit(limit)).all()
    if len(due) < limit:
        single = _due_alone(default_days).limit(limit - len(due))
        due = [*due, *session.scalars(single)]
    deletion.redact(session, sorted(due))
    _close_batches(session, default_days)
    return len(due)


def _over(
    ended_at: Attribute[datetime | None],
    days: Sequence[Attribute[int | None]],
    default_days: int | None,
) -> ColumnElement[bool]:
    """Whether that many days have passed; never, when nobody has said how many."""
    agreed = func.coalesce(*days, cast(default_days, Integer))
    return ended_at < func.now() - func.make_interval(0, 0, 0, agreed)


def _batch_is_over(default_days: int | None) -> ColumnElement[bool]:
    days = (Batch.retention_days, Tenant.retention_days)
    return and_(
        Batch.tenant_id == Tenant.id,
        Batch.deleted_at.is_(None),
        _over(Batch.finished_at, days, default_days),
    )


def _due_of_batches(default_days: int | None) -> Select[str]:
    return (
        select(Job.id)
        .join(Batch, Job.batch_id == Batch.id)
        .join(Tenant, Batch.tenant_id == Tenant.id)
        .where(_batch_is_over(default_days), Job.deleted_at.is_(None))
    )


def _due_alone(default_days: int | None) -> Select[str]:
    return (
        select(Job.id)
        .join(Tenant, Job.tenant_id == Tenant.id)
        .where(
            Job.batch_id.is_(None),
            Job.deleted_at.is_(None),
            _over(Job.finished_at, [Tenant.retention_days], default_days),
        )
    )


def _close_batches(session: Session, default_days: int | None) -> None:
    """What a client wrote about a batch goes with the last of its jobs."""
    left = select(Job.id).where(Job.batch_id == Batch.id, Job.deleted_at.is_(None))
    closed = session.scalars(
        update(Batch)
        .where(_batch_is_over(default_days), ~left.exists())
        .values(deleted_at=func.now(), label=None, webhook_url=None)
        .returning(Batch.id)
        .execution_options(synchronize_session=False)
    ).all()
    session.execute(delete(RejectedRowChunk).where(RejectedRowChunk.batch_id.in_(closed)))


def orphans(session: Session, found: Collection[Stored], *, older_than: timedelta) -> list[str]:
    """Keys of those of the objects that no job has, nor will have.

    An upload precedes the row that names it, so a young object is never one, nor is one whose
    dispatch is still open. What is not named as we name pictures is somebody else's.
    """
    horizon = session.execute(select(func.now())).scalar_one() - older_than
    named = {
        each.key: name
        for each in found
        if each.modified_at < horizon and (name := _OUR_KEY.fullmatch(each.key))
    }
    held = session.scalars(
        select(Job.image_key).where(
            Job.id.in_({name[1] for name in named.values()}), Job.image_key.is_not(None)
        )
    )
    under_way = session.scalars(
        select(Dispatch.id).where(
            Dispatch.id.in_({int(name[2]) for name in named.values()}),
            Dispatch.status == DispatchStatus.RUNNING,
        )
    )
    kept, drawing = frozenset(held), frozenset(under_way)
    return [key for key, name in named.items() if key not in kept and int(name[2]) not in drawing]
