"""Fault points kill exactly the process that a test selected, at the named line."""

import os
import signal
import subprocess
import sys
from typing import get_args

import pytest

from darkroom.fault_points import Point
from darkroom.settings import HOME


def exit_status(point, wanted, *, times=1):
    """Reach the point `times` times in a process of its own; return how that ended."""
    program = (
        f"from darkroom.fault_points import *\nfor _ in range({times}): fault_point({point!r})"
    )
    environment = os.environ | ({} if wanted is None else {"DARKROOM_FAULT_POINT": wanted})
    return subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("wanted", "times", "status"),
    [
        (None, 1, 0),
        ("after-claim", 1, -signal.SIGKILL),
        ("in-generate", 1, 0),
        ("after-claim:3", 2, 0),
        ("after-claim:3", 3, -signal.SIGKILL),
    ],
)
def test_only_the_selected_process_is_killed_at_the_selected_time(wanted, times, status):
    assert exit_status("after-claim", wanted, times=times) == status


@pytest.mark.parametrize("point", get_args(Point))
def test_every_point_is_in_the_code(point):
    code = "".join(
        path.read_text()
        for folder in ("api", "darkroom", "workers")
        for path in (HOME / folder).rglob("*.py")
    )
    # up to 3: jobs are submitted by two routes, and by group commit
    assert code.count(f'fault_point("{point}")') in {1, 2, 3}
