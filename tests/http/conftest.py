"""Fixtures of the HTTP tests: the shared API's database, and an empty queue where one is needed."""

import uuid

import pytest
from sqlalchemy import func, select, text
from typer.testing import CliRunner

from darkroom.cli import app
from darkroom.db.connection import open_sessions
from darkroom.db.tables import Batch, Job
from tests.support.api_server import CSV
from tests.support.fake_worker import FakeWorker, store_of

TEXT = "prompt,seed,num_images,custom_id\na cat,7,2,x\n../=evil,1,,\n=1+1,2,,\n"
TABLES = "job, batch, dispatch, delivery, event, fair_share, idempotency_key"


@pytest.fixture(scope="session")
def api_sessions(api_database):
    """Transactions on the database of the shared API."""
    opened = open_sessions(api_database)
    yield opened
    opened.kw["bind"].dispose()


@pytest.fixture
def sessions(api_sessions):
    return api_sessions


@pytest.fixture
def empty_queue(api_sessions):
    """No job or batch is left of other tests, and the queue is neither paused nor draining."""
    with api_sessions.begin() as session:
        session.execute(text(f"TRUNCATE {TABLES} CASCADE"))
        session.execute(text("UPDATE queue_control SET paused_at = NULL, draining_at = NULL"))


@pytest.fixture
def label():
    return uuid.uuid4().hex


@pytest.fixture
def worker(api_sessions, api_environment, empty_queue):  # noqa: ARG001  # it runs what is queued
    return FakeWorker(api_sessions, store_of(api_environment))


@pytest.fixture
def submit(http, empty_queue):  # noqa: ARG001  # other jobs would be claimed
    """Submit a file of rows as the only batch."""

    def send(rows=TEXT, **params):
        response = http.post("/v1/batches", content=rows, headers=CSV, params=params)
        assert response.status_code == 202, response.text
        return response.json()

    return send


@pytest.fixture
def darkroom(api_url):
    """Run the command in this process; test_cli.py runs it as one of its own."""

    def run(*words):
        environment = {"DARKROOM_API": api_url, "NO_COLOR": "1", "COLUMNS": "100"}
        return CliRunner().invoke(app, list(map(str, words)), env=environment)

    return run


@pytest.fixture(scope="session")
def rows(api_sessions):
    """How many jobs and batches there are."""

    def count():
        with api_sessions.begin() as session:
            return (
                session.scalar(select(func.count()).select_from(Job)),
                session.scalar(select(func.count()).select_from(Batch)),
            )

    return count


@pytest.fixture(scope="session")
def made(api_sessions):
    """How many batches there are of a label, and how many jobs in them."""

    def count(label=None):
        of_label = Batch.label == label if label else Batch.id.is_not(None)
        with api_sessions.begin() as session:
            jobs = select(func.count()).select_from(Job).join(Batch, Job.batch_id == Batch.id)
            return (
                session.scalar(select(func.count()).select_from(Batch).where(of_label)),
                session.scalar(jobs.where(of_label)),
            )

    return count
