"""What follows when jobs have moved: events, and batches that are complete."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from darkroom import batches, events
from darkroom.tables import Job


def announce(session: Session, moved: Sequence[Job]) -> None:
    """Events for those of the jobs that have ended, and for batches whose last job this was."""
    ended = [job for job in moved if job.finished_at is not None]
    events.record_jobs(session, ended)
    batches.close_finished(session, {job.batch_id for job in ended if job.batch_id})
