"""Child processes: their specs, and how to launch, await, stop and restart them."""

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

MAX_LOG_BYTES: Final = 5 * 2**20  #: a longer log is rotated when its process is launched
UNPRIVILEGED_UID: Final = 65534  #: also its group id

Identity = Literal["caller", "namespace", "unprivileged"]


class ProcessFailed(DarkroomError):
    """A process exited, or was not ready in time."""


def _no_preparation() -> None:
    """Do nothing: most processes need no preparation."""


def _always_ready() -> bool:
    return True


@dataclass(frozen=True)
class ProcessSpec:
    """Spec of one server or worker: all that is needed to launch or restart it."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    log: Path
    ready: Callable[[], bool] = _always_ready  #: polled until True
    prepare: Callable[[], None] = _no_preparation  #: before each launch
    where: str = ""  #: its address, for people
    url: str = field(default="", repr=False)  #: its address with the password
    needs: tuple[str, ...] = ()  #: processes that must be ready first
    restart_with: tuple[str, ...] = ()  #: processes whose restart restarts this one
    once: bool = False  #: runs once, and must exit with 0
    run_as: Identity = "caller"
    stop_signal: signal.Signals = signal.SIGTERM
    grace_s: float = 5  #: from the stop signal to SIGKILL
    ready_timeout_s: float = 120  #: for a busy machine with a cold disk cache


@dataclass
class RunningProcess:
    """Launched process. Its pid may be signaled until `process.poll()` returns an exit code."""

    spec: ProcessSpec
    process: subprocess.Popen[bytes]
    launched_at: float
    ready: bool = False
    descendants: dict[int, psutil.Process] = field(default_factory=dict)  #: as last noted

    @property
    def url(self) -> str:
        return self.spec.url

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its descendants."""
        self.process.send_signal(number)


def launch(spec: ProcessSpec) -> RunningProcess:
    """Start the program. It dies with the calling thread: call this from the main thread."""
    spec.prepare()
    _rotate(spec.log)
    with spec.log.open("ab") as log:
        log.write(f"--- {spec.name} launched {time.strftime('%F %T')}\n".encode())
        log.flush()
        process = subprocess.Popen(
            spec.argv,
            env=dict(spec.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the supervisor: it stops in order
            user=UNPRIVILEGED_UID if spec.run_as == "unprivileged" else None,
            group=UNPRIVILEGED_UID if spec.run_as == "unprivileged" else None,
            extra_groups=[] if spec.run_as == "unprivileged" else None,
            preexec_fn=before_exec(  # noqa: PLW1509  # two system calls, no lock taken
                death_signal=spec.stop_signal, leave_root=spec.run_as == "namespace"
            ),
        )
    return RunningProcess(spec, process, time.monotonic())


def wait_ready(running: RunningProcess) -> None:
    """Wait until the process is ready. Raises ProcessFailed if it exits or takes too long."""
    spec = running.spec
    while not spec.ready():
        if running.process.poll() is not None:
            raise ProcessFailed(f"{spec.name} exited: {exit_reason(running)}.\n{tail(spec.log)}")
        if time.monotonic() - running.launched_at > spec.ready_timeout_s:
            raise ProcessFailed(
                f"{spec.name} was not ready within {spec.ready_timeout_s:.0f} s.\n{tail(spec.log)}"
            )
        time.sleep(0.02)
    running.ready = True


def stop(running: RunningProcess) -> None:
    """Send the stop signal; after the grace period kill the process and its descendants."""
    if running.process.poll() is None:
        note_descendants(running)
        running.send(running.spec.stop_signal)
        running.send(signal.SIGCONT)  # a stopped process handles no other signal
        try:
            running.process.wait(running.spec.grace_s)
        except subprocess.TimeoutExpired:
            note_descendants(running)
            running.process.kill()
            running.process.wait()
    kill_descendants(running, grace_s=1)


def kill_descendants(running: RunningProcess, *, grace_s: float) -> None:
    """Kill what an exited process left behind, to free its ports and files for a restart."""
    descendants = list(running.descendants.values())
    if not wait_exited(descendants, timeout_s=grace_s):
        for process in descendants:
            kill(process)
        wait_exited(descendants, timeout_s=5)
    running.descendants.clear()


def wait_exited(processes: Iterable[psutil.Process], *, timeout_s: float) -> bool:
    """Return whether all exited in time. Those that became our children are reaped."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if _is_running(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if _is_running(process)]
    return not left


def _is_running(process: psutil.Process) -> bool:
    with suppress(ChildProcessError):  # not our child; the zombie of another parent has exited
        os.waitpid(process.pid, os.WNOHANG)
    return started_at(process.pid) is not None and process.is_running()


def kill(process: psutil.Process) -> None:
    """Send SIGKILL, unless the pid was reused: psutil compares the start time."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def note_descendants(running: RunningProcess) -> None:
    """Note the descendants while their parent runs: an orphan no longer names it."""
    try:
        found = psutil.Process(running.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    known = {pid: process for pid, process in running.descendants.items() if process.is_running()}
    running.descendants = known | {process.pid: process for process in found}


@contextmanager
def running(spec: ProcessSpec) -> Iterator[RunningProcess]:
    """Yield the process once it is ready; stop it and its descendants after the block."""
    launched = launch(spec)
    try:
        wait_ready(launched)
        yield launched
    finally:
        stop(launched)


def restart(old: RunningProcess) -> RunningProcess:
    """Stop the process and launch it again, on the same port and files; return it ready."""
    stop(old)
    new = launch(old.spec)
    wait_ready(new)
    return new


def exit_reason(running: RunningProcess) -> str:
    """Return the exit code, or the signal that killed the process."""
    code = running.process.returncode
    if code is None:
        return "still running"
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, indented."""
    if not log.exists():
        return "    (no log)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        text = file.read().decode(errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def _rotate(log: Path) -> None:
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))
