"""Cancellation of jobs in flight: on request of the client, or past their deadline."""

from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions
from darkroom.periodic import PeriodicTask
from darkroom.queue import dispatches
from workers.generation.heartbeat import LeaseHeartbeat

#: One indexed query; a canceled job is generated for so long at most, and one step.
POLL: Final = timedelta(seconds=0.5)


def cancellation_watcher(sessions: Sessions, heartbeat: LeaseHeartbeat) -> PeriodicTask:
    """Return the task that looks for canceled jobs among those in flight."""
    return PeriodicTask(
        "cancellation",
        partial(cancel_requested, sessions, heartbeat),
        interval=POLL,
        transient=(DBAPIError, PoolTimeout),
    )


def cancel_requested(sessions: Sessions, heartbeat: LeaseHeartbeat) -> None:
    """Cancel the jobs in flight whose image is no longer wanted."""
    in_flight = heartbeat.in_flight()
    if not in_flight:
        return
    with sessions.begin() as session:
        canceled = dispatches.canceled_jobs(session, in_flight.keys())
    for dispatch_id, job_ids in canceled.items():
        in_flight[dispatch_id].cancel(job_ids)
