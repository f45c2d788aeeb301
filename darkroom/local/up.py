"""`darkroom up`: the stack in the foreground, until it is asked to stop."""

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
from darkroom.local.orphans import kill_orphans
from darkroom.local.ports import LOOPBACK, listeners
from darkroom.local.process import ProcessSpec
from darkroom.local.services import process_specs
from darkroom.local.supervisor import Report, StackFailed, Supervisor
from darkroom.local.watchdog import watchdog

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequests:
    """Number of stop signals received: the first stops in order, the second kills at once."""

    count: int = 0


def up(path: Path, *, port: int, workers: int, command: Sequence[str] = ()) -> int:
    """Run the whole stack; return the exit code. Raises SetupError before the first start."""
    preflight.check_machine(path)
    data_dir = make_data_dir(path)
    with locked(data_dir):
        api_port = preflight.choose_port(port)
        specs = process_specs(data_dir, api_port=api_port, workers=workers)
        return run(data_dir, specs, api=f"http://{LOOPBACK}:{api_port}", command=command)


def run(
    data_dir: DataDir, specs: Sequence[ProcessSpec], *, api: str, command: Sequence[str] = ()
) -> int:
    """Run these processes until a stop request. The caller holds the data directory's lock."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    killed = kill_orphans(data_dir.processes)
    if killed:
        console.print(f"Killed {killed} processes of a stack whose launcher was killed.")
    supervisor = Supervisor(specs, record=data_dir.processes, report=_reporter(console))
    with _stop_requests() as requests, watchdog(data_dir) as watchdog_pid:
        supervisor.unsupervised.add(watchdog_pid)
        try:
            _tick(supervisor, until=lambda: supervisor.ready or requests.count > 0)
            if requests.count:
                return 130
            console.print(f"Ready after {time.monotonic() - began:.1f} s. Logs: {data_dir.logs}")
            console.print(f"  API   {api}\n  docs  {api}/docs", style="bold")
            console.print(_listening(supervisor))
            return _run_until_stopped(supervisor, requests, console, command, api=api)
        except StackFailed as failure:
            console.print(Text(f"The stack stops: {failure}", style="red"))
            return 1
        finally:
            began = time.monotonic()
            supervisor.stop(at_once=lambda: requests.count > 1)
            console.print(f"Everything stopped after {time.monotonic() - began:.1f} s.")


def _tick(supervisor: Supervisor, *, until: Callable[[], bool]) -> None:
    while not until():
        supervisor.tick()
        time.sleep(0.1)


def _run_until_stopped(
    supervisor: Supervisor,
    requests: StopRequests,
    console: Console,
    command: Sequence[str],
    *,
    api: str,
) -> int:
    """Run the command, or until a stop request; a Ctrl-C in the terminal reaches both."""
    if not command:
        _tick(supervisor, until=lambda: requests.count > 0)
        return 0
    try:
        process = _start_command(command, api)
    except OSError as problem:
        console.print(f"Could not start the command {command[0]!r}: {problem.strerror}.")
        return 127
    supervisor.unsupervised.add(process.pid)
    try:
        _tick(supervisor, until=lambda: process.poll() is not None or requests.count > 0)
    finally:
        if process.poll() is None:
            process.terminate()
            _wait_or_kill(process, timeout_s=3)
        supervisor.unsupervised.discard(process.pid)
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


def _wait_or_kill(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _listening(supervisor: Supervisor) -> str:
    """Return which ports are open to the network, as the kernel says."""
    ray = supervisor.processes(of="ray")
    with_token = listeners(ray)  # every port of Ray asks for its token
    others = listeners(set(supervisor.processes()) - set(ray))
    outside = [f"{each} (token required)" for each in with_token if each.open_to_the_network]
    outside += [f"{each} (NO password)" for each in others if each.open_to_the_network]
    if not outside:
        return f"  All {len(with_token) + len(others)} ports listen on loopback only."
    return f"  Open to the network: {', '.join(outside)}. All others listen on loopback only."


def _reporter(console: Console) -> Report:
    def report(name: str, news: str) -> None:
        console.print(Text.assemble((f"{name:10}", "cyan"), " ", news))

    return report


@contextmanager
def _stop_requests() -> Iterator[StopRequests]:
    requests = StopRequests()

    def count(_number: int, _frame: object) -> None:
        requests.count += 1

    before = {number: signal.signal(number, count) for number in STOP_SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
