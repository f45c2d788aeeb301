"""Supervisor of the local stack: starts, restarts and stops processes in order of their needs."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil

from darkroom.errors import DarkroomError
from darkroom.local import orphans
from darkroom.local import process as child_process
from darkroom.local.linux import become_subreaper
from darkroom.local.process import ProcessSpec, RunningProcess

MAX_RESTARTS: Final = 2  #: of one process within RESTART_WINDOW_S; the next exit stops the stack
RESTART_WINDOW_S: Final = 60
STOP_TIMEOUT_S: Final = 25
RECORD_INTERVAL_S: Final = 3  #: between two records of all descendants

Report = Callable[[str, str], None]  #: takes the name of a process, and its news


class StackFailed(DarkroomError):
    """A process does not stay up; the message names it and shows the end of its log."""


class Supervisor:
    """Supervisor of the stack's processes. One thread calls `tick` many times a second."""

    def __init__(self, specs: Sequence[ProcessSpec], *, record: Path, report: Report) -> None:
        become_subreaper()
        self._specs = {spec.name: spec for spec in specs}
        self._running: dict[str, RunningProcess] = {}
        self._finished: set[str] = set()
        self._exits: dict[str, deque[float]] = {name: deque() for name in self._specs}
        self._record = record
        self._report = report
        self._next_record = 0.0
        self.unsupervised: set[int] = set()  #: pids of our children that other code waits for

    @property
    def ready(self) -> bool:
        return all(self._is_ready(name) for name in self._specs)

    def tick(self) -> None:
        """Handle one exit, launch what may be launched, check readiness. Raises StackFailed."""
        self._record_processes()
        exited = next(
            (each for each in self._running.values() if each.process.poll() is not None), None
        )
        if exited:  # one at a time: handling it may stop others
            self._handle_exit(exited)
        for spec in self._specs.values():
            if self._may_launch(spec):
                self._launch(spec)
        for running in self._running.values():
            if not running.ready:
                self._check_ready(running)

    def stop(self, *, at_once: Callable[[], bool] = lambda: False) -> None:
        """Stop each process after those that need it, then kill what is left of the stack."""
        requested_at: dict[str, float] = {}
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._running and not at_once() and time.monotonic() < deadline:
            self._record_processes()
            for running in list(self._running.values()):
                self._stop_step(running, requested_at)
            time.sleep(0.02)
        for descendant in self._descendants():
            child_process.kill(descendant)
        child_process.wait_exited(self._descendants(), timeout_s=5)
        self._running.clear()
        self._reap_orphans()  # a container's first process may not reap them
        self._record.unlink(missing_ok=True)

    def processes(self, *, of: str | None = None) -> list[psutil.Process]:
        """Return every process of the stack, or of one spec, with its descendants."""
        chosen = [running for name, running in self._running.items() if of in {None, name}]
        for running in chosen:
            if running.process.returncode is None:
                child_process.note_descendants(running)
        return [
            process
            for running in chosen
            for process in [psutil.Process(running.process.pid), *running.descendants.values()]
            if process.is_running()
        ]

    def _is_ready(self, name: str) -> bool:
        running = self._running.get(name)
        return name in self._finished or (running is not None and running.ready)

    def _may_launch(self, spec: ProcessSpec) -> bool:
        if spec.name in self._running or spec.name in self._finished:
            return False
        return all(self._is_ready(name) for name in spec.needs)

    def _launch(self, spec: ProcessSpec) -> None:
        self._running[spec.name] = child_process.launch(spec)
        self._next_record = 0

    def _check_ready(self, running: RunningProcess) -> None:
        spec = running.spec
        waited_s = time.monotonic() - running.launched_at
        if not spec.once and spec.ready():
            running.ready = True
            self._report(spec.name, f"ready after {waited_s:.1f} s  {spec.where}".rstrip())
        elif waited_s > spec.ready_timeout_s:
            raise StackFailed(
                f"{spec.name} was not ready within {spec.ready_timeout_s:.0f} s. "
                f"The end of {spec.log}:\n{child_process.tail(spec.log)}"
            )

    def _handle_exit(self, running: RunningProcess) -> None:
        spec = running.spec
        child_process.kill_descendants(running, grace_s=1)
        del self._running[spec.name]
        if spec.once and running.process.returncode == 0:
            self._finished.add(spec.name)
            self._report(spec.name, f"done after {time.monotonic() - running.launched_at:.1f} s")
            return
        news = f"died: {child_process.exit_reason(running)}. The end of {spec.log}:"
        news = f"{news}\n{child_process.tail(spec.log)}"
        self._count_exit(spec, news)
        self._report(spec.name, f"{news}\n  starting it again")
        self._stop_dependents(spec)

    def _count_exit(self, spec: ProcessSpec, news: str) -> None:
        now = time.monotonic()
        exits = self._exits[spec.name]
        exits.append(now)
        while exits[0] < now - RESTART_WINDOW_S:
            exits.popleft()
        if spec.once:
            raise StackFailed(f"{spec.name} {news}")
        if len(exits) > MAX_RESTARTS:
            raise StackFailed(f"{spec.name} died {len(exits)} times within a minute; it {news}")

    def _stop_dependents(self, exited: ProcessSpec) -> None:
        """Stop the processes that must restart with the exited one; `tick` launches them again."""
        dependents = [
            running
            for running in self._running.values()
            if exited.name in running.spec.restart_with and running.process.poll() is None
        ]
        for running in dependents:  # signal all before waiting for the first
            self._report(running.spec.name, f"starting it again, since {exited.name} died")
            running.send(running.spec.stop_signal)
        for running in dependents:
            child_process.stop(running)
            del self._running[running.spec.name]

    def _stop_step(self, running: RunningProcess, requested_at: dict[str, float]) -> None:
        """Signal a process that no running one needs, kill it after its grace, note its exit."""
        name, now = running.spec.name, time.monotonic()
        if running.process.poll() is not None:
            child_process.kill_descendants(running, grace_s=1)
            del self._running[name]
            self._report(name, "stopped")
        elif name not in requested_at:
            if not any(name in other.spec.needs for other in self._running.values()):
                running.send(running.spec.stop_signal)
                running.send(signal.SIGCONT)  # a stopped process handles no other signal
                requested_at[name] = now
        elif now > requested_at[name] + running.spec.grace_s:
            running.process.kill()

    def _record_processes(self) -> None:
        """Note all descendants while their parents run; write them down for the next launcher."""
        if time.monotonic() < self._next_record:
            return
        self._next_record = time.monotonic() + RECORD_INTERVAL_S
        orphans.record(self._record, self.processes())
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Reap exited orphans, which became our children; `Popen` reaps those it launched."""
        launched = self.unsupervised | {each.process.pid for each in self._running.values()}
        for process in psutil.Process().children():
            if process.pid not in launched and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)

    def _descendants(self) -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [process for process in found if process.pid not in self.unsupervised]
