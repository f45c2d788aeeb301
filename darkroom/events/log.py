"""Event log: events and their webhook deliveries, written in the transaction of the change.

One statement inserts the events and, from them, the deliveries to their subscribers. Without
subscribers its second half reads an empty table.

The events of a job, and those of a batch and its jobs, become visible in the order of their
numbers: the writer locks the job's row, then its batch's, before it takes a number, and keeps both
until it commits. `darkroom.events.feed` relies on it.
"""

import functools
from collections.abc import Collection, Iterable
from typing import Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Insert,
    Select,
    Text,
    any_,
    bindparam,
    case,
    insert,
    literal,
    select,
)
from sqlalchemy.orm import Session

from darkroom.db.tables import Batch, Event, Job
from darkroom.db.webhook_tables import WebhookEndpoint
from darkroom.event_types import EventType
from darkroom.events import fanout
from darkroom.status import Status

OF_STATUS: Final = {
    Status.RUNNING: EventType.JOB_STARTED,
    Status.SUCCEEDED: EventType.JOB_SUCCEEDED,
    Status.FAILED: EventType.JOB_FAILED,
    Status.CANCELED: EventType.JOB_CANCELED,
    Status.EXPIRED: EventType.JOB_EXPIRED,
}


def record_jobs(session: Session, jobs: Iterable[Job]) -> None:
    """Record one event for each job's current status."""
    changed = list(jobs)
    if not changed:
        return
    own_urls = any(job.webhook_url for job in changed)
    if batch_ids := {job.batch_id for job in changed if job.batch_id is not None}:
        _lock_batches(session, batch_ids)
    session.flush()
    # Not by the session, which would take the parameters for the values of a row.
    session.connection().execute(_insert_job_events(own_urls), {"ids": [job.id for job in changed]})


@functools.cache  # compiling the statement takes longer than running it
def _insert_job_events(own_urls: bool) -> Insert:  # noqa: FBT001  # a cache's key
    ids = bindparam("ids", type_=ARRAY(Text))  # one parameter, however many there are
    kind = case(OF_STATUS, value=Job.status)
    source = (
        select(Job.tenant_id, kind, Job.id, Job.batch_id)
        .where(Job.id == any_(ids))
        .order_by(Job.id)
    )
    return _insert_events(["tenant_id", "type", "job_id", "batch_id"], source, of_jobs=own_urls)


def record_canceled(session: Session, condition: ColumnElement[bool]) -> None:
    """Record one event for each job that matches, on the server: there may be 100,000."""
    canceled = select(
        Job.tenant_id, literal(EventType.JOB_CANCELED.value), Job.id, Job.batch_id
    ).where(condition)
    _lock_batches(session, session.scalars(select(Job.batch_id).where(condition).distinct()).all())
    columns = ["tenant_id", "type", "job_id", "batch_id"]
    session.execute(_insert_events(columns, canceled, of_jobs=True))


def record_batches(session: Session, event: EventType, batches: Iterable[Batch]) -> None:
    """Record one event for each batch."""
    finished = list(batches)
    if not finished:
        return
    ids = literal([batch.id for batch in finished], ARRAY(Text))
    source = select(Batch.tenant_id, literal(event.value), Batch.id).where(Batch.id == any_(ids))
    own_urls = any(batch.webhook_url for batch in finished)
    session.execute(_insert_events(["tenant_id", "type", "batch_id"], source, of_batches=own_urls))


def record_disabled(session: Session, endpoint_ids: Iterable[str]) -> None:
    """Record that these endpoints were disabled, for the tenant's other endpoints."""
    ids = literal(list(endpoint_ids), ARRAY(Text))
    source = select(
        WebhookEndpoint.tenant_id, literal(EventType.WEBHOOK_DISABLED.value), WebhookEndpoint.id
    ).where(WebhookEndpoint.id == any_(ids))
    session.execute(_insert_events(["tenant_id", "type", "endpoint_id"], source))


def record_test(session: Session, endpoint: WebhookEndpoint) -> str:
    """Record a test event for this endpoint alone; return the id of its delivery."""
    event_id = session.scalars(
        insert(Event)
        .values(tenant_id=endpoint.tenant_id, type=EventType.WEBHOOK_TEST, endpoint_id=endpoint.id)
        .returning(Event.id)
    ).one()
    return fanout.insert_test_delivery(session, endpoint, event_id, EventType.WEBHOOK_TEST)


def _lock_batches(session: Session, batch_ids: Collection[str | None]) -> None:
    """Lock the batch rows, in one order, so that events of their jobs are in commit order."""
    batches = select(Batch.id).where(Batch.id.in_(batch_ids)).order_by(Batch.id)
    session.execute(batches.with_for_update(key_share=True))


def _insert_events(
    columns: list[str],
    source: Select[*tuple[object, ...]],
    *,
    of_jobs: bool = False,
    of_batches: bool = False,
) -> Insert:
    events = insert(Event).from_select(columns, source).returning(Event).cte("recorded")
    return fanout.insert_deliveries(events, of_jobs=of_jobs, of_batches=of_batches)
