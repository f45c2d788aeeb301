"""A child process: what it is to be, how it is launched, and how it is ended with its own."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import psutil

from darkroom.errors import DarkroomError
from darkroom.local.linux import before_exec, started_at

LOG_CAP: Final = 5 * 2**20  #: bytes; a longer log is set aside when its child is launched
NOBODY: Final = 65534

Identity = Literal["ours", "namespace", "nobody"]


class ProcessFailed(DarkroomError):
    """A child died, or was not ready in time."""


def _nothing() -> None:
    """Most children need nothing prepared."""


def _always() -> bool:
    return True


@dataclass(frozen=True)
class ProcessSpec:
    """One server or worker: everything needed to launch it, now or again after its death."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    log: Path
    ready: Callable[[], bool] = _always  #: asked until it says yes
    prepare: Callable[[], None] = _nothing  #: before each launch
    where: str = ""  #: where it can be reached, for people
    url: str = field(default="", repr=False)  #: where it can be reached, password included
    needs: tuple[str, ...] = ()  #: names that must be ready first
    restart_with: tuple[str, ...] = ()  #: names whose new life calls for a new life of this one
    once: bool = False  #: runs to its end, which must be exit code 0
    run_as: Identity = "ours"
    stop_signal: signal.Signals = signal.SIGTERM
    grace_s: float = 5  #: from the stop signal to SIGKILL
    ready_within_s: float = 120  #: a busy machine, and files that were never read before


@dataclass
class RunningProcess:
    """A launched child. Its pid is ours to signal until `process.poll()` has said otherwise."""

    child: ProcessSpec
    process: subprocess.Popen[bytes]
    launched_at: float
    ready: bool = False
    family: dict[int, psutil.Process] = field(default_factory=dict)  #: its descendants, as seen

    @property
    def url(self) -> str:
        return self.child.url

    def send(self, number: signal.Signals) -> None:
        """To the child alone, not to its descendants."""
        self.process.send_signal(number)


def launch(child: ProcessSpec) -> RunningProcess:
    """Start the program. It dies with the calling thread: call this from the main one."""
    child.prepare()
    _rotate(child.log)
    with child.log.open("ab") as log:
        log.write(f"--- {child.name} launched {time.strftime('%F %T')}\n".encode())
        log.flush()
        process = subprocess.Popen(
            child.argv,
            env=dict(child.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we say who ends when
            user=NOBODY if child.run_as == "nobody" else None,
            group=NOBODY if child.run_as == "nobody" else None,
            extra_groups=[] if child.run_as == "nobody" else None,
            preexec_fn=before_exec(  # noqa: PLW1509  # two system calls, no lock taken
                death_signal=child.stop_signal, leave_root=child.run_as == "namespace"
            ),
        )
    return RunningProcess(child, process, time.monotonic())


def wait_ready(running: RunningProcess) -> None:
    """Raises ChildFailed when it died or took too long."""
    child = running.child
    while not child.ready():
        if running.process.poll() is not None:
            raise ProcessFailed(f"{child.name} ended: {ending(running)}.\n{tail(child.log)}")
        if time.monotonic() - running.launched_at > child.ready_within_s:
            raise ProcessFailed(f"{child.name} was not ready in time.\n{tail(child.log)}")
        time.sleep(0.02)
    running.ready = True


def end(running: RunningProcess) -> None:
    """Stop signal, grace, then SIGKILL to the child and to every descendant that is left."""
    if running.process.poll() is None:
        remember_family(running)
        running.send(running.child.stop_signal)
        running.send(signal.SIGCONT)  # a frozen process takes no other signal
        try:
            running.process.wait(running.child.grace_s)
        except subprocess.TimeoutExpired:
            remember_family(running)
            running.process.kill()
            running.process.wait()
    end_family(running, grace_s=1)


def end_family(running: RunningProcess, *, grace_s: float) -> None:
    """End what a dead child left behind, so that its successor finds ports and files free."""
    family = list(running.family.values())
    if not gone_within(family, grace_s):
        for process in family:
            kill(process)
        gone_within(family, 5)
    running.family.clear()


def gone_within(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Whether they all ended in time. Those that became our children are reaped."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if _lives(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if _lives(process)]
    return not left


def _lives(process: psutil.Process) -> bool:
    with suppress(ChildProcessError):  # not ours to reap; somebody else's zombie counts as ended
        os.waitpid(process.pid, os.WNOHANG)
    return started_at(process.pid) is not None and process.is_running()


def kill(process: psutil.Process) -> None:
    """SIGKILL, unless the pid is another process by now: psutil compares the start time."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def remember_family(running: RunningProcess) -> None:
    """Note the descendants while they can be told by their parents: before it is polled dead."""
    try:
        descendants = psutil.Process(running.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    known = {pid: process for pid, process in running.family.items() if process.is_running()}
    running.family = known | {process.pid: process for process in descendants}


@contextmanager
def running(child: ProcessSpec) -> Iterator[RunningProcess]:
    """The child, ready; ended with all its descendants when the block ends."""
    launched = launch(child)
    try:
        wait_ready(launched)
        yield launched
    finally:
        end(launched)


def restart(old: RunningProcess) -> RunningProcess:
    """The same child again, on the same port and files, ready."""
    end(old)
    anew = launch(old.child)
    wait_ready(anew)
    return anew


def ending(running: RunningProcess) -> str:
    """How the process ended, in words."""
    code = running.process.returncode
    if code is None:
        return "still running"
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented to stand out from our own."""
    if not log.exists():
        return "    (no log)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        text = file.read().decode(errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def _rotate(log: Path) -> None:
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_CAP:
        log.replace(log.with_name(log.name + ".1"))
