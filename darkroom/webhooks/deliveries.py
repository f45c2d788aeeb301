"""Delivery queue: claims, settles and reschedules the deliveries of webhooks.

An unfinished delivery is claimed once it is due, with a lease and a fencing token, sent outside
any transaction, and settled. When a sender dies, the lease lapses and another sender sends the
delivery again: at least once, always under the same message id.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Row,
    and_,
    delete,
    func,
    insert,
    tuple_,
    update,
)
from sqlalchemy.orm import Session

from darkroom.db.webhook_tables import Delivery, DeliveryAttempt
from darkroom.events.fanout import MAX_EVENTS
from darkroom.status import DeliveryStatus
from darkroom.webhooks import endpoints, statements

#: Seconds from one attempt to the next: eight attempts in all, the last 31 hours after the first.
DELAYS_S: Final = (5, 30, 120, 600, 3600, 6 * 3600, 24 * 3600)
_JITTER: Final = 0.2  # adds up to this share, so that joint failures are not retried jointly
MAX_RETRY_AFTER_S: Final = 24 * 3600.0

DueRow: TypeAlias = Row[*tuple[Any, ...]]


class AttemptOutcome(StrEnum):
    """Outcome of an attempt. A tenant sees no more than this: details would map our network."""

    HTTP_2XX = "http_2xx"
    HTTP_3XX = "http_3xx"  #: redirects are not followed
    HTTP_4XX = "http_4xx"
    HTTP_410 = "http_410"  #: the receiver asks to be disabled
    HTTP_5XX = "http_5xx"
    BLOCKED = "blocked"  #: the URL policy forbids the URL or its address
    UNREACHABLE = "unreachable"  #: no such name, connection refused or broken off
    TLS = "tls"  #: TLS handshake or certificate check failed
    TIMEOUT = "timeout"
    INVALID_RESPONSE = "invalid_response"  #: not HTTP, or endless
    INTERRUPTED = "interrupted"  #: our sender died; the receiver may have got the webhook
    DROPPED = "dropped"  #: its endpoint was disabled or deleted, or its subject is deleted


_FINAL: Final = frozenset({AttemptOutcome.HTTP_410, AttemptOutcome.DROPPED})


@dataclass(frozen=True)
class Claim:
    """Delivery that this sender may send until its lease ends."""

    id: str
    token: int  #: fencing token of later writes; also the number of the attempt
    tenant_id: str
    endpoint_id: str | None
    url: str
    message_id: str
    type: str
    event_ids: Sequence[int]
    failures: int
    merge_key: Hashable | None = None  #: messages with the same key may be merged into one

    @property
    def destination(self) -> str:
        """Key of the destination's limit and health: its endpoint, or the tenant and its URL."""
        return self.endpoint_id or f"{self.tenant_id} {self.url}"


@dataclass(frozen=True)
class Result:
    """Outcome of a claim's attempt. `retry_after_s`: the receiver's `Retry-After`."""

    claim: Claim
    outcome: AttemptOutcome
    retry_after_s: float | None = None


#: Returns None to send the claim now, or in how many seconds to try again.
Admission = Callable[[Claim], float | None]


def claim(
    session: Session, *, limit: int, lease: timedelta, admit: Admission
) -> tuple[list[Claim], int]:
    """Claim those of the first `limit` due deliveries that `admit` lets pass; count the due ones.

    The others are deferred. Otherwise each claim would look at the whole backlog of a slow
    receiver again, and would not see the deliveries behind it.
    """
    rows = session.connection().execute(statements.select_due(), {"limit": limit}).all()
    _record_interrupted(session, [row for row in rows if row.status == DeliveryStatus.SENDING])
    if undeliverable := [row.id for row in rows if row.url is None]:
        _drop(session, Delivery.id.in_(undeliverable))
    due = _merge(session, [_claim_from(row) for row in rows if row.url is not None])
    claims: list[Claim] = []
    deferred: list[tuple[Claim, float]] = []
    for each in due:
        wait_s = admit(each)
        if wait_s is None:
            claims.append(each)
        else:
            deferred.append((each, wait_s))
    _mark_sending(session, claims, lease)
    _defer(session, deferred)
    return claims, len(rows)


def _claim_from(row: DueRow) -> Claim:
    return Claim(
        id=row.id,
        token=row.attempt_token + 1,
        tenant_id=row.tenant_id,
        endpoint_id=row.endpoint_id,
        url=row.url,
        message_id=row.message_id,
        type=row.type,
        event_ids=row.event_ids,
        failures=row.failures,
        merge_key=(row.endpoint_id, row.type, row.batch_id) if _may_merge(row) else None,
    )


def _may_merge(row: DueRow) -> bool:
    """Return whether it is a list of jobs of a large batch that was never sent."""
    return row.attempt_token == 0 and row.job_id is None and row.type.startswith("job.")


def _merge(session: Session, claims: Sequence[Claim]) -> list[Claim]:
    """Merge messages of the same large batch into messages of up to 100 events, in order."""
    merged: list[Claim] = []
    last_index: dict[object, int] = {}  # of the message that others with its key may be added to
    for each in claims:
        index = last_index.get(each.merge_key) if each.merge_key else None
        if index is not None and len(merged[index].event_ids) + len(each.event_ids) <= MAX_EVENTS:
            head = merged[index]
            merged[index] = replace(head, event_ids=[*head.event_ids, *each.event_ids])
        else:
            last_index[each.merge_key] = len(merged)
            merged.append(each)
    _store_merged(session, claims, merged)
    return merged


def _store_merged(session: Session, before: Sequence[Claim], merged: Sequence[Claim]) -> None:
    sizes = {each.id: len(each.event_ids) for each in before}
    for head in merged:
        if len(head.event_ids) > sizes[head.id]:
            grown = update(Delivery).where(Delivery.id == head.id)
            session.execute(grown.values(event_ids=head.event_ids))
    if absorbed := sizes.keys() - {each.id for each in merged}:
        session.execute(delete(Delivery).where(Delivery.id.in_(absorbed)))


def _mark_sending(session: Session, claims: Sequence[Claim], lease: timedelta) -> None:
    parameters = {"ids": [each.id for each in claims], "lease": lease}
    if claims:
        session.connection().execute(statements.mark_sending(), parameters)


def _defer(session: Session, waits: Sequence[tuple[Claim, float]]) -> None:
    if waits:
        session.connection().execute(
            statements.defer(),
            {"ids": [each.id for each, _ in waits], "wait_s": [wait_s for _, wait_s in waits]},
        )


def make_due_now(session: Session, claim: Claim, *, within: timedelta) -> None:
    """Make deferred deliveries of the claim's destination that are due `within` that time due now.

    Deliveries that have failed keep their schedule.
    """
    same_destination = Delivery.endpoint_id == claim.endpoint_id
    if claim.endpoint_id is None:
        same_destination = and_(Delivery.tenant_id == claim.tenant_id, Delivery.url == claim.url)
    session.execute(
        update(Delivery)
        .where(
            same_destination,
            Delivery.finished_at.is_(None),
            Delivery.status == DeliveryStatus.PENDING,
            Delivery.failures == 0,
            Delivery.next_attempt_at.between(func.now(), func.now() + within),
        )
        .values(next_attempt_at=func.now())
        .execution_options(synchronize_session=False)
    )


def release(session: Session, claims: Sequence[Claim], *, wait_s: float = 0) -> None:
    """Return unsent claims to the queue, due in `wait_s` seconds; they spend no attempt."""
    held = tuple_(Delivery.id, Delivery.attempt_token).in_(
        [(each.id, each.token) for each in claims]
    )
    session.execute(
        update(Delivery)
        .where(held, Delivery.status == DeliveryStatus.SENDING)
        .values(
            status=DeliveryStatus.PENDING, next_attempt_at=func.now() + timedelta(seconds=wait_s)
        )
    )


def settle(session: Session, results: Iterable[Result]) -> int:
    """Store the results of attempts and schedule the next ones; return how many were stored.

    A result is discarded when its lease has lapsed and another sender has claimed the delivery.
    """
    by_id = {result.claim.id: result for result in results}
    settled = [by_id[each] for each in _apply(session, list(by_id.values()))]
    _insert_attempts(session, [(each.claim.id, each.claim.token, each.outcome) for each in settled])
    _record_health(session, settled)
    return len(settled)


def _apply(session: Session, results: Sequence[Result]) -> Sequence[str]:
    """Update the deliveries whose claims still hold; return their ids."""
    if not results:
        return []
    names = ("ids", "tokens", "statuses", "failed", "wait_s")
    columns = map(list, zip(*map(_transition, results), strict=True))
    parameters = dict(zip(names, columns, strict=True))
    return session.connection().scalars(statements.settle(), parameters).all()


def _transition(result: Result) -> tuple[str, int, str, int, float]:
    """Return the id, the token, the next status, the failures to add, and the seconds to wait."""
    key = (result.claim.id, result.claim.token)
    if result.outcome is AttemptOutcome.HTTP_2XX:
        return (*key, DeliveryStatus.ACCEPTED, 0, 0.0)
    wait_s = delay_s(result.claim.failures + 1, retry_after_s=result.retry_after_s)
    if wait_s is None or result.outcome in _FINAL:
        return (*key, DeliveryStatus.EXHAUSTED, 1, 0.0)
    return (*key, DeliveryStatus.PENDING, 1, wait_s)


def delay_s(failures: int, *, retry_after_s: float | None = None) -> float | None:
    """Return the seconds to wait after this many failures; None after the last attempt."""
    if failures > len(DELAYS_S):
        return None
    planned = DELAYS_S[failures - 1] * random.uniform(1, 1 + _JITTER)  # noqa: S311  # no secret
    return max(planned, min(retry_after_s or 0, MAX_RETRY_AFTER_S))


def _record_interrupted(session: Session, rows: Sequence[DueRow]) -> None:
    """Log the attempts whose lease lapsed; they do not count as failures."""
    _insert_attempts(
        session, [(row.id, row.attempt_token, AttemptOutcome.INTERRUPTED) for row in rows]
    )


def _insert_attempts(session: Session, attempts: Sequence[tuple[str, int, AttemptOutcome]]) -> None:
    if attempts:
        rows = [
            dict(zip(("delivery_id", "number", "outcome"), row, strict=True)) for row in attempts
        ]
        session.connection().execute(insert(DeliveryAttempt), rows)


def _record_health(session: Session, results: Sequence[Result]) -> None:
    """Update the health of the endpoints; disable failing ones and drop what they have pending."""
    outcomes: dict[str, set[AttemptOutcome]] = {}
    for result in results:
        if result.claim.endpoint_id is not None:
            outcomes.setdefault(result.claim.endpoint_id, set()).add(result.outcome)
    succeeded = [key for key, seen in outcomes.items() if AttemptOutcome.HTTP_2XX in seen]
    gone = [key for key, seen in outcomes.items() if AttemptOutcome.HTTP_410 in seen]
    failed = outcomes.keys() - set(succeeded)
    endpoints.record_successes(session, succeeded)
    endpoints.record_failures(session, failed)
    for endpoint_id in endpoints.disable_failing(session, failed, gone=gone) if failed else ():
        drop_pending(session, endpoint_id)


def drop_pending(session: Session, endpoint_id: str) -> None:
    """Finish the pending deliveries of a disabled or deleted endpoint. They can be replayed."""
    _drop(
        session,
        and_(Delivery.endpoint_id == endpoint_id, Delivery.status == DeliveryStatus.PENDING),
    )


def _drop(session: Session, condition: ColumnElement[bool]) -> None:
    dropped = session.execute(
        update(Delivery)
        .where(condition, Delivery.finished_at.is_(None))
        .values(
            status=DeliveryStatus.EXHAUSTED,
            finished_at=func.now(),
            attempt_token=Delivery.attempt_token + 1,
        )
        .returning(Delivery.id, Delivery.attempt_token)
    ).all()
    _insert_attempts(
        session, [(row.id, row.attempt_token, AttemptOutcome.DROPPED) for row in dropped]
    )
