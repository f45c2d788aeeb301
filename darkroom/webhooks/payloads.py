"""What a webhook says: thin, below 32 KiB, and nothing that a log may not hold.

Made from the rows when it is sent: the receiver asks the API for more, by the URLs in it.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import ARRAY, BigInteger, Row, Select, any_, bindparam, select
from sqlalchemy.orm import Session

from darkroom import batches
from darkroom.db.tables import Batch, Event, Job
from darkroom.db.webhook_tables import WebhookEndpoint
from darkroom.event_types import EventType
from darkroom.status import Status
from darkroom.webhooks.deliveries import Claim

Json = dict[str, Any]

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
_OF_JOB: Final = (
    *("id", "batch_id", "row_number", "image_number", "custom_id", "label", "attempt"),
    *("error_code", "error_message", "error_retryable", "created_at"),
)


def bodies(session: Session, claims: Sequence[Claim]) -> dict[str, bytes]:
    """The body for each claim, by its delivery's id; none where what it is about is gone."""
    happened = _events(session, claims)
    ended = {row.batch_id for row in happened.values() if row.job_id is None}
    told = _batches(session, ended) if ended - {None} else {}
    made: dict[str, bytes] = {}
    for claim in claims:
        rows = [happened[event_id] for event_id in claim.event_ids if event_id in happened]
        if rows:
            made[claim.id] = _body(claim, rows, told)
    return made


def _events(session: Session, claims: Iterable[Claim]) -> Mapping[int, Row[*tuple[Any, ...]]]:
    ids = {event_id for claim in claims for event_id in claim.event_ids}
    rows = session.connection().execute(_happened(), {"ids": sorted(ids)}) if ids else ()
    return {row.id: row for row in rows}


@functools.cache  # to word it takes longer than to run it
def _happened() -> Select[*tuple[Any, ...]]:
    job = (getattr(Job, name).label(f"job_{name}") for name in _OF_JOB if name != "id")
    return (
        select(
            *(Event.id, Event.type, Event.created_at, Event.job_id, Event.batch_id),
            Event.endpoint_id,
            *job,
            WebhookEndpoint.disabled_reason,
        )
        .outerjoin(Job, Job.id == Event.job_id)
        .outerjoin(WebhookEndpoint, WebhookEndpoint.id == Event.endpoint_id)
        .where(Event.id == any_(bindparam("ids", type_=ARRAY(BigInteger))))
    )


def _batches(session: Session, batch_ids: set[str | None]) -> Mapping[str, Json]:
    found = session.scalars(select(Batch).where(Batch.id.in_(batch_ids - {None}))).all()
    counted = zip(found, batches.count(session, found), strict=True) if found else ()
    return {batch.id: _batch(batch, counts) for batch, counts in counted}


def _body(claim: Claim, rows: Sequence[Row[*tuple[Any, ...]]], told: Mapping[str, Json]) -> bytes:
    body = {"type": claim.type, "timestamp": _moment(rows[0].created_at)}
    text = json.dumps(
        body | {"data": _data(rows, told)}, ensure_ascii=False, separators=(",", ":")
    ).encode()
    assert len(text) < MAX_BYTES, f"{len(text)} bytes in {claim.id}"
    return text


def _data(rows: Sequence[Row[*tuple[Any, ...]]], told: Mapping[str, Json]) -> Json:
    first = rows[0]
    if first.endpoint_id is not None:
        return {"id": first.endpoint_id, "object": "webhook", "reason": first.disabled_reason}
    if first.job_id is None:
        return told.get(first.batch_id, {"id": first.batch_id, "object": "batch"})
    if len(rows) == 1:
        return _job(first)
    listed = [_listed_job(row) for row in rows]
    return {"object": "list", "batch_id": first.batch_id, "data": listed}


def _job(row: Row[*tuple[Any, ...]]) -> Json:
    return {
        **_identity(row, _CUSTOM_ID_BYTES),
        "batch_id": row.batch_id,
        "label": row.job_label,
        "attempt": row.job_attempt,
        "error": _error(row),
        "created_at": row.job_created_at and _moment(row.job_created_at),
        "urls": {"self": f"/v1/jobs/{row.job_id}", "image": f"/v1/jobs/{row.job_id}/image"},
    }


def _listed_job(row: Row[*tuple[Any, ...]]) -> Json:
    listed = _identity(row, _LISTED_CUSTOM_ID_BYTES)
    error = _error(row)
    return listed | {"error": error and {"code": error["code"], "retryable": error["retryable"]}}


def _identity(row: Row[*tuple[Any, ...]], custom_id_bytes: int) -> Json:
    custom_id = row.job_custom_id
    if (
        custom_id is not None
        and len(json.dumps(custom_id, ensure_ascii=False).encode()) > custom_id_bytes
    ):
        custom_id = None
    return {
        "id": row.job_id,
        "object": "job",
        "status": _STATUS[EventType(row.type)],
        "row_number": row.job_row_number,
        "image_number": row.job_image_number,
        "custom_id": custom_id,
    }


def _error(row: Row[*tuple[Any, ...]]) -> Json | None:
    if row.type != EventType.JOB_FAILED or row.job_error_code is None:
        return None
    return {
        "code": row.job_error_code,
        "message": row.job_error_message[:_MESSAGE_CHARS],
        "retryable": row.job_error_retryable,
    }


def _batch(batch: Batch, counts: batches.Counts) -> Json:
    return {
        "id": batch.id,
        "object": "batch",
        "status": counts.status,
        "outcome": counts.outcome,
        "label": batch.label,
        "counts": {
            "total": counts.total,
            "rejected": counts.rejected,
            **{status.value: counts.by_status.get(status, 0) for status in Status},
        },
        "created_at": _moment(batch.created_at),
        "finished_at": batch.finished_at and _moment(batch.finished_at),
        "urls": {
            "self": f"/v1/batches/{batch.id}",
            "jobs": f"/v1/jobs?batch_id={batch.id}&limit=100",
        },
    }


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
