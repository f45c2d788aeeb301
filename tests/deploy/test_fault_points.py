"""The points at which fault tests kill a process: exact, and nothing to anybody else."""

import os
import signal
import subprocess
import sys
from typing import get_args

import pytest

from darkroom.fault_points import Point
from darkroom.settings import HOME


def end_of(point, wanted, *, times=1):
    """How a process ends that reaches the point so many times."""
    program = f"from darkroom import faults\nfor _ in range({times}): faults.reach({point!r})"
    environment = os.environ | ({} if wanted is None else {"DARKROOM_FAULT_POINT": wanted})
    return subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("wanted", "times", "ending"),
    [
        (None, 1, 0),
        ("after-claim", 1, -signal.SIGKILL),
        ("in-generate", 1, 0),
        ("after-claim:3", 2, 0),
        ("after-claim:3", 3, -signal.SIGKILL),
    ],
)
def test_only_who_was_chosen_dies_and_when_it_was_said(wanted, times, ending):
    assert end_of("after-claim", wanted, times=times) == ending


@pytest.mark.parametrize("point", get_args(Point))
def test_every_point_stands_in_the_code(point):
    code = "".join(
        path.read_text()
        for folder in ("api", "darkroom", "workers")
        for path in (HOME / folder).glob("*.py")
    )
    assert code.count(f'faults.reach("{point}")') in {
        1,
        2,
        3,
    }  # what submits: two routes, and single jobs together
