"""Numbers of the PostgreSQL advisory locks."""

from enum import IntEnum


class AdvisoryLock(IntEnum):
    """Advisory lock that at most one process of an installation holds."""

    MIGRATE = 7_261_001  #: processes that start together migrate one after the other
    REAP = 7_261_002  #: one reaper per pass
    CLAIM = 7_261_003  #: one claim at a time
    CLEAN = 7_261_004  #: one cleaner per pass
