"""Our own processes: migration, Serve application, Celery workers, API."""

import sys
from collections.abc import Mapping
from pathlib import Path

from darkroom.local.ports import LOOPBACK, answers
from darkroom.local.process import ProcessSpec


def migration(*, env: Mapping[str, str], log: Path) -> ProcessSpec:
    """Brings the schema up to date, then ends."""
    return ProcessSpec(
        name="migration",
        argv=_python("darkroom.db.connection", "migrate"),
        env=env,
        log=log,
        needs=("postgres",),
        once=True,
    )


def serve_application(*, env: Mapping[str, str], ready_file: Path, log: Path) -> ProcessSpec:
    """Deploys the models on Ray and stays; a new Ray needs a new one."""
    return ProcessSpec(
        name="serve",
        argv=_python("workers", "serve"),
        env={**env, "DARKROOM_READY_FILE": str(ready_file)},
        log=log,
        prepare=lambda: ready_file.unlink(missing_ok=True),
        ready=ready_file.exists,
        needs=("ray",),
        restart_with=("ray",),
        ready_within_s=300,  # it loads the model
    )


def worker(number: int, *, env: Mapping[str, str], ready_file: Path, log: Path) -> ProcessSpec:
    """Claims microbatches. Its Ray driver cannot outlive the cluster it joined."""
    return ProcessSpec(
        name=f"worker-{number}",
        argv=_python("workers", "run"),
        env={**env, "DARKROOM_READY_FILE": str(ready_file)},
        log=log,
        prepare=lambda: ready_file.unlink(missing_ok=True),
        ready=ready_file.exists,
        needs=("postgres", "migration", "redis", "s3", "ray"),
        restart_with=("ray",),
        grace_s=10,  # what it draws now may be finished; else the lease sees to it
    )


def sender(*, env: Mapping[str, str], ready_file: Path, log: Path) -> ProcessSpec:
    """Sends webhooks."""
    return ProcessSpec(
        name="sender",
        argv=_python("workers", "send-webhooks"),
        env={**env, "DARKROOM_READY_FILE": str(ready_file)},
        log=log,
        prepare=lambda: ready_file.unlink(missing_ok=True),
        ready=ready_file.exists,
        needs=("postgres", "migration", "redis"),
        grace_s=10,  # an attempt that is cut off is made again after its lease
    )


def api(port: int, *, env: Mapping[str, str], log: Path) -> ProcessSpec:
    """The HTTP API; ready when it reaches the database, Redis and storage."""
    return ProcessSpec(
        name="api",
        argv=_python("api"),
        env=env,
        log=log,
        ready=answers(port, "/readyz"),
        where=f"http://{LOOPBACK}:{port}",
        url=f"http://{LOOPBACK}:{port}",
        needs=("postgres", "migration", "redis", "s3"),
        grace_s=11,  # it gives requests in flight 10 s
    )


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    # -P: the caller's folder may hold an `api` of its own.
    return (sys.executable, "-P", "-m", module, *arguments)
