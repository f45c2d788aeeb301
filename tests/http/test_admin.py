"""What an operator says to the whole installation, and what is told of the queue."""

import os
import time
import uuid

import httpx2
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from typer.testing import CliRunner

from darkroom.accounts import api_keys
from darkroom.cli import app
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed
from darkroom.status import Scope
from tests.support.api_server import CSV, assert_problem, serve, stop

JOB = {"prompt": "a red apple", "width": 64, "height": 64, "num_inference_steps": 4}
ROWS = "prompt,width,height\n" + "a red apple,64,64\n" * 3


@pytest.fixture(scope="module")
def database_url(_postgres, migrated_template):
    """A database of this module's own: what is said here is said to all."""
    name = f"admin_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    return f"{_postgres.url.rpartition('/')[0]}/{name}"


@pytest.fixture(scope="module")
def environment(api_environment, database_url):
    return api_environment | {"DARKROOM_DATABASE_URL": database_url}


@pytest.fixture(scope="module")
def own_api_url(environment, tmp_path_factory):
    process, url = serve(environment, tmp_path_factory.mktemp("admin") / "log")
    yield url
    stop(process)


@pytest.fixture
def http(own_api_url, sessions):
    """A client; nothing waits, nothing was said, nothing is known."""
    with sessions.begin() as session:
        session.execute(text("TRUNCATE job, batch, dispatch, fair_share, idempotency_key CASCADE"))
        session.execute(text("UPDATE queue_control SET paused_at = NULL, draining_at = NULL"))
    with httpx2.Client(base_url=own_api_url, timeout=30) as client:
        until(lambda: client.get("/v1/queue").json()["queued"] == 0)
        yield client


def until(true):
    """Looks at the queue are as old as a scan of it may be."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def darkroom(http, *arguments):
    """The command, asked of that API."""
    return CliRunner(env={**os.environ, "DARKROOM_API": str(http.base_url)}).invoke(app, arguments)


def fail_some(sessions, claim):
    taken = claim()
    with sessions.begin() as session:
        ends = [Failed(job.id, "cuda_error", "the device is lost") for job in taken]
        dispatches.settle(session, taken[0].dispatch_id, ends)
    return [job.id for job in taken]


def test_a_waiting_job_is_told_its_place_and_once_a_rate_is_known_its_time(http, sessions, claim):
    ids = [http.post("/v1/jobs", json=JOB).json()["id"] for _ in range(20)]
    places = [http.get(f"/v1/jobs/{job_id}").json()["queue"] for job_id in ids]
    assert [place["position"] for place in places] == list(range(1, 21))
    assert {place["eta_s_p50"] for place in places} == {None}

    fail_some(sessions, claim)
    hurried = http.post("/v1/jobs", json=JOB | {"deadline_s": 3600}).json()
    assert http.get(f"/v1/jobs/{ids[8]}").json()["queue"]["position"] == 1
    assert http.get(f"/v1/jobs/{ids[0]}").json()["queue"] is None
    told = {}

    def forecast():
        told.update(http.get(f"/v1/jobs/{hurried['id']}").json()["queue"])
        return told["eta_s_p50"] is not None

    until(forecast)
    assert 0 <= told["eta_s_p50"] <= told["eta_s_p90"]
    assert told["will_meet_deadline"] is True
    batch = http.post("/v1/batches", content=ROWS, headers=CSV).json()
    assert batch["eta_s_p90"] >= batch["eta_s_p50"] >= told["eta_s_p50"]
    dry = http.post("/v1/batches?dry_run=true", content=ROWS, headers=CSV).json()
    assert dry["eta_s_p50"] is not None


def test_the_queue_tells_how_much_waits_by_class_and_model(http):
    http.post("/v1/jobs", json=JOB)
    http.post("/v1/batches", content=ROWS, headers=CSV)

    until(lambda: http.get("/v1/queue").json()["queued"] == 4)
    queue = http.get("/v1/queue").json()
    depth = {each["priority"]: (each["model"], each["jobs"]) for each in queue["depth"]}
    assert depth == {"normal": ("darkroom-demo", 1), "bulk": ("darkroom-demo", 3)}
    assert queue["oldest_queued_s"] >= 0
    assert queue["eta_model"] == []
    assert darkroom(http, "queue").exit_code == 0


def test_metrics_are_what_prometheus_reads(http):
    http.post("/v1/jobs", json=JOB)
    until(lambda: http.get("/v1/queue").json()["queued"] == 1)
    answer = http.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    [waiting] = found["darkroom_queue_jobs"].samples
    assert (waiting.labels, waiting.value) == ({"priority": "normal", "model": "darkroom-demo"}, 1)
    assert found["process_resident_memory_bytes"].samples[0].value > 0


def test_while_paused_nothing_is_claimed_and_jobs_are_taken(http, sessions, claim):
    assert http.post("/v1/admin/pause").json()["paused"] is True
    job = http.post("/v1/jobs", json=JOB)

    assert job.status_code == 202
    assert claim() == []
    with sessions.begin() as session:
        assert not claims.has_claimable(session)
    assert darkroom(http, "admin", "resume").exit_code == 0
    assert [each.id for each in claim()] == [job.json()["id"]]


def test_while_draining_nothing_new_is_taken_and_what_waits_is_claimed(http, claim):
    kept = {"Idempotency-Key": "one"}
    job = http.post("/v1/jobs", json=JOB, headers=kept).json()
    assert http.post("/v1/admin/drain").json()["draining"] is True

    for refused in (
        http.post("/v1/jobs", json=JOB),
        http.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": "two"}),
        http.post("/v1/batches", content=ROWS, headers=CSV),
    ):
        assert_problem(refused, 503, "draining")
        assert int(refused.headers["retry-after"]) > 0
    assert http.post("/v1/jobs", json=JOB, headers=kept).status_code == 200
    assert [each.id for each in claim()] == [job["id"]]
    http.post("/v1/admin/resume")
    assert http.post("/v1/jobs", json=JOB).status_code == 202


def test_a_purge_wants_to_be_confirmed_and_cancels_all_that_waits(http, claim):
    running = http.post("/v1/jobs", json=JOB).json()["id"]
    assert [each.id for each in claim()] == [running]
    waits = http.post("/v1/jobs", json=JOB).json()["id"]
    batch = http.post("/v1/batches", content=ROWS, headers=CSV).json()["id"]
    paused = http.post("/v1/batches", content=ROWS, headers=CSV).json()["id"]
    http.post(f"/v1/batches/{paused}/pause")

    assert_problem(http.post("/v1/admin/purge"), 422)
    assert_problem(http.post("/v1/admin/purge", json={"confirm": "yes"}), 422)
    assert darkroom(http, "admin", "purge").exit_code == 2
    assert http.post("/v1/admin/purge", json={"confirm": "purge"}).json()["canceled"] == 7
    assert http.get(f"/v1/jobs/{waits}").json()["status"] == "canceled"
    assert http.get(f"/v1/jobs/{running}").json()["status"] == "running"
    for batch_id in (batch, paused):
        assert http.get(f"/v1/batches/{batch_id}").json()["counts"]["canceled"] == 3


def test_what_failed_is_listed_until_it_is_retried(http, sessions, claim):
    http.post("/v1/batches", content=ROWS, headers=CSV)
    failed = fail_some(sessions, claim)

    found = http.get("/v1/admin/failed").json()["data"]
    assert {each["id"] for each in found} == set(failed)
    assert found[0]["error"]["code"] == "cuda_error"
    assert "prompt" not in str(found)
    again = http.post(f"/v1/admin/failed/{failed[0]}/retry")
    assert again.status_code == 202
    assert again.json()["retried_from"] == failed[0]
    left = darkroom(http, "admin", "failed").stdout.split()
    assert failed[0] not in left
    assert failed[1] in left
    assert_problem(http.post(f"/v1/admin/failed/job_{'0' * 32}/retry"), 404)


def test_admin_wants_a_key_of_that_scope(environment, sessions, tmp_path):
    with sessions.begin() as session:
        plain = api_keys.create(session, DEFAULT_TENANT, [Scope.SUBMIT, Scope.READ]).secret
        admin = api_keys.create(session, DEFAULT_TENANT, [Scope.ADMIN]).secret
    process, url = serve(environment | {"DARKROOM_AUTH": "on"}, tmp_path / "log")
    with httpx2.Client(base_url=url, timeout=30) as http:
        for path in ("drain", "pause", "resume", "purge"):
            assert_problem(http.post(f"/v1/admin/{path}"), 401)
            refused = http.post(f"/v1/admin/{path}", headers={"Authorization": f"Bearer {plain}"})
            assert_problem(refused, 403, "missing_scope")
        let_in = http.get("/v1/admin/failed", headers={"Authorization": f"Bearer {admin}"})
        assert let_in.status_code == 200
        assert http.get("/metrics").status_code == 200
    stop(process)
