"""Fixtures and helpers that many tests share."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from sqlalchemy import Select, text
from sqlalchemy.orm import Session

from darkroom.db.connection import Sessions, open_sessions
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.generation.model_registry import ModelRegistry, load_registry
from darkroom.generation.params import JobInput
from darkroom.jobs import lifecycle
from darkroom.jobs.bulk_insert import NewJob
from darkroom.queue import claims
from darkroom.settings import Settings

# Before anything imports PyTorch, and for every process that a test starts: see
# workers.replica.triton_worker. On a busy machine a spinning thread takes the core from the one it
# waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before anything imports gRPC: what it does in a forked child starts threads there, and a process
# with threads cannot enter a user namespace, as PostgreSQL's does where tests run as root.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

pytest_plugins = [
    "tests.support.servers",
    "tests.support.api_server",
    "tests.support.webhook_servers",
    "tests.support.worker_context",
    "tests.support.compiled_models",
]

hypothesis_settings.register_profile("default", deadline=None, print_blob=True)
hypothesis_settings.load_profile("default")

#: Minutes each. Where several processes share the tests (`make test`), they begin with these, so
#: that none is left working on one of them when the others have run out of work.
LONGEST = (
    *("stack/test_end_to_end.py", "stack/test_cli.py", "http/test_file_uploads.py"),
    *("replica/test_worker_failures.py", "http/test_jobs_api.py", "replica/test_triton_worker.py"),
    *("compile/test_compile.py", "compile/test_plans.py"),
)

LEASE = timedelta(seconds=30)
LIMITS = {"darkroom-demo": 8}


#: what `--fast` leaves out: tests that start Ray, Triton or whole processes, or import PyTorch
HEAVY = {
    *("chaos", "compile", "deploy", "docs", "engine", "gpu", "local"),
    *("recipes", "replica", "stack"),
    *("webhooks/test_faults.py", "webhooks/test_ssrf.py", "worker/test_celery_wakeup.py"),
}


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out Ray, Triton and PyTorch")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--chaos", action="store_true", help="run the whole fault suite as well")
    parser.addoption("--chaos-seed", default="1", help="seed of every random choice of the suite")


def pytest_ignore_collect(collection_path, config):
    """Not even import what `--fast` leaves out."""
    name = "/".join(collection_path.parts[len(Path(__file__).parent.parts) :])
    return True if config.getoption("--fast") and name in HEAVY else None


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if not _is_wanted(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_wanted(item, config)]
    if hasattr(config, "workerinput"):  # one process of several
        ranks = {name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get("/".join(item.path.parts[-2:]), len(ranks)))


def _is_wanted(item, config):
    return all(
        config.getoption(f"--{marker}") or item.get_closest_marker(marker) is None
        for marker in ("slow", "chaos")
    )


@pytest.fixture(scope="session")
def registry() -> ModelRegistry:
    """The models of this repository."""
    settings = Settings()
    return load_registry(settings.models_dir, settings.default_model)


@pytest.fixture
def sessions(database_url: str):
    """Transactions on a migrated, empty database."""
    opened = open_sessions(database_url)
    yield opened
    opened.kw["bind"].dispose()


@pytest.fixture
def queue_jobs(sessions: Sessions, registry: ModelRegistry):
    """Queues jobs, given as input fields, and returns their ids."""

    def queue(*inputs: dict[str, object], **submission: object) -> list[str]:
        with sessions.begin() as session:
            made = [new_job(registry, fields) for fields in inputs]
            return lifecycle.submit(session, DEFAULT_TENANT, made, **submission)

    return queue


def new_job(registry: ModelRegistry, fields: dict[str, object], **where: int) -> NewJob:
    """Return a valid new job; fields that are not given are the model's defaults."""
    job = JobInput.model_validate({"prompt": "a red apple"} | fields)
    params = registry.resolve(job)
    return NewJob.of(job, params, registry.models[params.model].microbatch_key(params), **where)


@pytest.fixture
def claim(sessions: Sessions):
    """Claims a microbatch for a worker, in a transaction of its own."""

    def take(worker_id: str = "worker", *, lease: timedelta = LEASE):
        with sessions.begin() as session:
            return claims.claim(session, worker_id, max_microbatch=LIMITS, lease=lease)

    return take


def plan_of(session: Session, statement: Select[Any]) -> str:
    """How PostgreSQL would run it."""
    query = str(statement.compile(session.bind, compile_kwargs={"literal_binds": True}))
    return "\n".join(session.scalars(text(f"EXPLAIN {query}")))
