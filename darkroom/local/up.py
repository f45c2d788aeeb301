"""`darkroom up`: the stack in the foreground, until it is told to stop."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from darkroom.local import preflight
from darkroom.local.data_dir import DataDir, locked, make_data_dir
from darkroom.local.linux import before_exec
from darkroom.local.orphans import end_orphans
from darkroom.local.ports import listeners
from darkroom.local.process import ProcessSpec
from darkroom.local.services import darkroom_children
from darkroom.local.supervisor import StackFailed, Supervisor
from darkroom.local.watchdog import guarded

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequests:
    """How often we were told to stop: once is a request, twice is an order."""

    count: int = 0


def up(data_dir: Path, *, port: int, workers: int, command: Sequence[str] = ()) -> int:
    """Run the whole stack; the exit code. Raises SetupError before anything was started."""
    preflight.check_machine(data_dir)
    layout = make_data_dir(data_dir)
    with locked(layout):
        api_port = preflight.choose_port(port)
        children = darkroom_children(layout, api_port=api_port, workers=workers)
        return run(layout, children, api=f"http://127.0.0.1:{api_port}", command=command)


def run(
    layout: DataDir, children: Sequence[ProcessSpec], *, api: str, command: Sequence[str] = ()
) -> int:
    """Start, watch and stop these children; the caller holds the layout's lock."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    ended = end_orphans(layout.processes)
    if ended:
        console.print(f"Ended {ended} processes of a stack that was killed.")
    stack = Supervisor(children, record=layout.processes, say=_teller(console))
    with _signals() as calls, guarded(layout) as guardian:
        stack.guests.add(guardian)
        try:
            return _watch(stack, layout, calls, console, api=api, began=began, command=command)
        except StackFailed as failure:
            console.print(Text(f"The stack stops: {failure}", style="red"))
            return 1
        finally:
            began = time.monotonic()
            stack.stop(at_once=lambda: calls.count > 1)
            console.print(f"Everything stopped after {time.monotonic() - began:.1f} s.")


def _watch(
    stack: Supervisor,
    layout: DataDir,
    calls: StopRequests,
    console: Console,
    *,
    api: str,
    began: float,
    command: Sequence[str],
) -> int:
    _tick(stack, until=lambda: stack.ready or calls.count > 0)
    if calls.count:
        return 130
    console.print(f"Ready after {time.monotonic() - began:.1f} s. Logs: {layout.logs}")
    console.print(f"  API   {api}\n  page  {api}/\n  docs  {api}/docs", style="bold")
    console.print(_who_listens(stack))
    if command:
        return _run_command(stack, calls, console, command, api=api)
    _tick(stack, until=lambda: calls.count > 0)
    return 0


def _tick(stack: Supervisor, *, until: Callable[[], bool]) -> None:
    while not until():
        stack.tick()
        time.sleep(0.1)


def _run_command(
    stack: Supervisor, calls: StopRequests, console: Console, command: Sequence[str], *, api: str
) -> int:
    """The command has the terminal: a Ctrl-C there reaches it as well as us."""
    try:
        process = _start_command(command, api)
    except OSError as problem:
        console.print(f"The command {command[0]!r} could not be started: {problem.strerror}.")
        return 127
    stack.guests.add(process.pid)
    try:
        _tick(stack, until=lambda: process.poll() is not None or calls.count > 0)
    finally:
        if process.poll() is None:
            process.terminate()
            _wait_or_kill(process, seconds=3)
        stack.guests.discard(process.pid)
    code = process.returncode
    return code if code >= 0 else 128 - code


def _start_command(command: Sequence[str], api: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, "DARKROOM_API": api},
        preexec_fn=before_exec(  # noqa: PLW1509  # two system calls, no lock taken
            death_signal=signal.SIGTERM, leave_root=False
        ),
    )


def _wait_or_kill(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _who_listens(stack: Supervisor) -> str:
    """Read from the sockets, not from what we meant them to be."""
    ray = stack.processes(of="ray")
    guarded = listeners(ray)  # each asks for Ray's token
    bare = listeners(set(stack.processes()) - set(ray))
    outside = [f"{each} (token required)" for each in guarded if each.open_to_the_network]
    outside += [f"{each} (NO password)" for each in bare if each.open_to_the_network]
    if not outside:
        return f"  All {len(guarded) + len(bare)} ports listen on loopback only."
    return f"  Open to the network: {', '.join(outside)}. All else listens on loopback only."


def _teller(console: Console) -> Callable[[str, str], None]:
    def say(name: str, news: str) -> None:
        console.print(Text.assemble((f"{name:10}", "cyan"), " ", news))

    return say


@contextmanager
def _signals() -> Iterator[StopRequests]:
    calls = StopRequests()

    def count(_number: int, _frame: object) -> None:
        calls.count += 1

    before = {number: signal.signal(number, count) for number in STOPPING}
    try:
        yield calls
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
