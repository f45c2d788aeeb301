"""Advisory locks of PostgreSQL: their numbers, and how to try one."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session, sessionmaker


class AdvisoryLock(IntEnum):
    """Advisory lock that at most one process of an installation holds."""

    MIGRATE = 7_261_001  #: processes that start together migrate one after the other
    REAP = 7_261_002  #: one reaper per pass
    CLAIM = 7_261_003  #: one claim at a time
    CLEAN = 7_261_004  #: one cleaner per pass


def try_lock_in_transaction(session: Session, lock: AdvisoryLock) -> bool:
    """Return whether this transaction got the lock, which it holds until its end, without waiting.

    A process that is cut off from the server loses it with its transaction, within 5 s: see
    `idle_in_transaction_session_timeout` in `darkroom.db.connection`.
    """
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(lock))))


@contextmanager
def try_lock(sessions: sessionmaker[Session], lock: AdvisoryLock) -> Iterator[bool]:
    """Yield whether this process holds the lock during the block, without waiting for it.

    The lock belongs to a connection, not to a transaction: the block may wait for other servers.
    The server keeps the lock of a process that is cut off until TCP's keepalive finds out, which
    may take hours: only for work that can wait.
    """
    engine: Engine = sessions.kw["bind"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        taken = bool(connection.scalar(select(func.pg_try_advisory_lock(lock))))
        try:
            yield taken
        finally:
            if taken:
                connection.execute(select(func.pg_advisory_unlock(lock)))
