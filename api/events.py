"""/v1/jobs/{id}/events and /v1/batches/{id}/events: events as they happen (SSE)."""

import random
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from redis import Redis
from sqlalchemy.orm import Session

from api.dependencies import Deps, TenantId, key_id
from api.errors import documented
from api.parameters import BatchId, JobId
from api.rendering import render_batch, render_job
from api.schemas.batches import Batch, BatchCounts
from api.schemas.events import Event
from api.schemas.job_parts import StepProgress
from api.schemas.jobs import Job
from api.stream_hub import LiveUpdate, LiveValue, StreamHub
from darkroom import batches
from darkroom.accounts import api_keys
from darkroom.db.connection import Sessions, use_repeatable_read
from darkroom.events import feed
from darkroom.events.feed import EventCursor, EventScope, FeedEvent
from darkroom.jobs import progress, queries
from darkroom.status import Status

_RETRY_MS: Final = (1000, 3000)  # random, so that clients do not all reconnect at once
_PROGRESS_EVERY_S: Final = 0.5
_COUNTS_EVERY_S: Final = 1.0  # a large batch takes some 20 ms to count

router = APIRouter(tags=["events"])


class StreamExhausted(Exception):
    """The client has received the last event. A 204 stops an EventSource from reconnecting."""


async def no_content(_: Request, __: Exception) -> Response:
    """Respond to StreamExhausted."""
    return Response(status_code=HTTPStatus.NO_CONTENT)


@dataclass(frozen=True)
class StreamRequest:
    """Stream that a client opens: the resource now, and the cursor to continue from."""

    streams: StreamHub
    cursor: EventCursor
    key_id: str | None
    snapshot: Job | Batch
    #: the last event that is in the snapshot; None when the client needs no snapshot
    snapshot_id: str | None


LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        pattern=r"^evt_[0-9a-f]{32}$",
        description="The last `id` received: the stream continues after it, without a snapshot.",
    ),
]


def _open_job(
    request: Request, job_id: JobId, tenant_id: TenantId, deps: Deps, last_id: LastEventId = None
) -> StreamRequest:
    with deps.sessions.begin() as session:
        use_repeatable_read(session)
        job = render_job(deps, queries.find(session, tenant_id, job_id))
        cursor, snapshot_id = _start(session, EventScope(tenant_id, job_id), job, last_id)
    return StreamRequest(deps.streams, cursor, key_id(request), job, snapshot_id)


def _open_batch(
    request: Request,
    batch_id: BatchId,
    tenant_id: TenantId,
    deps: Deps,
    last_id: LastEventId = None,
) -> StreamRequest:
    with deps.sessions.begin() as session:
        use_repeatable_read(session)
        batch = render_batch(deps, session, batches.find(session, tenant_id, batch_id))
        cursor, snapshot_id = _start(session, EventScope(tenant_id, batch_id), batch, last_id)
    return StreamRequest(deps.streams, cursor, key_id(request), batch, snapshot_id)


def _start(
    session: Session, scope: EventScope, resource: Job | Batch, last_id: str | None
) -> tuple[EventCursor, str | None]:
    """Return the cursor to continue from, and the snapshot's id if a snapshot is needed.

    An unknown event, as after a restore of the database, counts as none.
    """
    newest, newest_id = feed.latest(session, scope)
    known = None if last_id is None else feed.cursor_for(session, scope, last_id)
    if known is None:
        return newest, newest_id
    if known == newest and resource.finished_at is not None:
        raise StreamExhausted
    return known, None


_RESPONSES: Final = documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY) | {
    HTTPStatus.NO_CONTENT.value: {
        "description": "The `Last-Event-ID` was the last event; do not reconnect"
    }
}


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Stream the events of a job",
    response_class=EventSourceResponse,
    responses=_RESPONSES | documented(HTTPStatus.GONE),
)
async def stream_job_events(
    stream: Annotated[StreamRequest, Depends(_open_job)],
) -> AsyncIterator[ServerSentEvent]:
    """Send `snapshot`, the job as it is, then its events until it has finished.

    Each event is named by its type (`job.started`, `job.succeeded`, …), has an `id` for
    `Last-Event-ID`, and an Event as data. `progress` events between them tell the denoise step;
    they have no `id` and are not sent again.
    """
    async for event in _follow(stream):
        yield event


@router.get(
    "/v1/batches/{batch_id}/events",
    summary="Stream the events of a batch",
    response_class=EventSourceResponse,
    responses=_RESPONSES,
)
async def stream_batch_events(
    stream: Annotated[StreamRequest, Depends(_open_batch)],
) -> AsyncIterator[ServerSentEvent]:
    """Send `snapshot`, the batch as it is, then its events and its jobs' until it has finished.

    Each event is named by its type (`job.started`, `batch.completed`, …), has an `id` for
    `Last-Event-ID`, and an Event as data. `counts` events between them tell the jobs by status, at
    most once a second; they have no `id`.
    """
    async for event in _follow(stream):
        yield event


async def _follow(request: StreamRequest) -> AsyncIterator[ServerSentEvent]:
    snapshot = request.snapshot
    if request.snapshot_id is not None:
        yield ServerSentEvent(
            event="snapshot",
            id=request.snapshot_id,
            data=snapshot,
            retry=random.randint(*_RETRY_MS),  # noqa: S311  # jitter, not a secret
        )
        if snapshot.finished_at is not None:
            return
    changing = snapshot.status != Status.QUEUED
    with request.streams.open(request.cursor, changing=changing, key_id=request.key_id) as stream:
        async for item in stream:
            yield _server_sent(item)


def _server_sent(item: FeedEvent | LiveUpdate) -> ServerSentEvent:
    if isinstance(item, LiveUpdate):
        return ServerSentEvent(event=item.name, data=item.value)
    return ServerSentEvent(event=item.type, id=item.id, data=Event.of(item))


def open_stream_hub(sessions: Sessions, progress_redis: Redis) -> StreamHub:
    """Return a hub that reads events and live values from the database and Redis."""

    def changed_scopes(after: int) -> tuple[int, Collection[str] | None]:
        with sessions.begin() as session:
            return feed.changed_scopes(session, after)

    def events_after(
        cursors: Collection[EventCursor],
    ) -> Mapping[EventCursor, list[FeedEvent]]:
        with sessions.begin() as session:
            return feed.events_after(session, cursors)

    def dead_keys(key_ids: Collection[str]) -> Collection[str]:
        with sessions.begin() as session:
            return api_keys.dead_keys(session, key_ids)

    return StreamHub(
        changed_scopes=changed_scopes,
        events_after=events_after,
        dead_keys=dead_keys,
        live_values=(_job_progress(sessions, progress_redis), _batch_counts(sessions)),
    )


def _job_progress(sessions: Sessions, progress_redis: Redis) -> LiveValue:
    def read(scopes: Collection[EventScope]) -> Mapping[EventScope, StepProgress]:
        with sessions.begin() as session:
            running = queries.running(session, scopes)
        known = progress.read(progress_redis, running)
        return {
            EventScope(job.tenant_id, job.id): StepProgress(
                step=known[job.id][0], steps=known[job.id][1]
            )
            for job in running
            if job.id in known
        }

    return LiveValue("progress", of_jobs=True, every_s=_PROGRESS_EVERY_S, read=read, settles=False)


def _batch_counts(sessions: Sessions) -> LiveValue:
    def read(scopes: Collection[EventScope]) -> Mapping[EventScope, BatchCounts]:
        with sessions.begin() as session:
            found = batches.find_all(session, scopes)
            counted = zip(found, batches.count(session, found), strict=True)
        return {
            EventScope(batch.tenant_id, batch.id): BatchCounts.of(counts)
            for batch, counts in counted
        }

    return LiveValue("counts", of_jobs=False, every_s=_COUNTS_EVERY_S, read=read, settles=True)
