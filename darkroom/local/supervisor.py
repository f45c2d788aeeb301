"""A stack of children: started in the order of their needs, restarted, stopped in reverse."""

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
from darkroom.local.linux import adopt_orphans
from darkroom.local.process import ProcessSpec, RunningProcess

DEATHS_ALLOWED: Final = 2  #: restarts of one child within DEATH_WINDOW_S; the next death ends all
DEATH_WINDOW_S: Final = 60
STOP_WITHIN_S: Final = 25
CENSUS_S: Final = 3  #: between two looks at who descends from whom

Say = Callable[[str, str], None]  #: name of a child, what became of it


class StackFailed(DarkroomError):
    """A child would not stay up; the message names it and shows the end of its log."""


class Supervisor:
    """The processes that run now. One thread owns it and calls `tick` many times a second."""

    def __init__(self, specs: Sequence[ProcessSpec], *, record: Path, say: Say) -> None:
        adopt_orphans()
        self._specs = {child.name: child for child in specs}
        self._running: dict[str, RunningProcess] = {}
        self._finished: set[str] = set()
        self._deaths: dict[str, deque[float]] = {name: deque() for name in self._specs}
        self._record = record
        self._say = say
        self._next_census = 0.0
        self.guests: set[int] = set()  #: pids of children that are somebody else's to wait for

    @property
    def ready(self) -> bool:
        return all(self._is_ready(name) for name in self._specs)

    def tick(self) -> None:
        """Notice deaths, launch what may be launched, note who is ready. Raises StackFailed."""
        self._census()
        dead = next(
            (each for each in self._running.values() if each.process.poll() is not None), None
        )
        if dead:  # one at a time: its end may be the end of others
            self._bury(dead)
        for child in self._specs.values():
            if self._may_launch(child):
                self._launch(child)
        for running in self._running.values():
            if not running.ready:
                self._check(running)

    def stop(self, *, at_once: Callable[[], bool] = lambda: False) -> None:
        """Ask each child once nothing that needs it runs, then kill what is left of our own."""
        asked: dict[str, float] = {}
        deadline = time.monotonic() + STOP_WITHIN_S
        while self._running and not at_once() and time.monotonic() < deadline:
            self._census()
            for running in list(self._running.values()):
                self._ask_to_end(running, asked)
            time.sleep(0.02)
        for orphan in self._descendants():
            child_process.kill(orphan)
        child_process.gone_within(self._descendants(), 5)
        self._running.clear()
        self._reap_orphans()  # a container's first process may not do it for us
        self._record.unlink(missing_ok=True)

    def processes(self, *, of: str | None = None) -> list[psutil.Process]:
        """Every process of the stack, or of one child."""
        chosen = [running for name, running in self._running.items() if of in {None, name}]
        for running in chosen:
            if running.process.returncode is None:
                child_process.remember_family(running)
        return [
            process
            for running in chosen
            for process in [psutil.Process(running.process.pid), *running.family.values()]
            if process.is_running()
        ]

    def _is_ready(self, name: str) -> bool:
        running = self._running.get(name)
        return name in self._finished or (running is not None and running.ready)

    def _may_launch(self, child: ProcessSpec) -> bool:
        if child.name in self._running or child.name in self._finished:
            return False
        return all(self._is_ready(name) for name in child.needs)

    def _launch(self, child: ProcessSpec) -> None:
        self._running[child.name] = child_process.launch(child)
        self._next_census = 0

    def _check(self, running: RunningProcess) -> None:
        child = running.child
        waited_s = time.monotonic() - running.launched_at
        if not child.once and child.ready():
            running.ready = True
            self._say(child.name, f"ready after {waited_s:.1f} s  {child.where}".rstrip())
        elif waited_s > child.ready_within_s:
            raise StackFailed(
                f"{child.name} was not ready within {child.ready_within_s:.0f} s. "
                f"The end of {child.log}:\n{child_process.tail(child.log)}"
            )

    def _bury(self, running: RunningProcess) -> None:
        child = running.child
        child_process.end_family(running, grace_s=1)
        del self._running[child.name]
        if child.once and running.process.returncode == 0:
            self._finished.add(child.name)
            self._say(child.name, f"done after {time.monotonic() - running.launched_at:.1f} s")
            return
        report = f"died: {child_process.ending(running)}. The end of {child.log}:"
        report = f"{report}\n{child_process.tail(child.log)}"
        self._count_death(child, report)
        self._say(child.name, f"{report}\n  starting it again")
        self._end_companions(child)

    def _count_death(self, child: ProcessSpec, report: str) -> None:
        now = time.monotonic()
        deaths = self._deaths[child.name]
        deaths.append(now)
        while deaths[0] < now - DEATH_WINDOW_S:
            deaths.popleft()
        if child.once:
            raise StackFailed(f"{child.name} {report}")
        if len(deaths) > DEATHS_ALLOWED:
            raise StackFailed(f"{child.name} died {len(deaths)} times within a minute; it {report}")

    def _end_companions(self, dead: ProcessSpec) -> None:
        """Those that cannot live with a successor of the dead are launched anew as well."""
        companions = [
            running
            for running in self._running.values()
            if dead.name in running.child.restart_with and running.process.poll() is None
        ]
        for running in companions:  # all are asked before the first is waited for
            self._say(running.child.name, f"starting it again, since {dead.name} died")
            running.send(running.child.stop_signal)
        for running in companions:
            child_process.end(running)
            del self._running[running.child.name]

    def _ask_to_end(self, running: RunningProcess, asked: dict[str, float]) -> None:
        name, now = running.child.name, time.monotonic()
        if running.process.poll() is not None:
            child_process.end_family(running, grace_s=1)
            del self._running[name]
            self._say(name, "stopped")
        elif name not in asked:
            if not any(name in other.child.needs for other in self._running.values()):
                running.send(running.child.stop_signal)
                running.send(signal.SIGCONT)  # a frozen process takes no other signal
                asked[name] = now
        elif now > asked[name] + running.child.grace_s:
            running.process.kill()

    def _census(self) -> None:
        """Note who is whose while parents live, and write it down for a successor of ours."""
        if time.monotonic() < self._next_census:
            return
        self._next_census = time.monotonic() + CENSUS_S
        orphans.record(self._record, self.processes())
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        """The dead among those that the kernel made our children; our own are `Popen`'s to reap."""
        own = self.guests | {running.process.pid for running in self._running.values()}
        for process in psutil.Process().children():
            if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)

    def _descendants(self) -> list[psutil.Process]:
        everyone = psutil.Process().children(recursive=True)
        return [process for process in everyone if process.pid not in self.guests]
