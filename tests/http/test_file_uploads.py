"""Files of rows in every format, and what they may hold."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import httpx2
import pytest

from tests.support.api_server import CSV, assert_problem, serve
from tests.support.uploads import NDJSON, send, table


def test_every_format_makes_the_same_jobs(http):
    rows = [{"prompt": "a cat", "seed": 1}, {"prompt": "a\ndog", "seed": 2}]
    text = 'prompt,seed\na cat,1\n"a\ndog",2\n'
    lines = "\n".join(map(json.dumps, rows))
    sent = [
        send(http, text),
        send(http, text.replace(",", "\t"), {"Content-Type": "text/tab-separated-values"}),
        send(http, lines, NDJSON),
        http.post("/v1/batches", json={"jobs": rows}),
        http.post("/v1/batches", files={"file": ("prompts.csv", text)}),
        http.post("/v1/batches", files={"file": ("../../x.csv", text, "application/vnd.ms-excel")}),
        http.post("/v1/batches", files={"file": ("prompts.jsonl", lines)}),
        http.post("/v1/batches", files={"file": ("x", lines, "application/x-ndjson")}),
    ]

    for response in sent:
        assert response.status_code == 202, response.text
        jobs = http.get(response.json()["urls"]["jobs"]).json()["data"]
        assert [(j["row_number"], j["input"]["prompt"], j["input"]["seed"]) for j in jobs] == [
            (1, "a cat", 1),
            (2, "a\ndog", 2),
        ]


def test_the_query_gives_the_defaults_of_all_rows(http):
    batch = send(http, "prompt,steps\na,\nb,9\n", cfg="2.5", steps=5, priority="normal").json()
    jobs = http.get(batch["urls"]["jobs"]).json()["data"]

    assert [job["input"]["num_inference_steps"] for job in jobs] == [5, 9]
    assert {(job["input"]["guidance_scale"], job["input"]["priority"]) for job in jobs} == {
        (2.5, "normal")
    }


@pytest.mark.parametrize(
    "params", [{"stepz": "5"}, {"steps": "x"}, {"on_error": "ignore"}, {"expand": "all"}]
)
def test_an_invalid_query_parameter_is_refused(http, made, params):
    before = made()
    found = assert_problem(send(http, table(1), **params), 422, "invalid_input")

    assert found["errors"][0]["loc"][0] == "query"
    assert made() == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("prompt\na\n", 202),
        ("\ufeffprompt\na\n", 202),
        ("prompt;seed\ra;1\r", 202),
        ("prompt\tseed\r\na\t1\nb\t2\r\n", 202),
        ('prompt\na "red" apple\n', 202),
        ('prompt\n=HYPERLINK("http://x")\n', 202),
        ("prompt\na\u2028b\n", 202),
        ("prompt\n" + "the same\n" * 1000, 202),
        (b"prompt\ncaf\xe9\n", 422),
        (b"prompt\n\xed\xa0\x80\n", 422),
        ("prompt\na\0b\n", 422),
        (f"prompt\n{'a' * 200_000}\n", 422),
        ("prompt,seed\na\n", 422),
        ("prompt,prompt\na,b\n", 422),
        ("prompt,\na,b\n", 422),
        ("sep=;\nprompt\na\n", 422),
        (",".join(f"c{n}" for n in range(10_000)) + "\n", 422),
        ("," * 100_000, 422),
        ("prompt\na\n\x1a", 422),
        ("", 422),
        (b"\x89PNG\r\n\x1a\n", 415),
        (gzip.compress(b"prompt\na\n", mtime=0), 415),
        (b"PK\x03\x04" + b"\0" * 26 + b"xl/workbook.xml", 415),
        ("<!doctype html><title>Log in</title>", 415),
        ("prompt\na\n".encode("utf-16"), 415),
    ],
)  # fmt: skip
def test_a_hostile_file_gets_its_answer_and_creates_nothing(http, made, body, status):
    before = made()
    response = send(http, body)

    if status == HTTPStatus.ACCEPTED:
        assert response.status_code == status, response.text
        return
    assert_problem(response, status)
    assert made() == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "text/csv; charset=utf-16"}, 415),
        ({"Content-Type": "text/csv; charset=UTF-8"}, 202),
        ({"Content-Type": "text/csv", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "multipart/form-data"}, 400),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 400),
    ],
)
def test_the_headers_of_a_file_must_match_it(http, headers, status):
    response = send(http, "prompt\na\n", headers)
    assert response.status_code == status, response.text


def test_of_a_hundred_thousand_and_one_rows_none_is_accepted(http, made):
    before = made()
    found = assert_problem(send(http, "prompt\n" + "a\n" * 100_001), 422)
    assert found["errors"][0]["code"] == "too_many_rows"
    assert made() == before


def test_a_file_past_its_limits_is_refused(api_environment, tmp_path):
    limits = {"DARKROOM_MAX_UPLOAD_BYTES": "2000", "DARKROOM_MAX_UPLOAD_ROWS": "3"}
    limits["DARKROOM_MAX_BATCH_JOBS"] = "5"
    process, url = serve(api_environment | limits, tmp_path / "log")
    try:
        with httpx2.Client(base_url=url) as http:
            assert_problem(send(http, "prompt\n" + "a" * 2000), 413, "too_large")
            assert_problem(send(http, iter([b"prompt\n", b"a" * 2000])), 413, "too_large")
            assert send(http, "prompt\n" + "a" * 1993).status_code == 202
            form = {"file": ("a.csv", "prompt\n" + "a" * 200_000)}
            assert_problem(http.post("/v1/batches", files=form), 413, "too_large")
            assert send(http, table(3)).status_code == 202
            found = assert_problem(send(http, table(4)), 422)
            assert found["errors"][0]["code"] == "too_many_rows"
            found = assert_problem(send(http, table(3), num_images=2), 422)
            assert found["errors"][0]["code"] == "too_many_jobs"
    finally:
        process.kill()
        process.wait()


def test_a_dry_run_counts_jobs_and_problems_and_creates_nothing(http, made):
    before = made()
    response = send(http, table(10, {3, 4}), dry_run="true", num_images=2)

    assert response.status_code == 200, response.text
    found = response.json()
    assert found["counts"] == {"rows": 10, "accepted": 8, "rejected": 2, "total": 16}
    assert [(error["loc"][1], error["code"]) for error in found["errors"]] == [
        (3, "out_of_range"),
        (4, "out_of_range"),
    ]
    assert made() == before


def test_a_dry_run_of_a_sweep_counts_its_jobs(http):
    text = "prompt,steps\na {red|green} {cat|dog},4|8\n"
    dry = send(http, text, expand="product", dry_run="true").json()
    batch = send(http, text, expand="product").json()

    assert dry["counts"]["total"] == batch["counts"]["total"] == 8


def test_ten_files_at_once_are_each_accepted_once(http, made, label):
    def post(number):
        key = {"Idempotency-Key": f"{label}-{number}"}
        with httpx2.Client(base_url=http.base_url, timeout=120) as client:
            return [send(client, table(2000), CSV | key, label=label) for _ in range(2)]

    with ThreadPoolExecutor(10) as clients:
        answers = [answer for pair in clients.map(post, range(10)) for answer in pair]

    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [202] * 10
    assert made(label) == (10, 20_000)


def test_mixed_classes_of_two_files_at_once_do_not_lock_each_other_out(http, made, label):
    """Each reserves in both classes, in opposite order: one is rolled back and runs again."""

    def rows(first, second):
        return "prompt,priority\n" + f"a,{first}\n" * 5000 + f"a,{second}\n" * 100

    bodies = [rows("normal", "bulk"), rows("bulk", "normal")]
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda body: send(http, body, label=label), bodies))

    assert [answer.status_code for answer in answers] == [202] * 2, answers
    assert made(label) == (2, 10_200)
