"""Specs of Darkroom's own processes: migration, Serve application, workers, sender, API."""

import sys
from collections.abc import Mapping
from pathlib import Path

from darkroom.local.ports import LOOPBACK, answers
from darkroom.local.process import ProcessSpec


def migration(*, env: Mapping[str, str], log: Path) -> ProcessSpec:
    """Return the spec of the migration, which exits when the schema is up to date."""
    return ProcessSpec(
        name="migration",
        argv=_python("darkroom.db.connection", "migrate"),
        env=env,
        log=log,
        needs=("postgres",),
        once=True,
    )


def serve_application(*, env: Mapping[str, str], ready_file: Path, log: Path) -> ProcessSpec:
    """Return the spec of the process that deploys the models on Ray, and restarts with it."""
    return ProcessSpec(
        name="serve",
        argv=_python("workers", "serve"),
        env={**env, "DARKROOM_READY_FILE": str(ready_file)},
        log=log,
        prepare=lambda: ready_file.unlink(missing_ok=True),
        ready=ready_file.exists,
        needs=("ray",),
        restart_with=("ray",),
        ready_timeout_s=300,  # it loads the model
    )


def worker(number: int, *, env: Mapping[str, str], ready_file: Path, log: Path) -> ProcessSpec:
    """Return the spec of a worker; it restarts with Ray, whose driver it is."""
    return ProcessSpec(
        name=f"worker-{number}",
        argv=_python("workers", "run"),
        env={**env, "DARKROOM_READY_FILE": str(ready_file)},
        log=log,
        prepare=lambda: ready_file.unlink(missing_ok=True),
        ready=ready_file.exists,
        needs=("postgres", "migration", "redis", "s3", "ray"),
        restart_with=("ray",),
        grace_s=10,  # running microbatches may finish; else their lease expires
    )


def sender(*, env: Mapping[str, str], ready_file: Path, log: Path) -> ProcessSpec:
    """Return the spec of the webhook sender."""
    return ProcessSpec(
        name="sender",
        argv=_python("workers", "send-webhooks"),
        env={**env, "DARKROOM_READY_FILE": str(ready_file)},
        log=log,
        prepare=lambda: ready_file.unlink(missing_ok=True),
        ready=ready_file.exists,
        needs=("postgres", "migration", "redis"),
        grace_s=10,  # an interrupted attempt is made again after its lease
    )


def api(port: int, *, env: Mapping[str, str], log: Path) -> ProcessSpec:
    """Return the spec of the HTTP API; ready when it reaches the database, Redis and storage."""
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
    # -P: the working directory may contain another `api`.
    return (sys.executable, "-P", "-m", module, *arguments)
