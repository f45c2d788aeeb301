"""What happened, written down in the transaction that made it true, with who is to be told.

One statement makes the events, and from them the deliveries to those that asked for them. Where
nobody asked, its second half finds an empty table.

A job's events, and those of a batch and its jobs, become visible in the order of their numbers:
who writes one holds the job's row, and then its batch's, until he commits; the next number is
drawn after that. `darkroom.events.feed` relies on it.
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
    """One event for each job's present status."""
    moved = list(jobs)
    if not moved:
        return
    own_urls = any(job.webhook_url for job in moved)
    if batch_ids := {job.batch_id for job in moved if job.batch_id is not None}:
        _lock_batches(session, batch_ids)
    session.flush()
    # Not by the session, which would take the parameters for the values of a row.
    session.connection().execute(_jobs_recorded(own_urls), {"ids": [job.id for job in moved]})


@functools.cache  # to word it takes longer than to run it
def _jobs_recorded(own_urls: bool) -> Insert:  # noqa: FBT001  # a cache's key
    ids = bindparam("ids", type_=ARRAY(Text))  # one parameter, however many there are
    kind = case(OF_STATUS, value=Job.status)
    happened = (
        select(Job.tenant_id, kind, Job.id, Job.batch_id)
        .where(Job.id == any_(ids))
        .order_by(Job.id)
    )
    return _recorded(["tenant_id", "type", "job_id", "batch_id"], happened, of_jobs=own_urls)


def record_canceled(session: Session, which: ColumnElement[bool]) -> None:
    """One event for each job that fits. Written by the server: there may be 100,000."""
    canceled = select(
        Job.tenant_id, literal(EventType.JOB_CANCELED.value), Job.id, Job.batch_id
    ).where(which)
    _lock_batches(session, session.scalars(select(Job.batch_id).where(which).distinct()).all())
    columns = ["tenant_id", "type", "job_id", "batch_id"]
    session.execute(_recorded(columns, canceled, of_jobs=True))


def record_batches(session: Session, event: EventType, batches: Iterable[Batch]) -> None:
    """One event for each batch."""
    ended = list(batches)
    if not ended:
        return
    ids = literal([batch.id for batch in ended], ARRAY(Text))
    happened = select(Batch.tenant_id, literal(event.value), Batch.id).where(Batch.id == any_(ids))
    own_urls = any(batch.webhook_url for batch in ended)
    session.execute(_recorded(["tenant_id", "type", "batch_id"], happened, of_batches=own_urls))


def record_disabled(session: Session, endpoint_ids: Iterable[str]) -> None:
    """That these endpoints are called no more; the tenant's other ones are told."""
    ids = literal(list(endpoint_ids), ARRAY(Text))
    happened = select(
        WebhookEndpoint.tenant_id, literal(EventType.WEBHOOK_DISABLED.value), WebhookEndpoint.id
    ).where(WebhookEndpoint.id == any_(ids))
    session.execute(_recorded(["tenant_id", "type", "endpoint_id"], happened))


def record_test(session: Session, endpoint: WebhookEndpoint) -> str:
    """A test event, for this endpoint alone; the id of its delivery."""
    event_id = session.scalars(
        insert(Event)
        .values(tenant_id=endpoint.tenant_id, type=EventType.WEBHOOK_TEST, endpoint_id=endpoint.id)
        .returning(Event.id)
    ).one()
    return fanout.insert_test_delivery(session, endpoint, event_id, EventType.WEBHOOK_TEST)


def _lock_batches(session: Session, batch_ids: Collection[str | None]) -> None:
    """Let nobody else write of these batches' jobs until this transaction ends.

    All in one order, so that two writers cannot wait for each other.
    """
    batches = select(Batch.id).where(Batch.id.in_(batch_ids)).order_by(Batch.id)
    session.execute(batches.with_for_update(key_share=True))


def _recorded(
    columns: list[str],
    happened: Select[*tuple[object, ...]],
    *,
    of_jobs: bool = False,
    of_batches: bool = False,
) -> Insert:
    noted = insert(Event).from_select(columns, happened).returning(Event).cte("noted")
    return fanout.insert_deliveries(noted, of_jobs=of_jobs, of_batches=of_batches)
