"""/v1/jobs/{id}/events and /v1/batches/{id}/events: what happens, as it happens (SSE)."""

import random
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from redis import Redis
from sqlalchemy.orm import Session

from api.dependencies import Deps, TenantId, key_id
from api.errors import documented
from api.schemas.batches import BatchUrls, BatchView, CountsView
from api.schemas.common import Moment
from api.schemas.jobs import ErrorView, JobUrls, JobView, StepProgress
from api.stream_hub import LiveUpdate, LiveValue, StreamHub
from darkroom import batches
from darkroom.accounts import api_keys
from darkroom.db.connection import Sessions, use_repeatable_read
from darkroom.event_types import EventType
from darkroom.events import feed
from darkroom.events.feed import EventCursor, EventScope, FeedEvent
from darkroom.jobs import progress, queries
from darkroom.status import BatchStatus, Status

_RETRY_MS: Final = (1000, 3000)  # drawn at random: after a restart not all come back at once
_PROGRESS_EVERY_S: Final = 0.5
_COUNTS_EVERY_S: Final = 1.0  # a large batch takes some 20 ms to count

router = APIRouter(tags=["events"])


class JobEventData(BaseModel):
    """The job an event is about; `status` and `error` as they were from then on."""

    id: str
    object: Literal["job"] = "job"
    status: Status
    batch_id: str | None
    row_number: int | None
    custom_id: str | None
    error: ErrorView | None
    urls: JobUrls


class BatchEventData(BaseModel):
    """The batch an event is about; `status` as it was from then on."""

    id: str
    object: Literal["batch"] = "batch"
    status: BatchStatus
    urls: BatchUrls


class EventView(BaseModel):
    """Something that happened; a webhook that tells of it has the same id."""

    id: str
    object: Literal["event"] = "event"
    type: EventType
    timestamp: Moment
    data: JobEventData | BatchEventData

    @classmethod
    def of(cls, happening: FeedEvent) -> "EventView":
        """The event as clients see it."""
        return cls(
            id=happening.id,
            type=happening.type,
            timestamp=happening.created_at,
            data=_job(happening) if happening.status else _batch(happening),
        )


def _job(happening: FeedEvent) -> JobEventData:
    assert happening.job_id is not None
    assert happening.status is not None  # both because it is a job's event
    return JobEventData(
        id=happening.job_id,
        status=happening.status,
        batch_id=happening.batch_id,
        row_number=happening.row_number,
        custom_id=happening.custom_id,
        error=_error(happening) if happening.status is Status.FAILED else None,
        urls=JobUrls.of(happening.job_id),
    )


def _error(happening: FeedEvent) -> ErrorView:
    return ErrorView(
        code=happening.error_code or "",
        message=happening.error_message or "",
        retryable=bool(happening.error_retryable),
    )


def _batch(happening: FeedEvent) -> BatchEventData:
    assert happening.batch_id is not None  # because it is a batch's event
    canceled = happening.type is EventType.BATCH_CANCELED
    return BatchEventData(
        id=happening.batch_id,
        status=BatchStatus.CANCELED if canceled else BatchStatus.COMPLETED,
        urls=BatchUrls.of(happening.batch_id),
    )


class StreamExhausted(Exception):
    """The client has seen the subject's last event. 204 tells an EventSource to come no more."""


async def no_content(_: Request, __: Exception) -> Response:
    """The answer to NothingFurther."""
    return Response(status_code=HTTPStatus.NO_CONTENT)


@dataclass(frozen=True)
class StreamRequest:
    """Where a stream begins, and who opens it."""

    streams: StreamHub
    place: EventCursor
    key_id: str | None
    snapshot: JobView | BatchView
    #: the last event that is in the snapshot; None when the client needs no snapshot
    snapshot_id: str | None


LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        pattern=r"^evt_[0-9a-f]{32}$",
        description="The last `id` received: the stream goes on after it, without a snapshot.",
    ),
]


def _open_job(
    request: Request, job_id: str, tenant_id: TenantId, deps: Deps, seen: LastEventId = None
) -> StreamRequest:
    with deps.sessions.begin() as session:
        use_repeatable_read(session)
        view = deps.job_view(queries.find(session, tenant_id, job_id))
        place, snapshot_id = _begin(session, EventScope(tenant_id, job_id), view, seen)
    return StreamRequest(deps.streams, place, key_id(request), view, snapshot_id)


def _open_batch(
    request: Request, batch_id: str, tenant_id: TenantId, deps: Deps, seen: LastEventId = None
) -> StreamRequest:
    with deps.sessions.begin() as session:
        use_repeatable_read(session)
        batch = batches.find(session, tenant_id, batch_id)
        view = deps.batch_view(session, batch)
        place, snapshot_id = _begin(session, EventScope(tenant_id, batch_id), view, seen)
    return StreamRequest(deps.streams, place, key_id(request), view, snapshot_id)


def _begin(
    session: Session, subject: EventScope, view: JobView | BatchView, seen: str | None
) -> tuple[EventCursor, str | None]:
    """The place to go on from, and a snapshot's id where there has to be one.

    An event that the subject does not have, of a database that was set back since, is as none.
    """
    newest, newest_id = feed.latest(session, subject)
    known = None if seen is None else feed.cursor_for(session, subject, seen)
    if known is None:
        return newest, newest_id
    if known == newest and view.finished_at is not None:
        raise StreamExhausted
    return known, None


_RESPONSES: Final = documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY) | {
    HTTPStatus.NO_CONTENT.value: {"description": "The last event has been received: it is over."}
}


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses=_RESPONSES | documented(HTTPStatus.GONE),
)
async def follow_job(
    opening: Annotated[StreamRequest, Depends(_open_job)],
) -> AsyncIterator[ServerSentEvent]:
    """First `snapshot`, the job as it is; then its events as they happen, until it has ended.

    Each is named by its type (`job.started`, `job.succeeded`, …), carries its `id` for
    `Last-Event-ID`, and an Event as data. Between them come `progress` events without an id, which
    tell the denoise step and are not sent again.
    """
    async for event in _follow(opening):
        yield event


@router.get(
    "/v1/batches/{batch_id}/events", response_class=EventSourceResponse, responses=_RESPONSES
)
async def follow_batch(
    opening: Annotated[StreamRequest, Depends(_open_batch)],
) -> AsyncIterator[ServerSentEvent]:
    """First `snapshot`, the batch as it is; then its events and its jobs', until it has ended.

    Each is named by its type (`job.started`, `batch.completed`, …), carries its `id` for
    `Last-Event-ID`, and an Event as data. Between them come `counts` events without an id: the
    jobs by status, at most once a second.
    """
    async for event in _follow(opening):
        yield event


async def _follow(opening: StreamRequest) -> AsyncIterator[ServerSentEvent]:
    snapshot = opening.snapshot
    if opening.snapshot_id is not None:
        yield ServerSentEvent(
            event="snapshot",
            id=opening.snapshot_id,
            data=snapshot,
            retry=random.randint(*_RETRY_MS),  # noqa: S311  # jitter, not a secret
        )
        if snapshot.finished_at is not None:
            return
    moving = snapshot.status != Status.QUEUED
    with opening.streams.open(opening.place, moving=moving, key_id=opening.key_id) as stream:
        async for item in stream:
            yield _sent(item)


def _sent(item: FeedEvent | LiveUpdate) -> ServerSentEvent:
    if isinstance(item, LiveUpdate):
        return ServerSentEvent(event=item.gauge, data=item.value)
    return ServerSentEvent(event=item.type, id=item.id, data=EventView.of(item))


def event_streams(sessions: Sessions, board: Redis) -> StreamHub:
    """The streams of a process, and what they are fed from."""

    def stirred(after: int) -> tuple[int, Collection[str] | None]:
        with sessions.begin() as session:
            return feed.changed_scopes(session, after)

    def since(places: Collection[EventCursor]) -> Mapping[EventCursor, list[FeedEvent]]:
        with sessions.begin() as session:
            return feed.events_after(session, places)

    def dead(key_ids: Collection[str]) -> Collection[str]:
        with sessions.begin() as session:
            return api_keys.dead_keys(session, key_ids)

    def steps(subjects: Collection[EventScope]) -> Mapping[EventScope, StepProgress]:
        with sessions.begin() as session:
            running = queries.running(session, subjects)
        known = progress.read(board, running)
        return {
            EventScope(job.tenant_id, job.id): StepProgress(
                step=known[job.id][0], steps=known[job.id][1]
            )
            for job in running
            if job.id in known
        }

    def counts(subjects: Collection[EventScope]) -> Mapping[EventScope, CountsView]:
        with sessions.begin() as session:
            found = batches.find_all(session, subjects)
            counted = zip(found, batches.count(session, found), strict=True)
        return {EventScope(batch.tenant_id, batch.id): CountsView.of(now) for batch, now in counted}

    return StreamHub(
        stirred=stirred,
        since=since,
        dead=dead,
        gauges=(
            LiveValue("progress", of_jobs=True, every_s=_PROGRESS_EVERY_S, read=steps, rests=False),
            LiveValue("counts", of_jobs=False, every_s=_COUNTS_EVERY_S, read=counts, rests=True),
        ),
    )
