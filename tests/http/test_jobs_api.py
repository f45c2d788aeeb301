"""Jobs and batches over HTTP: a real process, real servers, no worker."""

import re
import time
import uuid

import pytest

from tests.support.api_server import CSV, assert_problem, without_forecast


def test_a_job_is_accepted_with_every_default_filled_in(http):
    response = http.post("/v1/jobs", json={"prompt": "a red apple"})

    assert response.status_code == 202
    job = response.json()
    assert (job["object"], job["status"], job["attempt"]) == ("job", "queued", 0)
    assert job["input"]["num_inference_steps"] == 8
    assert job["input"]["priority"] == "normal"
    assert 0 <= job["input"]["seed"] < 2**53
    again = http.get(f"/v1/jobs/{job['id']}").json()
    assert without_forecast(again) == without_forecast(job)
    assert again["queue"]["position"] >= 1


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
        ({"prompt": "a", "color": "red"}, "color"),
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
        ("GET", "/v1/jobs?status=generated", 422),
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
    again = http.get(f"/v1/batches/{batch['id']}").json()
    assert without_forecast(again) == without_forecast(batch)
    listed = http.get("/v1/batches").json()["data"]
    assert without_forecast(batch) in map(without_forecast, listed)


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
        ("prompt,color\na,b\n", "color"),
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


def test_the_docs_load_nothing_from_other_hosts(http):
    page = http.get("/", follow_redirects=True)
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assert addresses
    for address in addresses:
        assert address.startswith("/")
        assert http.get(address).status_code == 200
