"""Steps that tests of jobs share: settle a dispatch, let its lease or a backoff end."""

from datetime import timedelta

from sqlalchemy import func, select, update

from darkroom.db.connection import Sessions
from darkroom.db.tables import Dispatch, Job
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Outcome, Succeeded


def succeeded(job: Job, key: str = "a/b/1.png") -> Succeeded:
    """Return the outcome of a job whose image was stored."""
    return Succeeded(job.id, key, "0" * 64, 10, inference_ms=5, upload_ms=1)


def status_of(sessions: Sessions, job_id: str) -> str | None:
    """Return the status in the job's row."""
    with sessions.begin() as session:
        return session.scalar(select(Job.status).where(Job.id == job_id))


def settle(sessions: Sessions, dispatch_id: int, *outcomes: Outcome) -> bool:
    """Settle a dispatch in a transaction of its own."""
    with sessions.begin() as session:
        return dispatches.settle(session, dispatch_id, outcomes)


def expire_lease(sessions: Sessions, dispatch_id: int) -> None:
    """Let the lease of a dispatch end a second ago."""
    with sessions.begin() as session:
        session.execute(
            update(Dispatch)
            .where(Dispatch.id == dispatch_id)
            .values(leased_until=func.now() - timedelta(seconds=1))
        )


def reap(sessions: Sessions, max_attempts: int = 3) -> int:
    """Expire lapsed leases as the reaper does; return how many."""
    with sessions.begin() as session:
        return dispatches.expire_leases(session, max_attempts=max_attempts)


def end_backoffs(sessions: Sessions) -> None:
    """Let every backoff be over."""
    with sessions.begin() as session:
        session.execute(update(Job).values(scheduled_at=func.now() - timedelta(seconds=1)))
