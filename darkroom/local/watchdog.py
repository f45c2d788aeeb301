"""Watchdog process: kills what a killed launcher left behind."""

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
from darkroom.local.orphans import kill_orphans, recorded_processes
from darkroom.local.process import wait_exited

TIMEOUT_S: Final = 5  #: the kernel has signaled the processes; a worker may finish its work


@contextmanager
def watchdog(data_dir: DataDir) -> Iterator[int]:
    """Run a watchdog of this process during the block; yield its pid."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(data_dir.home)],
        stdin=subprocess.PIPE,  # closed by the kernel when this process exits, however it does
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process.pid
    finally:
        process.communicate()


def main(home: str) -> None:
    """Wait until the launcher exits, then kill the processes that outlive it by TIMEOUT_S."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    data_dir = DataDir(Path(home))
    wait_exited(recorded_processes(data_dir.processes), timeout_s=TIMEOUT_S)
    with contextlib.suppress(SetupError), locked(data_dir):  # else the next launcher killed them
        kill_orphans(data_dir.processes)


if __name__ == "__main__":
    main(sys.argv[1])
