"""The last one out: ends what a killed launcher left, when its children do not end themselves."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from darkroom.errors import SetupError
from darkroom.local.data_dir import DataDir, locked
from darkroom.local.orphans import end_orphans, recorded
from darkroom.local.process import gone_within

PATIENCE_S: Final = 5  #: children were told by the kernel to end; a worker may finish its work


@contextmanager
def guarded(layout: DataDir) -> Iterator[int]:
    """While the block runs, a process watches over this one; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(layout.home)],
        stdin=subprocess.PIPE,  # ours alone to hold open: it closes when we end, however we do
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process.pid
    finally:
        process.communicate()


def main(home: str) -> None:
    """Wait for the launcher's end; see to what is left when its children had their time."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    layout = DataDir(Path(home))
    gone_within(recorded(layout.processes), PATIENCE_S)
    with contextlib.suppress(SetupError), locked(layout):  # a successor has seen to it already
        end_orphans(layout.processes)


if __name__ == "__main__":
    main(sys.argv[1])
