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


@contextmanager
def try_lock(sessions: sessionmaker[Session], lock: AdvisoryLock) -> Iterator[bool]:
    """Yield whether this process holds the lock during the block, without waiting for it.

    The lock belongs to a connection, not to a transaction: the block may wait for other servers.
    """
    engine: Engine = sessions.kw["bind"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        taken = bool(connection.scalar(select(func.pg_try_advisory_lock(lock))))
        try:
            yield taken
        finally:
            if taken:
                connection.execute(select(func.pg_advisory_unlock(lock)))
