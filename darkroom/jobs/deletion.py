"""Deletion of client data: rows become tombstones, images leave the store."""

from collections.abc import Collection

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from darkroom import idempotency
from darkroom.db.tables import Job
from darkroom.errors import JobNotFinished
from darkroom.jobs import queries
from darkroom.status import FINISHED


def delete(session: Session, tenant_id: str, job_id: str) -> str | None:
    """Turn a finished job into a tombstone; return the key of the image to remove.

    The key stays in the row until `forget_image`, so that a crash in between leaves no image
    behind. Raises NotFound, Deleted, JobNotFinished.
    """
    job = queries.find(session, tenant_id, job_id, lock=True)
    if job.status not in FINISHED:
        raise JobNotFinished(f"job {job_id} is {job.status}; cancel it before deleting it")
    redact(session, [job_id])
    idempotency.delete_responses(session, tenant_id, job_id)
    return job.image_key


def redact(session: Session, job_ids: Collection[str]) -> None:
    """Remove what the client wrote from finished jobs, which become tombstones."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.finished_at.is_not(None), Job.deleted_at.is_(None))
        .values(
            deleted_at=func.now(),
            prompt="",
            negative_prompt="",
            label=None,
            metadata_={},
            custom_id=None,
            webhook_url=None,
            webhook_events=None,
        )
        .execution_options(synchronize_session=False)
    )


def unswept_images(session: Session, *, limit: int) -> dict[str, str]:
    """Return image keys of deleted jobs whose image may still be in the store, by job id."""
    jobs = session.scalars(
        select(Job)
        .where(Job.deleted_at.is_not(None), Job.image_key.is_not(None))
        .order_by(Job.deleted_at)
        .limit(limit)
    )
    return {job.id: job.image_key for job in jobs if job.image_key is not None}


def forget_image(session: Session, job_ids: Collection[str]) -> None:
    """Record that the images of these deleted jobs are no longer in the store."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.deleted_at.is_not(None))
        .values(image_key=None)
        .execution_options(synchronize_session=False)
    )
