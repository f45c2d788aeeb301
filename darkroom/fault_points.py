"""Named points at which fault tests kill this process; inert without DARKROOM_FAULT_POINT.

`DARKROOM_FAULT_POINT=after-claim` sends SIGKILL when the process first reaches that point,
`after-claim:3` when it does for the third time. It is not a setting: only tests use it.
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
    """Kill this process if a test selected this fault point."""
    selected = os.environ.get("DARKROOM_FAULT_POINT")
    if selected is not None:
        _kill_at(selected, point)


def _kill_at(selected: str, point: Point) -> None:
    name, _, ordinal = selected.partition(":")
    if name == point and next(_reached) == int(ordinal or 1):
        os.kill(os.getpid(), signal.SIGKILL)
