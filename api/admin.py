"""/v1/admin: what an operator says to the whole installation. Needs a key with the scope admin."""

from http import HTTPStatus
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.dependencies import AdminId, Dependencies, Deps
from api.errors import documented
from api.jobs import Limit
from api.schemas.common import Moment, Page
from api.schemas.jobs import ErrorView, JobView
from darkroom.db.tables import Job
from darkroom.jobs import lifecycle, queries
from darkroom.queue import control

router = APIRouter(prefix="/v1/admin", tags=["admin"])
_REFUSALS = documented(HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class QueueControlView(BaseModel):
    """What holds for the whole installation."""

    object: Literal["queue_control"] = "queue_control"
    paused: bool = Field(description="Nothing is claimed: what waits stays, what runs is finished.")
    draining: bool = Field(description="Nothing new is accepted: 503; what is there is drawn.")

    @classmethod
    def now(cls, session: Session) -> Self:
        """As it is in this transaction."""
        state = control.read_state(session)
        return cls(paused=state.paused, draining=state.draining)


class PurgeRequest(BaseModel):
    """Nobody purges by accident."""

    model_config = ConfigDict(extra="forbid")

    confirm: Literal["purge"] = Field(description="The word itself.")


class PurgeResult(BaseModel):
    """How many jobs were canceled."""

    object: Literal["purge_result"] = "purge_result"
    canceled: int


class FailedJob(BaseModel):
    """A job that failed, of whichever tenant. What it was to draw is its tenant's affair."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["failed_job"] = "failed_job"
    tenant_id: str
    batch_id: str | None
    model: str
    microbatch_key: str
    attempt: int
    error: ErrorView
    created_at: Moment
    finished_at: Moment

    @classmethod
    def of(cls, job: Job) -> Self:
        """The job as operators see it."""
        assert job.finished_at is not None  # the CHECK finished_iff_terminal
        return cls(
            id=job.id,
            tenant_id=job.tenant_id,
            batch_id=job.batch_id,
            model=job.model,
            microbatch_key=job.microbatch_key,
            attempt=job.attempt,
            error=ErrorView(
                code=job.error_code or "",
                message=job.error_message or "",
                retryable=bool(job.error_retryable),
            ),
            created_at=job.created_at,
            finished_at=job.finished_at,
        )


@router.post("/pause", responses=_REFUSALS)
def pause(_: AdminId, deps: Deps) -> QueueControlView:
    """From now on workers claim nothing. What runs is finished; what waits, and comes, stays."""
    with deps.sessions.begin() as session:
        control.pause(session)
        return QueueControlView.now(session)


@router.post("/drain", responses=_REFUSALS)
def drain(_: AdminId, deps: Deps) -> QueueControlView:
    """From now on nothing new is accepted (503, `draining`); what is there is drawn."""
    with deps.sessions.begin() as session:
        control.drain(session)
        return QueueControlView.now(session)


@router.post("/resume", responses=_REFUSALS)
def resume(_: AdminId, deps: Deps) -> QueueControlView:
    """Ends a pause and a drain."""
    with deps.sessions.begin() as session:
        control.resume(session)
        view = QueueControlView.now(session)
    deps.notifier.notify_workers()
    return view


@router.post("/purge", responses=_REFUSALS | documented(HTTPStatus.UNPROCESSABLE_ENTITY))
def purge(_: AdminId, deps: Deps, confirmation: PurgeRequest) -> PurgeResult:
    """Cancels every job that waits, of all tenants. The body must say `{"confirm": "purge"}`."""
    assert confirmation.confirm == "purge"  # anything else was a 422
    canceled = 0
    while found := _purge_some(deps):
        canceled += found
    deps.notifier.notify_webhook_senders()
    return PurgeResult(canceled=canceled)


def _purge_some(deps: Dependencies) -> int:
    with deps.sessions.begin() as session:
        return lifecycle.purge(session)


@router.get("/failed", responses=_REFUSALS)
def list_failed(
    _: AdminId,
    deps: Deps,
    limit: Limit = 20,
    cursor: Annotated[str | None, Query(pattern=r"^job_[0-9a-f]{32}$")] = None,
) -> Page[FailedJob]:
    """The jobs that failed and were not retried, of all tenants, newest first."""
    with deps.sessions.begin() as session:
        found = queries.failed(session, limit=limit + 1, after=cursor)
    views = [FailedJob.of(job) for job in found[:limit]]
    return Page(data=views, next_cursor=views[-1].id if len(found) > limit else None)


@router.post(
    "/failed/{job_id}/retry",
    status_code=HTTPStatus.ACCEPTED,
    responses=_REFUSALS | documented(HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.CONFLICT),
)
def retry_failed(job_id: str, _: AdminId, deps: Deps) -> JobView:
    """A new job that asks for the same, of the same tenant; asked again, it is the same new job."""
    with deps.sessions.begin() as session:
        tenant_id = queries.tenant_of(session, job_id)
        view = deps.job_view(lifecycle.retry(session, tenant_id, job_id))
    deps.notifier.notify_workers()
    return view
