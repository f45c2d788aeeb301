"""The launcher: no process outlives it, and every port listens where the launcher says.

Run as a program, this module is a launcher of the named processes: the tests kill that.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from darkroom.errors import SetupError
from darkroom.local import preflight, servers, watchdog
from darkroom.local.data_dir import DataDir, locked, make_data_dir
from darkroom.local.linux import started_at
from darkroom.local.ports import LOOPBACK, Listener, free_port, listeners
from darkroom.local.postgres import postgres
from darkroom.local.process import ProcessSpec
from darkroom.local.supervisor import STOP_TIMEOUT_S
from darkroom.local.up import run
from darkroom.settings import HOME
from tests.support.servers import ServerProcess


@pytest.fixture(scope="module")
def server_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Launcher"]:
    """A launcher of the three servers, for tests that only look at it."""
    with launcher(tmp_path_factory.mktemp("servers"), "postgres", "redis", "s3") as stack:
        stack.wait_for("Ready")
        yield stack


HANGS_S = 60  # after which a wait has failed; a busy machine may need half of it


def test_a_second_launcher_on_the_same_data_directory_is_refused(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis") as first:
        first.wait_for("Ready")
        second = start_launcher(tmp_path, "redis")
        assert second.process.wait(HANGS_S) == 2
        assert f"process id {first.process.pid}" in second.output()


def test_a_process_that_dies_is_named_and_restarted_on_its_port(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "s3") as stack:
        stack.wait_for("Ready")
        [before] = stack.pids_of("rclone")
        ports = stack.ports()
        os.kill(before, signal.SIGKILL)
        stack.wait_for("s3         died: killed by SIGKILL")
        stack.wait_until(lambda: stack.output().count("s3         ready") == 2)
        assert stack.pids_of("rclone") != [before]
        assert stack.ports() == ports


def test_the_dependents_of_a_process_are_restarted_with_it(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "dependent") as stack:
        stack.wait_for("Ready")
        [server] = stack.pids_of("valkey-server") or stack.pids_of("redis-server")
        os.kill(server, signal.SIGKILL)
        stack.wait_for("dependent  starting it again, since redis died")
        stack.wait_until(lambda: stack.output().count("dependent  ready") == 2)


def test_three_deaths_within_a_minute_end_the_stack_with_code_1(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "frail") as stack:
        assert stack.process.wait(HANGS_S) == 1
        assert "frail died 3 times within a minute; it died: exit code 3" in stack.output()
        assert "out of breath" in stack.output()  # the end of its log
        assert stack.leaves_nothing()


def test_sigterm_leaves_no_process(tmp_path: Path) -> None:
    with launcher(tmp_path, "postgres", "redis", "s3") as stack:
        stack.wait_for("Ready")
        stack.note_descendants()
        stack.process.terminate()
        assert stack.process.wait(HANGS_S) == 0
        assert stack.leaves_nothing()


def test_a_process_that_ignores_its_stop_signal_is_killed_with_its_children(tmp_path: Path) -> None:
    with launcher(tmp_path, "stubborn") as stack:
        stack.wait_for("Ready")
        stack.note_descendants()
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(HANGS_S) == 0
        assert stack.leaves_nothing()


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with launcher(tmp_path, "slow") as stack:
        stack.wait_for("Ready")
        stack.note_descendants()
        stack.process.send_signal(signal.SIGINT)
        stack.wait_until((tmp_path / "ready" / "asked").exists)  # and the program has not stopped
        assert stack.process.poll() is None
        stack.process.send_signal(signal.SIGINT)
        stack.process.wait(STOP_TIMEOUT_S - 5)
        assert stack.leaves_nothing()


def test_killing_the_launcher_ends_its_children(tmp_path: Path) -> None:
    with launcher(tmp_path, "postgres", "redis", "s3") as stack:
        stack.wait_for("Ready")
        stack.note_descendants()
        stack.process.kill()
        stack.wait_until(stack.leaves_nothing)


def test_orphans_of_a_killed_launcher_are_killed_by_the_next(tmp_path: Path) -> None:
    with launcher(tmp_path, "stubborn", "redis") as first:
        first.wait_for("Ready")
        first.note_descendants()
        first.kill_watchdog()
        first.process.kill()
        first.process.wait()
        assert not first.leaves_nothing()
        with launcher(tmp_path, "redis") as second:
            second.wait_for("Ready")
            assert "Killed" in second.output()
            assert first.leaves_nothing()


def test_the_watchdog_kills_the_orphans_of_a_killed_launcher(tmp_path: Path) -> None:
    with launcher(tmp_path, "stubborn") as stack:
        stack.wait_for("Ready")
        stack.note_descendants()
        stack.process.kill()
        stack.wait_until(stack.leaves_nothing)


def test_a_recorded_pid_that_was_reused_is_left_alone(tmp_path: Path) -> None:
    data_dir = make_data_dir(tmp_path)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        data_dir.processes.write_text(
            f'{{"boot": "{Path("/proc/sys/kernel/random/boot_id").read_text().strip()}", '
            f'"processes": {{"{bystander.pid}": 1}}}}'
        )
        with launcher(tmp_path, "redis") as stack:
            stack.wait_for("Ready")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_every_server_listens_on_loopback_only(server_stack: "Launcher") -> None:
    server_stack.wait_for("All 3 ports listen on loopback only.")
    assert {listener.address for listener in server_stack.listeners()} == {LOOPBACK}


def test_no_password_is_in_an_argument_or_readable_by_others(server_stack: "Launcher") -> None:
    running = server_stack.descendants()
    arguments = " ".join(part for process in running for part in process.cmdline())
    assert "canary" not in arguments
    assert "canary" not in server_stack.output()
    assert server_stack.folder.stat().st_mode & 0o077 == 0


def test_a_port_open_to_the_network_is_announced(tmp_path: Path) -> None:
    with launcher(tmp_path, "open") as stack:
        stack.wait_for("Open to the network: python")
        stack.wait_for("(NO password)")


def test_a_command_runs_against_the_stack_and_its_code_is_ours(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "--", "sh", "-c", "echo at $DARKROOM_API; exit 7") as stack:
        assert stack.process.wait(HANGS_S) == 7
        assert "at http://api.test" in stack.output()


def test_postgres_keeps_its_rows_when_all_its_processes_are_killed(
    postgres_server: ServerProcess,
) -> None:
    with psycopg.connect(postgres_server.url, autocommit=True) as session:
        session.execute("CREATE TABLE survivors AS SELECT 1 AS row")
    postgres_server.kill()
    postgres_server.restart()
    with psycopg.connect(postgres_server.url, autocommit=True) as session:
        assert session.execute("SELECT row FROM survivors").fetchall() == [(1,)]
        session.execute("DROP TABLE survivors")


def test_postgres_asks_for_its_password(postgres_server: ServerProcess) -> None:
    user, _, place = postgres_server.url.rpartition("@")
    wrong = user.rpartition(":")[0] + ":wrong@" + place
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)


def test_a_busy_port_is_named_with_the_way_out() -> None:
    with pytest.raises(SetupError, match="--port 0"), _listening() as port:
        preflight.choose_port(port)


# --- a launcher in its own process, and what the tests ask of it


class Launcher:
    def __init__(self, folder: Path, process: subprocess.Popen[bytes], printed: Path) -> None:
        self.folder = folder
        self.process = process
        self._printed = printed
        self._noted: dict[int, int] = {}

    def output(self) -> str:
        return self._printed.read_text()

    def wait_for(self, words: str) -> None:
        self.wait_until(lambda: words in self.output())

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANGS_S
        while not holds():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def note_descendants(self) -> None:
        """Remember who there is, to ask later whether they ended."""
        self._noted = {process.pid: started_at(process.pid) or 0 for process in self.descendants()}
        assert self._noted

    def kill_watchdog(self) -> None:
        for process in self.descendants():
            if watchdog.__name__ in process.cmdline():
                process.kill()

    def leaves_nothing(self) -> bool:
        return not any(started_at(pid) == ticks for pid, ticks in self._noted.items())

    def listeners(self) -> list[Listener]:
        return listeners(self.descendants())

    def ports(self) -> set[int]:
        return {listener.port for listener in self.listeners()}

    def pids_of(self, program: str) -> list[int]:
        return [process.pid for process in self.descendants() if process.name() == program]


def start_launcher(folder: Path, *words: str) -> Launcher:
    printed = folder.parent / f"{folder.name}-{time.monotonic_ns()}.out"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), *words],
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(HOME)},  # it imports tests.support
        )
    return Launcher(folder, process, printed)


@contextmanager
def launcher(folder: Path, *words: str) -> Iterator[Launcher]:
    started = start_launcher(folder, *words)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.process.wait(HANGS_S)


@contextmanager
def _listening() -> Iterator[int]:
    import socket

    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


PROGRAMS = {
    "dependent": "",
    "frail": "print('out of breath', flush=True); raise SystemExit(3)",
    "open": "server = socket.create_server(('0.0.0.0', 0))",
    "slow": "signal.signal(15, lambda *_: ready.with_name('asked').touch())",
    "stubborn": "signal.signal(15, signal.SIG_IGN); subprocess.Popen(['sleep', '99'])",
}
_PROGRAM_TEMPLATE = """
import os, pathlib, signal, socket, subprocess, time
ready = pathlib.Path(os.environ["READY"])
{}
ready.touch()
time.sleep(99)
"""


def _specs(data_dir: DataDir) -> dict[str, ProcessSpec]:
    stores = [
        postgres(
            data_dir.home / "postgres",
            port=free_port(),
            password="canary",
            log=data_dir.log("postgres"),
        ),
        servers.redis(
            data_dir.home / "redis", port=free_port(), password="canary", log=data_dir.log("redis")
        ),
        servers.s3(
            data_dir.objects,
            port=free_port(),
            key_id="tests",
            secret_key="canary",
            bucket="darkroom",
            log=data_dir.log("s3"),
        ),
    ]
    programs = [_program(name, code, data_dir) for name, code in PROGRAMS.items()]
    return {spec.name: spec for spec in [*stores, *programs]}


def _program(name: str, code: str, data_dir: DataDir) -> ProcessSpec:
    ready = data_dir.ready / name
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-c", _PROGRAM_TEMPLATE.format(code)),
        env=os.environ | {"READY": str(ready)},
        log=data_dir.log(name),
        prepare=lambda: ready.unlink(missing_ok=True),
        ready=ready.exists,
        needs=("redis",) if name == "dependent" else (),
        restart_with=("redis",) if name == "dependent" else (),
        grace_s=100 if name == "slow" else 0.5,
    )


def main(folder: str, *words: str) -> int:
    split = words.index("--") if "--" in words else len(words)
    data_dir = make_data_dir(Path(folder))
    try:
        with locked(data_dir):
            chosen = [_specs(data_dir)[name] for name in words[:split]]
            return run(data_dir, chosen, api="http://api.test", command=words[split + 1 :])
    except SetupError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
