"""A running API process for tests: real servers behind it, no worker."""

import os
import signal
import subprocess
import sys
import time
import uuid

import httpx2
import psycopg
import pytest

from darkroom.db.connection import migrate
from darkroom.local.ports import free_port

CSV = {"Content-Type": "text/csv"}


@pytest.fixture(scope="session")
def api_database(_postgres):
    """One database for all tests of this module; they look at what they made themselves."""
    name = f"api_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    url = f"{_postgres.url.rpartition('/')[0]}/{name}"
    migrate(url)
    return url


@pytest.fixture(scope="session")
def api_environment(api_database, _redis, _s3):
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


def serve(environment, log):
    """A running API process and its address."""
    port = str(free_port())
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"],
            env=environment | {"DARKROOM_API_PORT": port},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            httpx2.get(f"{url}/healthz")
        except httpx2.TransportError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        else:
            return process, url
    raise AssertionError(log.read_text())


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) in {0, -signal.SIGTERM}


@pytest.fixture(scope="session")
def api_url(api_environment, tmp_path_factory):
    process, url = serve(api_environment, tmp_path_factory.mktemp("api") / "log")
    yield url
    stop(process)


@pytest.fixture
def http(api_url):
    with httpx2.Client(base_url=api_url, timeout=30) as client:
        yield client


def assert_problem(response, status, code=None):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail", "code"} <= body.keys()
    if code is not None:
        assert body["code"] == code
    return body
