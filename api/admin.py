"""/v1/admin: control of the whole installation, for keys with the scope `admin`."""

from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Query

from api.dependencies import AdminId, Deps
from api.errors import documented
from api.parameters import JobId, Limit, next_cursor
from api.rendering import render_job
from api.schemas.jobs import FailedJob, FailedJobList, Job
from api.schemas.queue import PurgeRequest, PurgeResult, QueueControl
from darkroom.db.connection import Sessions
from darkroom.jobs import lifecycle, queries
from darkroom.queue import control

router = APIRouter(prefix="/v1/admin", tags=["admin"])
_REFUSALS: Final = documented(HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@router.post("/pause", summary="Pause the queue", responses=_REFUSALS)
def pause_queue(_: AdminId, deps: Deps) -> QueueControl:
    """Stop claiming jobs. Running jobs are finished, queued and new ones wait."""
    with deps.sessions.begin() as session:
        control.pause(session)
        return QueueControl.now(session)


@router.post("/drain", summary="Drain the queue", responses=_REFUSALS)
def drain_queue(_: AdminId, deps: Deps) -> QueueControl:
    """Reject new jobs with 503 `draining`. Accepted jobs are generated."""
    with deps.sessions.begin() as session:
        control.drain(session)
        return QueueControl.now(session)


@router.post("/resume", summary="Resume the queue", responses=_REFUSALS)
def resume_queue(_: AdminId, deps: Deps) -> QueueControl:
    """End a pause and a drain."""
    with deps.sessions.begin() as session:
        control.resume(session)
        state = QueueControl.now(session)
    deps.notifier.notify_workers()
    return state


@router.post(
    "/purge",
    summary="Purge the queue",
    responses=_REFUSALS | documented(HTTPStatus.UNPROCESSABLE_ENTITY),
)
def purge_queue(_: AdminId, deps: Deps, confirmation: PurgeRequest) -> PurgeResult:
    """Cancel every queued job of all tenants. The body must be `{"confirm": "purge"}`."""
    assert confirmation.confirm == "purge"  # anything else was a 422
    canceled = 0
    while found := _purge_some(deps.sessions):
        canceled += found
    deps.notifier.notify_webhook_senders()
    return PurgeResult(canceled=canceled)


def _purge_some(sessions: Sessions) -> int:
    with sessions.begin() as session:
        return lifecycle.purge(session)


@router.get("/failed", summary="List failed jobs", responses=_REFUSALS)
def list_failed_jobs(
    _: AdminId,
    deps: Deps,
    limit: Limit = 20,
    cursor: Annotated[
        str | None,
        Query(pattern=r"^job_[0-9a-f]{32}$", description="`next_cursor` of the page before."),
    ] = None,
) -> FailedJobList:
    """Return the failed jobs of all tenants that were not retried, newest first."""
    with deps.sessions.begin() as session:
        found = queries.failed(session, limit=limit + 1, after=cursor)
    jobs = [FailedJob.of(job) for job in found[:limit]]
    return FailedJobList(data=jobs, next_cursor=next_cursor(found, limit))


@router.post(
    "/failed/{job_id}/retry",
    summary="Retry a failed job",
    status_code=HTTPStatus.ACCEPTED,
    responses=_REFUSALS | documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def retry_failed_job(job_id: JobId, _: AdminId, deps: Deps) -> Job:
    """Submit the job again for its tenant. A second retry returns the same new job."""
    with deps.sessions.begin() as session:
        tenant_id = queries.tenant_of(session, job_id)
        job = render_job(deps, lifecycle.retry(session, tenant_id, job_id))
    deps.notifier.notify_workers()
    return job
