"""The queue of webhooks: every query and every move of a delivery.

Unfinished, a delivery is claimed once it is due, with a lease and a fencing token, sent outside
any transaction, and settled. A sender that dies leaves it to the next one: at least once, always
under the same message id.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

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
_JITTER: Final = 0.2  # later by up to this share, so that what failed together does not return so
LONGEST_RETRY_AFTER_S: Final = 24 * 3600.0


class AttemptOutcome(StrEnum):
    """How an attempt ended. All that a tenant is told: more would map our network for him."""

    HTTP_2XX = "http_2xx"
    HTTP_3XX = "http_3xx"  #: redirects are not followed
    HTTP_4XX = "http_4xx"
    HTTP_410 = "http_410"  #: the receiver wants no more
    HTTP_5XX = "http_5xx"
    BLOCKED = "blocked"  #: the URL leads where we do not call
    UNREACHABLE = "unreachable"  #: no such name, refused, or broken off
    TLS = "tls"  #: no trust in its certificate
    TIMEOUT = "timeout"
    INVALID_RESPONSE = "invalid_response"  #: not HTTP, or endless
    INTERRUPTED = "interrupted"  #: our sender died; it may have arrived
    DROPPED = "dropped"  #: its endpoint was disabled or deleted, or its subject is gone


_FINAL: Final = frozenset({AttemptOutcome.HTTP_410, AttemptOutcome.DROPPED})


@dataclass(frozen=True)
class Claim:
    """A delivery that is ours to send, until its lease ends."""

    id: str
    token: int  #: fences later writes; also the number of the attempt
    tenant_id: str
    endpoint_id: str | None
    url: str
    message_id: str
    type: str
    event_ids: Sequence[int]
    failures: int
    joins: Hashable | None = None  #: messages that are alike in this may become one

    @property
    def destination(self) -> str:
        """What has one health and one limit: an endpoint, or a tenant's URL."""
        return self.endpoint_id or f"{self.tenant_id} {self.url}"


@dataclass(frozen=True)
class Result:
    """How the attempt of a claim ended. `retry_after_s`: the receiver's wish."""

    claim: Claim
    outcome: AttemptOutcome
    retry_after_s: float | None = None


#: Whether to send now: None, or in how many seconds to look at it again.
Admission = Callable[[Claim], float | None]


def claim(
    session: Session, *, limit: int, lease: timedelta, admit: Admission
) -> tuple[list[Claim], int]:
    """Take those of the first `limit` due deliveries that are admitted; also how many were due.

    The others are put off, so that a crowd for one slow receiver is looked at once, and not by
    every claim again while it hides all that stand behind it.
    """
    rows = session.connection().execute(statements.due(), {"most": limit}).all()
    _note_interrupted(session, [row for row in rows if row.status == DeliveryStatus.SENDING])
    if unwanted := [row.id for row in rows if row.url is None]:
        _drop(session, Delivery.id.in_(unwanted))
    wanted = _joined(session, [_claim_of(row) for row in rows if row.url is not None])
    claims: list[Claim] = []
    put_off: list[tuple[Claim, float]] = []
    for each in wanted:
        wait_s = admit(each)
        if wait_s is None:
            claims.append(each)
        else:
            put_off.append((each, wait_s))
    _open(session, claims, lease)
    _defer(session, put_off)
    return claims, len(rows)


def _claim_of(row: Row[*tuple[Any, ...]]) -> Claim:
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
        joins=(row.endpoint_id, row.type, row.batch_id) if _may_be_joined(row) else None,
    )


def _may_be_joined(row: Row[*tuple[Any, ...]]) -> bool:
    """A message of a large batch that was never sent: it tells of jobs, and of no single one."""
    return row.attempt_token == 0 and row.job_id is None and row.type.startswith("job.")


def _joined(session: Session, claims: Sequence[Claim]) -> list[Claim]:
    """The claims, in order; messages of a large batch that wait together become few."""
    joined: list[Claim] = []
    open_place: dict[object, int] = {}
    for each in claims:
        place = open_place.get(each.joins) if each.joins else None
        room = MAX_EVENTS - (len(joined[place].event_ids) if place is not None else MAX_EVENTS)
        if place is not None and len(each.event_ids) <= room:
            head = joined[place]
            joined[place] = replace(head, event_ids=[*head.event_ids, *each.event_ids])
        else:
            open_place[each.joins] = len(joined)
            joined.append(each)
    before = {each.id: len(each.event_ids) for each in claims}
    for head in joined:
        if len(head.event_ids) > before[head.id]:
            grown = update(Delivery).where(Delivery.id == head.id)
            session.execute(grown.values(event_ids=head.event_ids))
    absorbed = before.keys() - {each.id for each in joined}
    if absorbed:
        session.execute(delete(Delivery).where(Delivery.id.in_(absorbed)))
    return joined


def _open(session: Session, claims: Sequence[Claim], lease: timedelta) -> None:
    opened = {"ids": [each.id for each in claims], "lease": lease}
    if claims:
        session.connection().execute(statements.opened(), opened)


def _defer(session: Session, waits: Sequence[tuple[Claim, float]]) -> None:
    """Not claimed: to be looked at again in so many seconds."""
    if waits:
        session.connection().execute(
            statements.defer(),
            {"ids": [each.id for each, _ in waits], "wait_s": [wait_s for _, wait_s in waits]},
        )


def make_due_now(session: Session, claim: Claim, *, within: timedelta) -> None:
    """What was put off for the claim's destination, and was due within that time, is due now."""
    own = Delivery.endpoint_id == claim.endpoint_id
    if claim.endpoint_id is None:
        own = and_(Delivery.tenant_id == claim.tenant_id, Delivery.url == claim.url)
    session.execute(
        update(Delivery)
        .where(
            own,
            Delivery.finished_at.is_(None),
            Delivery.status == DeliveryStatus.PENDING,
            Delivery.failures == 0,  # those that failed keep to their schedule
            Delivery.next_attempt_at.between(func.now(), func.now() + within),
        )
        .values(next_attempt_at=func.now())
        .execution_options(synchronize_session=False)
    )


def release(session: Session, claims: Sequence[Claim], *, wait_s: float = 0) -> None:
    """Hand back what was claimed and not begun; no attempt is spent."""
    ours = tuple_(Delivery.id, Delivery.attempt_token).in_(
        [(each.id, each.token) for each in claims]
    )
    session.execute(
        update(Delivery)
        .where(ours, Delivery.status == DeliveryStatus.SENDING)
        .values(
            status=DeliveryStatus.PENDING, next_attempt_at=func.now() + timedelta(seconds=wait_s)
        )
    )


def settle(session: Session, results: Iterable[Result]) -> int:
    """Write down how attempts ended, and what follows; how many of them were still ours to write.

    A claim whose lease ran out and that another sender took changes nothing.
    """
    by_id = {result.claim.id: result for result in results}
    ours = [by_id[each] for each in _close(session, list(by_id.values()))]
    _log(session, [(result.claim, result.outcome) for result in ours])
    _note_health(session, ours)
    return len(ours)


def _close(session: Session, results: Sequence[Result]) -> Sequence[str]:
    """Move each delivery on, if its claim still holds; the ids of those."""
    if not results:
        return []
    names = ("ids", "tokens", "statuses", "failed", "wait_s")
    columns = map(list, zip(*map(_move, results), strict=True))
    moves = dict(zip(names, columns, strict=True))
    return session.connection().scalars(statements.closed(), moves).all()


def _move(result: Result) -> tuple[str, int, str, int, float]:
    """Id, token, next status, failures to add, seconds to wait."""
    key = (result.claim.id, result.claim.token)
    if result.outcome is AttemptOutcome.HTTP_2XX:
        return (*key, DeliveryStatus.ACCEPTED, 0, 0.0)
    wait_s = delay_s(result.claim.failures + 1, retry_after_s=result.retry_after_s)
    if wait_s is None or result.outcome in _FINAL:
        return (*key, DeliveryStatus.EXHAUSTED, 1, 0.0)
    return (*key, DeliveryStatus.PENDING, 1, wait_s)


def delay_s(failures: int, *, retry_after_s: float | None = None) -> float | None:
    """Seconds to wait after so many failures; None when that was the last attempt."""
    if failures > len(DELAYS_S):
        return None
    planned = DELAYS_S[failures - 1] * random.uniform(1, 1 + _JITTER)  # noqa: S311  # no secret
    return max(planned, min(retry_after_s or 0, LONGEST_RETRY_AFTER_S))


def _note_interrupted(session: Session, rows: Sequence[Row[*tuple[Any, ...]]]) -> None:
    """The lease of these ran out: their attempts are in the log, and count for nothing."""
    _insert_attempts(
        session, [(row.id, row.attempt_token, AttemptOutcome.INTERRUPTED) for row in rows]
    )


def _log(session: Session, ended: Sequence[tuple[Claim, AttemptOutcome]]) -> None:
    _insert_attempts(session, [(each.id, each.token, outcome) for each, outcome in ended])


def _insert_attempts(session: Session, attempts: Sequence[tuple[str, int, AttemptOutcome]]) -> None:
    if attempts:
        rows = [
            dict(zip(("delivery_id", "number", "outcome"), row, strict=True)) for row in attempts
        ]
        session.connection().execute(insert(DeliveryAttempt), rows)


def _note_health(session: Session, results: Sequence[Result]) -> None:
    """What the results say of their endpoints. Those that are given up lose what still waits."""
    outcomes: dict[str, set[AttemptOutcome]] = {}
    for result in results:
        if result.claim.endpoint_id is not None:
            outcomes.setdefault(result.claim.endpoint_id, set()).add(result.outcome)
    well = [key for key, seen in outcomes.items() if AttemptOutcome.HTTP_2XX in seen]
    gone = [key for key, seen in outcomes.items() if AttemptOutcome.HTTP_410 in seen]
    failed = outcomes.keys() - set(well)
    endpoints.note_successes(session, well)
    endpoints.note_failures(session, failed)
    for endpoint_id in endpoints.disable_failing(session, failed, gone=gone) if failed else ():
        drop_pending(session, endpoint_id)


def drop_pending(session: Session, endpoint_id: str) -> None:
    """End what waits for an endpoint that is called no more. It can be replayed."""
    _drop(
        session,
        and_(Delivery.endpoint_id == endpoint_id, Delivery.status == DeliveryStatus.PENDING),
    )


def _drop(session: Session, which: ColumnElement[bool]) -> None:
    dropped = session.execute(
        update(Delivery)
        .where(which, Delivery.finished_at.is_(None))
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
