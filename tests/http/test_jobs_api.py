"""The HTTP API as its clients meet it: a real process, real servers, no worker."""

import json
import re
import statistics
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from sqlalchemy import func, select

from darkroom.accounts import api_keys
from darkroom.db.connection import open_sessions
from darkroom.db.tables import DEFAULT_TENANT, Batch, Job
from darkroom.event_types import EventType
from darkroom.status import Scope
from tests.support.api_server import CSV, assert_problem, serve, stop


@pytest.fixture(scope="module")
def rows(api_database):
    """How many jobs and batches there are."""
    sessions = open_sessions(api_database, pool_size=1)

    def count():
        with sessions.begin() as session:
            return (
                session.scalar(select(func.count()).select_from(Job)),
                session.scalar(select(func.count()).select_from(Batch)),
            )

    yield count
    sessions.kw["bind"].dispose()


def test_a_job_is_accepted_with_every_default_filled_in(http):
    response = http.post("/v1/jobs", json={"prompt": "a red apple"})

    assert response.status_code == 202
    job = response.json()
    assert (job["object"], job["status"], job["attempt"]) == ("job", "queued", 0)
    assert job["input"]["num_inference_steps"] == 8
    assert job["input"]["priority"] == "normal"
    assert 0 <= job["input"]["seed"] < 2**53
    assert http.get(f"/v1/jobs/{job['id']}").json() == job


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n "}, "prompt"),
        ({"prompt": "a" * 3000}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "a\x1bb"}, "prompt"),
        ({}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt": "a", "model": "none"}, "model"),
        ({"prompt": "a", "width": 97}, "width"),
        ({"prompt": "a", "width": 100_000}, "width"),
        ({"prompt": "a", "width": "256"}, "width"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "seed": 2**53}, "seed"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "seed": 10**300}, "seed"),
        ({"prompt": "a", "output_format": "gif"}, "output_format"),
        ({"prompt": "a", "priority": "now"}, "priority"),
        ({"prompt": "a", "metadata": {"a": 1}}, "a"),
        ({"prompt": "a", "metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)
def test_bad_input_names_its_field_and_creates_nothing(http, rows, body, field):
    before = rows()
    found = assert_problem(http.post("/v1/jobs", json=body), 422, "invalid_input")

    assert field in [error["loc"][-1] for error in found["errors"]]
    assert field in found["detail"]
    assert rows() == before


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "lone \\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": 1e400}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a"',
        b"",
        b"[]",
        b"null",
        b"\xff\xfe{\x00}\x00",
        b"[" * 50_000,
        b'{"prompt": "caf\xe9"}',
    ],
)
def test_hostile_json_is_a_client_error_and_creates_nothing(http, rows, body):
    before = rows()
    response = http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})

    assert 400 <= response.status_code < 500, response.text
    assert_problem(response, response.status_code)
    assert rows() == before


def test_without_keys_a_foreign_name_for_this_machine_opens_nothing(http, rows):
    before = rows()
    for method in ("GET", "POST"):
        request = http.build_request(method, "/v1/jobs", json={"prompt": "a"})
        request.headers["host"] = "evil.example:8000"
        assert_problem(http.send(request), 403, "untrusted_host")
    assert rows() == before


def test_a_problem_does_not_repeat_what_was_sent(http):
    response = http.post("/v1/jobs", json={"prompt": "a", "seed": "<script>alert(1)</script>"})
    assert "<script>" not in response.text


def test_a_body_past_its_limit_is_refused_while_it_comes_in(http, rows):
    before = rows()
    response = http.post("/v1/jobs", content=b'{"prompt": "' + b"a" * 10**6 + b'"}')

    assert_problem(response, 413)
    assert rows() == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/jobs/job_" + "0" * 32, 404),
        ("GET", "/v1/jobs/%00", 404),
        ("GET", "/v1/jobs/job_%F0%28", 404),
        ("GET", "/v1/batches/bat_" + "0" * 32, 404),
        ("GET", "/v1/jobs?limit=0", 422),
        ("GET", "/v1/jobs?status=drawn", 422),
        ("GET", "/v1/jobs?cursor=%00", 422),
        ("GET", "/v1/jobs?label=%00", 422),
        ("POST", "/v1/batches", 415),
        ("POST", "/v1/batches?on_error=ignore", 422),
    ],
)
def test_every_error_is_a_problem(http, method, path, status):
    assert_problem(http.request(method, path), status)


def test_a_job_without_an_image_says_so(http):
    job = http.post("/v1/jobs", json={"prompt": "a red apple"}).json()
    assert_problem(http.get(f"/v1/jobs/{job['id']}/image"), 409, "image_not_ready")


def test_waiting_ends_after_the_time_asked_for(http):
    job = http.post("/v1/jobs", json={"prompt": "a red apple"}).json()
    began = time.monotonic()
    waited = http.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=1"}).json()

    assert waited["status"] == "queued"
    assert 0.9 < time.monotonic() - began < 5


def test_an_unchanged_job_need_not_be_sent_again(http):
    job = http.post("/v1/jobs", json={"prompt": "a red apple"}).json()
    tag = http.get(f"/v1/jobs/{job['id']}").headers["etag"]
    again = http.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": tag})

    assert (again.status_code, again.content) == (304, b"")


def test_jobs_are_listed_newest_first_and_page_by_page(http):
    label = uuid.uuid4().hex
    made = [
        http.post("/v1/jobs", json={"prompt": "a", "label": label}).json()["id"] for _ in range(5)
    ]
    seen, cursor = [], None
    while True:
        params = {"label": label, "limit": 2} | ({"cursor": cursor} if cursor else {})
        page = http.get("/v1/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert seen == made[::-1]


def test_a_csv_file_becomes_a_batch_of_jobs(http):
    text = "prompt,seed,num_images\na cat,7,2\na dog,1,\n"
    response = http.post("/v1/batches", content=text, headers=CSV, params={"label": "pets"})

    assert response.status_code == 202, response.text
    batch = response.json()
    assert (batch["status"], batch["outcome"], batch["label"]) == ("queued", None, "pets")
    assert (batch["counts"]["total"], batch["counts"]["queued"]) == (3, 3)
    jobs = http.get(batch["urls"]["jobs"]).json()["data"]
    assert [(job["row_number"], job["input"]["seed"]) for job in jobs] == [(1, 7), (1, 8), (2, 1)]
    assert {job["input"]["priority"] for job in jobs} == {"bulk"}
    assert http.get(f"/v1/batches/{batch['id']}").json() == batch
    assert batch in http.get("/v1/batches").json()["data"]


def test_a_batch_is_paged_in_the_order_of_its_rows(http):
    text = "prompt,seed\n" + "".join(f"a cat,{seed}\n" for seed in range(250))
    batch = http.post("/v1/batches", content=text, headers=CSV).json()
    seeds, cursor = [], None
    while True:
        params = {"batch_id": batch["id"], "limit": 100} | ({"cursor": cursor} if cursor else {})
        page = http.get("/v1/jobs", params=params).json()
        seeds += [job["input"]["seed"] for job in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert seeds == list(range(250))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("prompt,colour\na,b\n", "colour"),
        ("prompt,seed\na\n", 1),
        ('prompt\na\n"b\n', 2),
        ("prompt,width\na,256\nb,97\n", "width"),
    ],
)
def test_a_bad_csv_file_names_the_place_and_creates_nothing(http, rows, text, where):
    before = rows()
    response = http.post("/v1/batches", content=text, headers=CSV)

    found = assert_problem(response, 422, "invalid_input")
    assert where in found["errors"][0]["loc"]
    assert rows() == before


def test_models_tell_their_limits(http):
    [model, older] = http.get("/v1/models").json()["data"]

    assert (older["name"], older["revision_of"]) == ("darkroom-demo-v1", "darkroom-demo")
    assert model["name"] == "darkroom-demo"
    assert model["is_default"]
    assert model["microbatch_size"] == 8
    assert model["width"] == {"default": 256, "minimum": 64, "maximum": 512, "multiple_of": 32}


def test_it_is_alive_and_ready(http):
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ok"}


def test_openapi_says_what_each_webhook_looks_like(http):
    document = http.get("/openapi.json").json()

    assert document["webhooks"].keys() == {kind.value for kind in EventType}
    failed = document["webhooks"]["job.failed"]["post"]
    assert {each["name"] for each in failed["parameters"]} == {
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    }
    assert failed["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/JobMessage"
    )


def test_openapi_names_every_route_and_the_shape_of_problems(http):
    document = http.get("/openapi.json").json()

    assert {
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/image",
        "/v1/jobs/{job_id}/retry",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/events",
        "/v1/deliveries",
        "/v1/deliveries/replay",
        "/v1/deliveries/{delivery_id}",
        "/v1/deliveries/{delivery_id}/replay",
        "/v1/batches/{batch_id}/cancel",
        "/v1/batches/{batch_id}/errors.csv",
        "/v1/batches/{batch_id}/images.zip",
        "/v1/batches/{batch_id}/manifest.csv",
        "/v1/batches/{batch_id}/manifest.jsonl",
        "/v1/batches/{batch_id}/pause",
        "/v1/batches/{batch_id}/resume",
        "/v1/batches/{batch_id}/retry",
        "/v1/models",
        "/v1/queue",
        "/v1/admin/drain",
        "/v1/admin/failed",
        "/v1/admin/failed/{job_id}/retry",
        "/v1/admin/pause",
        "/v1/admin/purge",
        "/v1/admin/resume",
        "/metrics",
        "/v1/webhook-secret",
        "/v1/webhook-secret/rotate",
        "/v1/webhooks",
        "/v1/webhooks/{webhook_id}",
        "/v1/webhooks/{webhook_id}/deliveries",
        "/v1/webhooks/{webhook_id}/enable",
        "/v1/webhooks/{webhook_id}/replay",
        "/v1/webhooks/{webhook_id}/rotate-secret",
        "/v1/webhooks/{webhook_id}/test",
        "/healthz",
        "/readyz",
    } == set(document["paths"])
    assert "code" in document["components"]["schemas"]["Problem"]["properties"]
    assert "HTTPValidationError" not in json.dumps(document)


def test_the_docs_ask_nobody_else_for_anything(http):
    page = http.get("/", follow_redirects=True)
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assert addresses
    for address in addresses:
        assert address.startswith("/")
        assert http.get(address).status_code == 200


def test_without_redis_jobs_are_still_accepted_at_once(http, redis_server):
    redis_server.kill()
    assert_problem(http.get("/readyz"), 503, "not_ready")
    for _ in range(5):
        began = time.monotonic()
        assert http.post("/v1/jobs", json={"prompt": "a"}).status_code == 202
        assert time.monotonic() - began < 1


def test_with_a_frozen_redis_jobs_are_still_accepted_at_once(http, redis_server):
    def post(_):
        began = time.monotonic()
        assert http.post("/v1/jobs", json={"prompt": "a"}).status_code == 202
        return time.monotonic() - began

    with ThreadPoolExecutor(20) as clients:
        usual = max(clients.map(post, range(60)))
        redis_server.freeze()
        # who waits for Redis waits for a second, and one after the other for twenty
        assert max(clients.map(post, range(60))) < 2 * usual + 2
        assert statistics.median(map(post, range(5))) < 1


def test_without_postgres_it_answers_503_and_recovers_by_itself(http, postgres_server):
    postgres_server.kill()
    for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/batches")):
        response = http.request(method, path, json={"prompt": "a"} if method == "POST" else None)
        assert_problem(response, 503, "database_unavailable")
        assert int(response.headers["retry-after"]) > 0
    assert http.get("/healthz").status_code == 200
    postgres_server.restart()

    assert http.post("/v1/jobs", json={"prompt": "a"}).status_code == 202


def test_with_auth_on_a_key_opens_only_its_own_tenants_door(
    api_environment, api_database, tmp_path
):
    sessions = open_sessions(api_database, pool_size=1)
    with sessions.begin() as session:
        reader = api_keys.create(session, DEFAULT_TENANT, [Scope.READ])
        writer = api_keys.create(session, DEFAULT_TENANT, [Scope.SUBMIT, Scope.READ])
    process, url = serve(api_environment | {"DARKROOM_AUTH": "on"}, tmp_path / "log")
    try:

        def ask(secret, method="GET", **request):
            headers = {"Authorization": f"Bearer {secret}"} if secret else {}
            return httpx2.request(method, f"{url}/v1/jobs", headers=headers, **request)

        assert_problem(ask(None), 401, "missing_api_key")
        assert ask(None).headers["www-authenticate"] == "Bearer"
        assert_problem(ask("dk_" + "a" * 38), 401, "invalid_api_key")
        assert ask(reader.secret).status_code == 200
        assert_problem(ask(reader.secret, "POST", json={"prompt": "a"}), 403, "missing_scope")
        assert ask(writer.secret, "POST", json={"prompt": "a"}).status_code == 202
        with sessions.begin() as session:
            api_keys.revoke(session, writer.id)
        time.sleep(1)
        assert_problem(ask(writer.secret), 401, "invalid_api_key")
        assert writer.secret not in (tmp_path / "log").read_text()
    finally:
        stop(process)
        sessions.kw["bind"].dispose()


def test_without_auth_it_refuses_to_listen_beyond_loopback(api_environment):
    refused = subprocess.run(
        [sys.executable, "-m", "api"],
        env=api_environment | {"DARKROOM_API_HOST": "0.0.0.0"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert refused.returncode == 2
    assert "DARKROOM_AUTH" in refused.stderr


def test_a_job_is_canceled_retried_and_deleted(http):
    job = http.post("/v1/jobs", json={"prompt": "a red apple"}).json()
    path = job["urls"]["self"]
    assert_problem(http.post(f"{path}/retry"), 409, "job_not_finished")
    assert_problem(http.delete(path), 409, "job_not_finished")

    canceled = http.post(job["urls"]["cancel"])
    assert (canceled.status_code, canceled.json()["status"]) == (200, "canceled")
    again = http.post(f"{path}/retry")
    assert (again.status_code, again.json()["retried_from"]) == (202, job["id"])

    assert http.delete(path).status_code == 204
    gone = assert_problem(http.get(path), 410, "deleted")
    assert (gone["id"], gone["deleted_at"][-1]) == (job["id"], "Z")
    for method, rest in (
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("GET", "/image"),
    ):
        assert_problem(http.request(method, path + rest), 410, "deleted")


def test_a_deleted_job_is_not_repeated_to_its_idempotency_key(http):
    key = {"Idempotency-Key": "deleted-later"}
    job = http.post("/v1/jobs", json={"prompt": "a red apple"}, headers=key).json()
    http.post(job["urls"]["cancel"])
    http.delete(job["urls"]["self"])

    assert http.post("/v1/jobs", json={"prompt": "a red apple"}, headers=key).status_code == 202


def test_a_deadline_is_shown_and_must_be_positive(http):
    job = http.post("/v1/jobs", json={"prompt": "a red apple", "start_within_s": 60}).json()
    assert job["expires_at"] > job["created_at"]
    assert_problem(
        http.post("/v1/jobs", json={"prompt": "a", "deadline_s": 0}), 422, "invalid_input"
    )
