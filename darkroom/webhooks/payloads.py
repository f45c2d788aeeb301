"""Bodies of webhooks: rendered from the rows at each attempt, below 32 KiB, without prompts.

They are thin: the receiver asks the API for more, by the URLs in them.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import ARRAY, BigInteger, Row, Select, any_, bindparam, select
from sqlalchemy.orm import Session

from darkroom import batches
from darkroom.db import webhook_tables
from darkroom.db.tables import Batch, Event, Job
from darkroom.event_types import EventType
from darkroom.status import Status
from darkroom.webhooks.deliveries import Claim
from darkroom.webhooks.payload_models import (
    MESSAGES,
    BatchEventCounts,
    BatchEventUrls,
    EndpointEventData,
    JobEventError,
    JobEventList,
    JobEventListError,
    JobEventListItem,
    JobEventUrls,
    WebhookBatch,
    WebhookJob,
)

EventRow: TypeAlias = Row[*tuple[Any, ...]]
Data: TypeAlias = WebhookJob | JobEventList | WebhookBatch | EndpointEventData

MAX_BYTES: Final = 32 * 2**10
_MESSAGE_CHARS: Final = 500
_CUSTOM_ID_BYTES: Final = 1024  #: a longer one is left out: half an id is a wrong id
_LISTED_CUSTOM_ID_BYTES: Final = 64  #: of a hundred jobs in one message
_STATUS: Final = {
    EventType.JOB_STARTED: Status.RUNNING,
    EventType.JOB_SUCCEEDED: Status.SUCCEEDED,
    EventType.JOB_FAILED: Status.FAILED,
    EventType.JOB_CANCELED: Status.CANCELED,
    EventType.JOB_EXPIRED: Status.EXPIRED,
}
_JOB_COLUMNS: Final = (
    *("row_number", "image_number", "custom_id", "label", "attempt", "created_at"),
    *("error_code", "error_message", "error_retryable"),
)


def bodies(session: Session, claims: Sequence[Claim]) -> dict[str, bytes]:
    """Render the body of each claim, by delivery id; leave out those whose subject is deleted."""
    events = _events(session, claims)
    batch_data = _batches(session, {row.batch_id for row in events.values() if row.job_id is None})
    rendered: dict[str, bytes] = {}
    for claim in claims:
        rows = [events[event_id] for event_id in claim.event_ids if event_id in events]
        data = _data(rows, batch_data) if rows else None
        if data is not None:
            rendered[claim.id] = _body(claim, rows[0], data)
    return rendered


def _events(session: Session, claims: Iterable[Claim]) -> Mapping[int, EventRow]:
    ids = {event_id for claim in claims for event_id in claim.event_ids}
    rows = session.connection().execute(_select_events(), {"ids": sorted(ids)}) if ids else ()
    return {row.id: row for row in rows}


@functools.cache  # compiling it takes longer than running it
def _select_events() -> Select[*tuple[Any, ...]]:
    endpoint = webhook_tables.WebhookEndpoint
    return (
        select(
            *(Event.id, Event.type, Event.created_at, Event.job_id, Event.batch_id),
            Event.endpoint_id,
            *(getattr(Job, name).label(f"job_{name}") for name in _JOB_COLUMNS),
            endpoint.disabled_reason,
        )
        .outerjoin(Job, Job.id == Event.job_id)
        .outerjoin(endpoint, endpoint.id == Event.endpoint_id)
        .where(Event.id == any_(bindparam("ids", type_=ARRAY(BigInteger))))
    )


def _batches(session: Session, batch_ids: set[str | None]) -> Mapping[str, WebhookBatch]:
    wanted = batch_ids - {None}
    found = session.scalars(select(Batch).where(Batch.id.in_(wanted))).all() if wanted else ()
    counted = zip(found, batches.count(session, found), strict=True) if found else ()
    return {batch.id: _batch(batch, counts) for batch, counts in counted}


def _body(claim: Claim, first: EventRow, data: Data) -> bytes:
    message = MESSAGES[EventType(claim.type)].model_validate(
        {"type": claim.type, "timestamp": first.created_at, "data": data}
    )
    body = message.model_dump_json().encode()
    assert len(body) < MAX_BYTES, f"{len(body)} bytes in {claim.id}"
    return body


def _data(rows: Sequence[EventRow], batch_data: Mapping[str, WebhookBatch]) -> Data | None:
    first = rows[0]
    if first.endpoint_id is not None:
        return EndpointEventData(
            id=first.endpoint_id, object="webhook", reason=first.disabled_reason
        )
    if first.job_id is None:
        return batch_data.get(first.batch_id)
    if len(rows) == 1:
        return _job(first)
    items = [_listed_job(row) for row in rows]
    return JobEventList(object="list", batch_id=first.batch_id, data=items)


def _job(row: EventRow) -> WebhookJob:
    path = f"/v1/jobs/{row.job_id}"
    return WebhookJob(
        id=row.job_id,
        object="job",
        status=_STATUS[EventType(row.type)],
        row_number=row.job_row_number,
        image_number=row.job_image_number,
        custom_id=_custom_id(row, _CUSTOM_ID_BYTES),
        batch_id=row.batch_id,
        label=row.job_label,
        attempt=row.job_attempt,
        error=_error(row),
        created_at=row.job_created_at,
        urls=JobEventUrls(self=path, image=f"{path}/image"),
    )


def _listed_job(row: EventRow) -> JobEventListItem:
    error = _error(row)
    return JobEventListItem(
        id=row.job_id,
        object="job",
        status=_STATUS[EventType(row.type)],
        row_number=row.job_row_number,
        image_number=row.job_image_number,
        custom_id=_custom_id(row, _LISTED_CUSTOM_ID_BYTES),
        error=error and JobEventListError(code=error.code, retryable=error.retryable),
    )


def _custom_id(row: EventRow, max_bytes: int) -> str | None:
    custom_id: str | None = row.job_custom_id
    if custom_id and len(json.dumps(custom_id, ensure_ascii=False).encode()) > max_bytes:
        return None
    return custom_id


def _error(row: EventRow) -> JobEventError | None:
    if row.type != EventType.JOB_FAILED or row.job_error_code is None:
        return None
    return JobEventError(
        code=row.job_error_code,
        message=row.job_error_message[:_MESSAGE_CHARS],
        retryable=row.job_error_retryable,
    )


def _batch(batch: Batch, counts: batches.Counts) -> WebhookBatch:
    by_status = {status.value: counts.by_status.get(status, 0) for status in Status}
    return WebhookBatch(
        id=batch.id,
        object="batch",
        status=counts.status,
        outcome=counts.outcome,
        label=batch.label,
        counts=BatchEventCounts(total=counts.total, rejected=counts.rejected, **by_status),
        created_at=batch.created_at,
        finished_at=batch.finished_at,
        urls=BatchEventUrls(
            self=f"/v1/batches/{batch.id}", jobs=f"/v1/jobs?batch_id={batch.id}&limit=100"
        ),
    )
