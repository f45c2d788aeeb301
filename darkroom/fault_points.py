"""Named points at which fault tests kill this process; inert without DARKROOM_FAULT_POINT.

`DARKROOM_FAULT_POINT=after-claim` is SIGKILL when the process first reaches that point,
`after-claim:3` when it does for the third time. It is no setting: only tests say it.
"""

import itertools
import os
import signal
from typing import Final, Literal

Point = Literal[
    "before-claim-commit",
    "after-claim",
    "in-generate",
    "before-settle-commit",
    "after-settle-commit",
    "in-import",
    "before-submit-commit",
    "after-submit-commit",
]

_reached: Final = itertools.count(1)  # next() is one step of the interpreter: threads may share it


def fault_point(point: Point) -> None:
    """Stands where a death would be interesting; that of whoever a test has chosen."""
    wanted = os.environ.get("DARKROOM_FAULT_POINT")
    if wanted is not None:
        _die_of(wanted, point)


def _die_of(wanted: str, point: Point) -> None:
    name, _, ordinal = wanted.partition(":")
    if name == point and next(_reached) == int(ordinal or 1):
        os.kill(os.getpid(), signal.SIGKILL)
