"""What an operator says to the whole installation: pause, drain, go on."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, text, update
from sqlalchemy.orm import Session

from darkroom.db.tables import QueueControl


@dataclass(frozen=True)
class ControlState:
    """What holds now. Both may."""

    paused: bool  #: workers claim nothing; what is running is finished, what waits stays
    draining: bool  #: nothing new is accepted; what was accepted is drawn


def read_state(session: Session) -> ControlState:
    """What holds now."""
    paused_at, draining_at = session.execute(_STATE).one()
    return ControlState(paused_at is not None, draining_at is not None)


_STATE: Final = text("SELECT paused_at, draining_at FROM queue_control")


def pause(session: Session) -> None:
    """From now on nothing is claimed."""
    session.execute(
        update(QueueControl).values(paused_at=func.coalesce(QueueControl.paused_at, func.now()))
    )


def drain(session: Session) -> None:
    """From now on nothing new is accepted."""
    session.execute(
        update(QueueControl).values(draining_at=func.coalesce(QueueControl.draining_at, func.now()))
    )


def resume(session: Session) -> None:
    """Neither holds any more."""
    session.execute(update(QueueControl).values(paused_at=None, draining_at=None))
