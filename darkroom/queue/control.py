"""Queue control by an operator: pause, drain, resume."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, text, update
from sqlalchemy.orm import Session

from darkroom.db.tables import QueueControl


@dataclass(frozen=True)
class ControlState:
    """Whether the queue is paused or draining; it may be both."""

    paused: bool  #: workers claim nothing; running jobs finish, queued ones stay
    draining: bool  #: new jobs are rejected; accepted ones are generated


def read_state(session: Session) -> ControlState:
    """Return whether the queue is paused or draining."""
    paused_at, draining_at = session.execute(_STATE).one()
    return ControlState(paused_at is not None, draining_at is not None)


_STATE: Final = text("SELECT paused_at, draining_at FROM queue_control")


def pause(session: Session) -> None:
    """Stop all claims."""
    session.execute(
        update(QueueControl).values(paused_at=func.coalesce(QueueControl.paused_at, func.now()))
    )


def drain(session: Session) -> None:
    """Reject new jobs."""
    session.execute(
        update(QueueControl).values(draining_at=func.coalesce(QueueControl.draining_at, func.now()))
    )


def resume(session: Session) -> None:
    """End both a pause and a drain."""
    session.execute(update(QueueControl).values(paused_at=None, draining_at=None))
