"""Control of the whole installation, and the queue as clients and Prometheus see it."""

import os

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from darkroom.accounts import api_keys
from darkroom.cli import app
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Failed
from darkroom.status import Scope
from tests.support.api_server import CSV, assert_problem, until

JOB = {"prompt": "a red apple", "width": 64, "height": 64, "num_inference_steps": 4}
ROWS = "prompt,width,height\n" + "a red apple,64,64\n" * 3


@pytest.fixture
def http(http, empty_queue):  # noqa: ARG001  # before the client looks at it
    """A client that sees an empty queue: its snapshot counts at most every 2 s."""
    until(lambda: http.get("/v1/queue").json().get("queued") == 0)
    return http


def darkroom(http, *arguments):
    """Run the command against that API."""
    return CliRunner(env={**os.environ, "DARKROOM_API": str(http.base_url)}).invoke(app, arguments)


def fail_some(sessions, claim):
    taken = claim()
    with sessions.begin() as session:
        ends = [Failed(job.id, "cuda_error", "the device is lost") for job in taken]
        dispatches.settle(session, taken[0].dispatch_id, ends)
    return [job.id for job in taken]


def test_a_queued_job_has_its_position_and_once_a_rate_is_known_its_eta(http, sessions, claim):
    ids = [http.post("/v1/jobs", json=JOB).json()["id"] for _ in range(20)]
    places = [http.get(f"/v1/jobs/{job_id}").json()["queue"] for job_id in ids]
    assert [place["position"] for place in places] == list(range(1, 21))
    assert {place["eta_s_p50"] for place in places} == {None}

    fail_some(sessions, claim)
    urgent = http.post("/v1/jobs", json=JOB | {"deadline_s": 3600}).json()
    assert http.get(f"/v1/jobs/{ids[8]}").json()["queue"]["position"] == 1
    assert http.get(f"/v1/jobs/{ids[0]}").json()["queue"] is None
    queue = {}

    def forecast():
        queue.update(http.get(f"/v1/jobs/{urgent['id']}").json()["queue"])
        return queue["eta_s_p50"] is not None

    until(forecast)
    assert 0 <= queue["eta_s_p50"] <= queue["eta_s_p90"]
    assert queue["will_meet_deadline"] is True
    batch = http.post("/v1/batches", content=ROWS, headers=CSV).json()
    assert batch["eta_s_p90"] >= batch["eta_s_p50"] >= queue["eta_s_p50"]
    dry = http.post("/v1/batches?dry_run=true", content=ROWS, headers=CSV).json()
    assert dry["eta_s_p50"] is not None


def test_the_queue_is_counted_by_priority_and_model(http):
    http.post("/v1/jobs", json=JOB)
    http.post("/v1/batches", content=ROWS, headers=CSV)

    until(lambda: http.get("/v1/queue").json()["queued"] == 4)
    queue = http.get("/v1/queue").json()
    depth = {each["priority"]: (each["model"], each["jobs"]) for each in queue["depth"]}
    assert depth == {"normal": ("darkroom-demo", 1), "bulk": ("darkroom-demo", 3)}
    assert queue["oldest_queued_s"] >= 0
    assert queue["eta_model"] == []
    assert darkroom(http, "queue").exit_code == 0


def test_metrics_are_in_the_format_of_prometheus(http):
    http.post("/v1/jobs", json=JOB)
    until(lambda: http.get("/v1/queue").json()["queued"] == 1)
    answer = http.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    [waiting] = found["darkroom_queue_jobs"].samples
    assert (waiting.labels, waiting.value) == ({"priority": "normal", "model": "darkroom-demo"}, 1)
    assert found["darkroom_queue_snapshot_up"].samples[0].value == 1
    assert "darkroom_jobs_finished" in found
    assert found["darkroom_build_info"].samples[0].labels["version"]
    assert found["process_resident_memory_bytes"].samples[0].value > 0


def test_while_paused_jobs_are_accepted_and_not_claimed(http, sessions, claim):
    assert http.post("/v1/admin/pause").json()["paused"] is True
    job = http.post("/v1/jobs", json=JOB)

    assert job.status_code == 202
    assert claim() == []
    with sessions.begin() as session:
        assert not claims.has_claimable(session)
    assert darkroom(http, "admin", "resume").exit_code == 0
    assert [each.id for each in claim()] == [job.json()["id"]]


def test_while_draining_new_jobs_are_rejected_and_queued_ones_claimed(http, claim):
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


def test_a_purge_must_be_confirmed_and_cancels_every_queued_job(http, claim):
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


def test_a_failed_job_is_listed_until_it_is_retried(http, sessions, claim):
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


def test_admin_needs_a_key_with_its_scope(keyed_api, sessions):
    with sessions.begin() as session:
        plain = api_keys.create(session, DEFAULT_TENANT, [Scope.SUBMIT, Scope.READ]).secret
        admin = api_keys.create(session, DEFAULT_TENANT, [Scope.ADMIN]).secret
    with httpx2.Client(base_url=keyed_api.url, timeout=30) as http:
        for path in ("drain", "pause", "resume", "purge"):
            assert_problem(http.post(f"/v1/admin/{path}"), 401)
            refused = http.post(f"/v1/admin/{path}", headers={"Authorization": f"Bearer {plain}"})
            assert_problem(refused, 403, "missing_scope")
        allowed = http.get("/v1/admin/failed", headers={"Authorization": f"Bearer {admin}"})
        assert allowed.status_code == 200
        assert http.get("/metrics").status_code == 200
