"""Running API processes for tests: real servers behind them, no worker.

Importing the API takes seconds of CPU, so that processes are forked from one that has imported it.
"""

import multiprocessing
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psycopg
import pytest

from darkroom.local.ports import free_port
from tests.support.api_process import run_api
from tests.support.servers import S3Settings, ServerProcess

CSV = {"Content-Type": "text/csv"}
START_S = 90

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["pytest", "api.__main__", "tests.support.api_process"])


class ApiProcess:
    """A process like `python -m api`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        arguments = (dict(environment), str(log))
        self._process = _FORKING.Process(target=run_api, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("api", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


class RunningApi(NamedTuple):
    process: ApiProcess
    url: str
    log: Path


def until(holds: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def serve(environment: Mapping[str, str], log: Path) -> tuple[ApiProcess, str]:
    """Start an API process and return it with its address once it answers."""
    port = str(free_port())
    process = ApiProcess({**environment, "DARKROOM_API_PORT": port}, log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            httpx2.get(f"{url}/healthz")
        except httpx2.TransportError:
            assert process.poll() is None, log.read_text()
            return False
        return True

    until(answers, seconds=START_S)
    return process, url


def stop(process: ApiProcess) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) in {0, -signal.SIGTERM}


def _running(environment: Mapping[str, str], folder: Path) -> Iterator[RunningApi]:
    log = folder / "log"
    process, url = serve(environment, log)
    yield RunningApi(process, url, log)
    stop(process)


@pytest.fixture(scope="session")
def api_database(_postgres: ServerProcess, migrated_template: str) -> str:
    """URL of one database for all tests of this process; tests look at what they made."""
    name = f"api_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template} STRATEGY FILE_COPY")
    return f"{_postgres.url.rpartition('/')[0]}/{name}"


@pytest.fixture(scope="session")
def api_environment(
    api_database: str, _redis: ServerProcess, _s3: tuple[ServerProcess, S3Settings]
) -> dict[str, str]:
    _, s3 = _s3
    return os.environ | {
        "DARKROOM_DATABASE_URL": api_database,
        "DARKROOM_REDIS_URL": _redis.url,
        "DARKROOM_S3_ENDPOINT_URL": s3.endpoint_url,
        "DARKROOM_S3_ACCESS_KEY_ID": s3.access_key_id,
        "DARKROOM_S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        "DARKROOM_S3_BUCKET": s3.bucket,
        "DARKROOM_AUTH": "off",
    }


@pytest.fixture(scope="session")
def api(
    api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningApi]:
    """The API process that all tests of this process share."""
    yield from _running(api_environment, tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="session")
def api_url(api: RunningApi) -> str:
    return api.url


@pytest.fixture(scope="session")
def keyed_api(
    api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningApi]:
    """A second process on the same database, which asks for API keys."""
    environment = api_environment | {"DARKROOM_AUTH": "on"}
    yield from _running(environment, tmp_path_factory.mktemp("keyed-api"))


@pytest.fixture
def http(api_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api_url, timeout=60) as client:
        yield client


def assert_problem(
    response: httpx2.Response, status: int, code: str | None = None
) -> dict[str, Any]:
    """Assert that it is a problem of this status and code, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail", "code"} <= body.keys()
    if code is not None:
        assert body["code"] == code
    return body


def without_forecast(resource: dict[str, Any]) -> dict[str, Any]:
    """Return a job or batch without what changes with each snapshot of the queue."""
    forecast = {"queue", "eta_s_p50", "eta_s_p90"}
    return {key: value for key, value in resource.items() if key not in forecast}
