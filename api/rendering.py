"""Rows as the resources that clients see, with what the process knows besides."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from api.dependencies import Dependencies
from api.schemas.batches import Batch
from api.schemas.job_parts import QueuePosition
from api.schemas.jobs import Job
from darkroom import batches
from darkroom.batches import Counts
from darkroom.db import tables
from darkroom.forecast.eta import Eta
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.jobs import progress
from darkroom.status import Status


def render_job(deps: Dependencies, job: tables.Job, *, position: int | None = None) -> Job:
    """Render a job; `position` is its place in the queue, where it is known exactly."""
    [rendered] = render_jobs(deps, [job], position=position)
    return rendered


def render_jobs(
    deps: Dependencies, jobs: Sequence[tables.Job], *, position: int | None = None
) -> list[Job]:
    """Render jobs. Asks Redis once if any of them runs."""
    steps = progress.read(deps.progress_redis, jobs)
    snapshot = deps.snapshot_cache.recall()
    return [
        Job.of(
            job,
            queue=QueuePosition.of(job, snapshot, position),
            steps=steps.get(job.id),
            store=deps.store,
            url_ttl_s=deps.settings.image_url_ttl_s,
        )
        for job in jobs
    ]


def render_batch(deps: Dependencies, session: Session, batch: tables.Batch) -> Batch:
    """Render a batch with its present counts."""
    [rendered] = render_batches(deps, session, [batch])
    return rendered


def render_batches(
    deps: Dependencies, session: Session, found: Sequence[tables.Batch]
) -> list[Batch]:
    """Render batches with their present counts."""
    counted = batches.count(session, found)
    unfinished = any(batch.finished_at is None for batch in found)
    snapshot = deps.snapshot_cache.now() if unfinished else None
    return [
        Batch.of(batch, counts, _eta(session, snapshot, batch, counts))
        for batch, counts in zip(found, counted, strict=True)
    ]


def _eta(
    session: Session, snapshot: QueueSnapshot | None, batch: tables.Batch, counts: Counts
) -> Eta | None:
    if snapshot is None:
        return None
    waiting = bool(counts.by_status.get(Status.QUEUED))
    return snapshot.of_batch(session, batch, waiting=waiting)
