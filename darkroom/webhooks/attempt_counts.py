"""Counts of webhook attempts by outcome, for a process that reads on from the last count."""

from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Interval, func, literal, select
from sqlalchemy.orm import Session

from darkroom.db.webhook_tables import DeliveryAttempt

_SETTLED: Final = timedelta(seconds=5)  #: transactions that record attempts take milliseconds


def settled_until(session: Session, age: timedelta = timedelta(0)) -> datetime:
    """Return the moment, `age` ago, until which every attempt is visible."""
    moment = session.scalar(select(func.now() - literal(age + _SETTLED, Interval)))
    assert isinstance(moment, datetime)
    return moment


def count_attempts(session: Session, after: datetime, until: datetime) -> dict[str, int]:
    """Return the attempts between two moments, by outcome."""
    between = (DeliveryAttempt.at > after, DeliveryAttempt.at <= until)
    counts = (
        select(DeliveryAttempt.outcome, func.count())
        .where(*between)
        .group_by(DeliveryAttempt.outcome)
    )
    return dict(iter(session.execute(counts)))
