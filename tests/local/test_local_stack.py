"""The launcher: nothing it starts outlives it, and nothing listens but where it says.

Run as a program, this module is a launcher of the children it is told: the tests kill that.
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
from darkroom.local.up import run
from tests.support.servers import Server


def test_a_second_launcher_on_the_same_data_directory_is_refused(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis") as first:
        first.wait_for("Ready")
        second = start_launcher(tmp_path, "redis")
        assert second.process.wait(10) == 2
        assert f"process id {first.process.pid}" in second.output()


def test_a_child_that_dies_is_named_and_started_again_on_its_port(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "s3") as stack:
        stack.wait_for("Ready")
        [before] = stack.pids_of("rclone")
        ports = stack.ports()
        os.kill(before, signal.SIGKILL)
        stack.wait_for("s3         died: killed by SIGKILL")
        stack.wait_until(lambda: stack.output().count("s3         ready") == 2)
        assert stack.pids_of("rclone") != [before]
        assert stack.ports() == ports


def test_those_bound_to_a_child_are_started_again_with_it(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "bound") as stack:
        stack.wait_for("Ready")
        [server] = stack.pids_of("valkey-server") or stack.pids_of("redis-server")
        os.kill(server, signal.SIGKILL)
        stack.wait_for("bound      starting it again, since redis died")
        stack.wait_until(lambda: stack.output().count("bound      ready") == 2)


def test_three_deaths_within_a_minute_end_the_stack_with_code_1(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "frail") as stack:
        assert stack.process.wait(20) == 1
        assert "frail died 3 times within a minute; it died: exit code 3" in stack.output()
        assert "out of breath" in stack.output()  # the end of its log
        assert stack.leaves_nothing()


def test_sigterm_leaves_no_process(tmp_path: Path) -> None:
    with launcher(tmp_path, "postgres", "redis", "s3") as stack:
        stack.wait_for("Ready")
        stack.note_family()
        stack.process.terminate()
        assert stack.process.wait(10) == 0
        assert stack.leaves_nothing()


def test_a_child_that_ignores_its_stop_signal_is_killed_with_its_children(tmp_path: Path) -> None:
    with launcher(tmp_path, "stubborn") as stack:
        stack.wait_for("Ready")
        stack.note_family()
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(10) == 0
        assert stack.leaves_nothing()


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with launcher(tmp_path, "patient") as stack:
        stack.wait_for("Ready")
        stack.note_family()
        stack.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert stack.process.poll() is None
        stack.process.send_signal(signal.SIGINT)
        stack.process.wait(3)
        assert stack.leaves_nothing()


def test_killing_the_launcher_ends_its_children(tmp_path: Path) -> None:
    with launcher(tmp_path, "postgres", "redis", "s3") as stack:
        stack.wait_for("Ready")
        stack.note_family()
        stack.process.kill()
        stack.wait_until(stack.leaves_nothing)


def test_what_outlived_a_killed_launcher_is_ended_by_the_next(tmp_path: Path) -> None:
    with launcher(tmp_path, "stubborn", "redis") as first:
        first.wait_for("Ready")
        first.note_family()
        first.process.kill()
        killed = time.monotonic()
        first.process.wait()
        assert not first.leaves_nothing()
        with launcher(tmp_path, "redis") as second:
            second.wait_for("Ready")
            first.wait_until(first.leaves_nothing)
            assert time.monotonic() - killed < watchdog.PATIENCE_S  # it was not the guardian


def test_a_killed_launcher_leaves_nothing_even_if_nobody_starts_another(tmp_path: Path) -> None:
    with launcher(tmp_path, "stubborn") as stack:
        stack.wait_for("Ready")
        stack.note_family()
        stack.process.kill()
        stack.wait_until(stack.leaves_nothing)


def test_a_recorded_pid_that_is_another_process_by_now_is_left_alone(tmp_path: Path) -> None:
    layout = make_data_dir(tmp_path)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        layout.processes.write_text(
            f'{{"boot": "{Path("/proc/sys/kernel/random/boot_id").read_text().strip()}", '
            f'"processes": {{"{bystander.pid}": 1}}}}'
        )
        with launcher(tmp_path, "redis") as stack:
            stack.wait_for("Ready")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_every_server_listens_on_loopback_only(tmp_path: Path) -> None:
    with launcher(tmp_path, "postgres", "redis", "s3") as stack:
        stack.wait_for("All 3 ports listen on loopback only.")
        assert {listener.address for listener in stack.listeners()} == {LOOPBACK}


def test_a_port_open_to_the_network_is_announced(tmp_path: Path) -> None:
    with launcher(tmp_path, "open") as stack:
        stack.wait_for("Open to the network: python")
        stack.wait_for("(NO password)")


def test_a_command_runs_against_the_stack_and_its_code_is_ours(tmp_path: Path) -> None:
    with launcher(tmp_path, "redis", "--", "sh", "-c", "echo at $DARKROOM_API; exit 7") as stack:
        assert stack.process.wait(15) == 7
        assert "at http://api.test" in stack.output()


def test_no_password_is_in_an_argument_or_readable_by_others(tmp_path: Path) -> None:
    with launcher(tmp_path, "postgres", "redis", "s3") as stack:
        stack.wait_for("Ready")
        arguments = " ".join(part for process in stack.family() for part in process.cmdline())
        assert "canary" not in arguments
        assert "canary" not in stack.output()
    assert tmp_path.stat().st_mode & 0o077 == 0


def test_postgres_keeps_its_rows_when_all_its_processes_are_killed(postgres_server: Server) -> None:
    with psycopg.connect(postgres_server.url, autocommit=True) as session:
        session.execute("CREATE TABLE survivors AS SELECT 1 AS row")
    postgres_server.kill()
    postgres_server.restart()
    with psycopg.connect(postgres_server.url, autocommit=True) as session:
        assert session.execute("SELECT row FROM survivors").fetchall() == [(1,)]
        session.execute("DROP TABLE survivors")


def test_postgres_asks_for_its_password(postgres_server: Server) -> None:
    user, _, place = postgres_server.url.rpartition("@")
    wrong = user.rpartition(":")[0] + ":wrong@" + place
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)


def test_a_busy_port_is_named_with_the_way_out() -> None:
    with pytest.raises(SetupError, match="--port 0"), _listening() as port:
        preflight.choose_port(port)


# --- a launcher in its own process, and what the tests ask of it


class Launcher:
    def __init__(self, process: subprocess.Popen[bytes], printed: Path) -> None:
        self.process = process
        self._printed = printed
        self._family: dict[int, int] = {}

    def output(self) -> str:
        return self._printed.read_text()

    def wait_for(self, words: str) -> None:
        self.wait_until(lambda: words in self.output())

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def note_family(self) -> None:
        """Remember who there is, to ask later whether they ended."""
        self._family = {process.pid: started_at(process.pid) or 0 for process in self.family()}
        assert self._family

    def leaves_nothing(self) -> bool:
        return not any(started_at(pid) == ticks for pid, ticks in self._family.items())

    def listeners(self) -> list[Listener]:
        return listeners(self.family())

    def ports(self) -> set[int]:
        return {listener.port for listener in self.listeners()}

    def pids_of(self, program: str) -> list[int]:
        return [process.pid for process in self.family() if process.name() == program]


def start_launcher(folder: Path, *words: str) -> Launcher:
    printed = folder.parent / f"{folder.name}-{time.monotonic_ns()}.out"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), *words], stdout=out, stderr=out
        )
    return Launcher(process, printed)


@contextmanager
def launcher(folder: Path, *words: str) -> Iterator[Launcher]:
    started = start_launcher(folder, *words)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.process.wait(15)


@contextmanager
def _listening() -> Iterator[int]:
    import socket

    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


PROGRAMS = {
    "bound": "import time; time.sleep(99)",
    "frail": "print('out of breath', flush=True); raise SystemExit(3)",
    "open": "import socket, time; s = socket.create_server(('0.0.0.0', 0)); time.sleep(99)",
    "patient": "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(99)",
    "stubborn": (
        "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN);"
        "subprocess.Popen(['sleep', '99']); time.sleep(99)"
    ),
}


def _children(layout: DataDir) -> dict[str, ProcessSpec]:
    stores = [
        postgres(
            layout.home / "postgres",
            port=free_port(),
            password="canary",
            log=layout.log("postgres"),
        ),
        servers.redis(
            layout.home / "redis", port=free_port(), password="canary", log=layout.log("redis")
        ),
        servers.s3(
            layout.objects,
            port=free_port(),
            key_id="tests",
            secret_key="canary",
            bucket="darkroom",
            log=layout.log("s3"),
        ),
    ]
    programs = [_program(name, code, layout) for name, code in PROGRAMS.items()]
    return {child.name: child for child in [*stores, *programs]}


def _program(name: str, code: str, layout: DataDir) -> ProcessSpec:
    began = time.monotonic()
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-c", code),
        env=dict(os.environ),
        log=layout.log(name),
        ready=lambda: name != "frail" and time.monotonic() > began + 0.5,
        needs=("redis",) if name == "bound" else (),
        restart_with=("redis",) if name == "bound" else (),
        grace_s=10 if name == "patient" else 0.5,
    )


def main(folder: str, *words: str) -> int:
    split = words.index("--") if "--" in words else len(words)
    layout = make_data_dir(Path(folder))
    try:
        with locked(layout):
            chosen = [_children(layout)[name] for name in words[:split]]
            return run(layout, chosen, api="http://api.test", command=words[split + 1 :])
    except SetupError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
