"""Files of rows as clients send them: a real API, real servers, no worker."""

import csv
import gzip
import io
import json
import signal
import socket
import struct
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import httpx2
import psutil
import pytest
from sqlalchemy import func, select

from darkroom.db.connection import open_sessions
from darkroom.db.tables import Batch, Job
from tests.support.api_server import CSV, assert_problem, serve

NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def made(api_database):
    """How many batches there are of a label, and how many jobs in them."""
    sessions = open_sessions(api_database, pool_size=1)

    def count(label=None):
        of_label = Batch.label == label if label else Batch.id.is_not(None)
        with sessions.begin() as session:
            jobs = select(func.count()).select_from(Job).join(Batch, Job.batch_id == Batch.id)
            return (
                session.scalar(select(func.count()).select_from(Batch).where(of_label)),
                session.scalar(jobs.where(of_label)),
            )

    yield count
    sessions.kw["bind"].dispose()


@pytest.fixture
def numbers(api_database):
    """The row numbers of a batch's jobs, in order; twice what is there twice."""
    sessions = open_sessions(api_database, pool_size=1)

    def read(batch_id):
        rows = select(Job.row_number).where(Job.batch_id == batch_id).order_by(Job.row_number)
        with sessions.begin() as session:
            return session.scalars(rows).all()

    yield read
    sessions.kw["bind"].dispose()


@pytest.fixture
def label():
    return uuid.uuid4().hex


def send(http, content, headers=CSV, **params):
    return http.post("/v1/batches", content=content, headers=headers, params=params)


def table(count, bad=()):
    """A file of so many rows; those in `bad` ask for no steps."""
    rows = (f'"a red apple, {n}",{n},{0 if n in bad else 4}\n' for n in range(1, count + 1))
    return "prompt,seed,steps\n" + "".join(rows)


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_rows_come_in_every_form_alike(http):
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


def test_the_query_says_what_all_rows_have_in_common(http):
    batch = send(http, "prompt,steps\na,\nb,9\n", cfg="2.5", steps=5, priority="normal").json()
    jobs = http.get(batch["urls"]["jobs"]).json()["data"]

    assert [job["input"]["num_inference_steps"] for job in jobs] == [5, 9]
    assert {(job["input"]["guidance_scale"], job["input"]["priority"]) for job in jobs} == {
        (2.5, "normal")
    }


@pytest.mark.parametrize(
    "params", [{"stepz": "5"}, {"steps": "x"}, {"on_error": "ignore"}, {"expand": "all"}]
)
def test_a_parameter_that_means_nothing_is_refused(http, made, params):
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
def test_what_the_headers_say_of_a_file_must_fit(http, headers, status):
    response = send(http, "prompt\na\n", headers)
    assert response.status_code == status, response.text


def test_a_form_must_hold_one_file_and_nothing_else(http, made):
    before = made()
    file = ("a.csv", "prompt\na\n")
    for form in (
        {"files": [("file", file), ("file", file)]},
        {"files": {"other": file}},
        {"files": {"file": file}, "data": {"on_error": "skip"}},
        {"files": {f"file{n}": file for n in range(1000)}},
        {"files": {"file": file}, "data": {f"f{n}": "x" for n in range(1000)}},
    ):
        response = http.post("/v1/batches", **form)
        assert_problem(response, response.status_code, "malformed_form")
    assert made() == before


def part(disposition, headers=b""):
    head = b"--x\r\nContent-Disposition: form-data; " + disposition + b"\r\n" + headers
    return head + b"\r\nprompt\na\n\r\n"


FILE = b'name="file"; filename="a.csv"'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (part(FILE), 202),
        (part(b'name="file"; filename="../../x.csv"'), 202),
        (part(b'name="file"; filename="a%0d%0aSet-Cookie: x.csv"'), 202),
        (part('name="file"; filename="ä.csv"'.encode()), 202),
        (part(b'name="file"; filename="\xe9\0.csv"'), 202),
        (part(b'name="file"; filename="a\r\nSet-Cookie: x\r\n.csv"'), 400),
        (part(b'name="file"; filename="' + b"a" * 100_000 + b'.csv"'), 400),
        (part(FILE, b"X: y\r\n" * 10_000), 400),
        (part(FILE, b"X: " + b"y" * 1_000_000 + b"\r\n"), 400),
        (part(FILE) * 2, 400),
        (b"".join(part(b'name="f%d"; filename="a"' % n) for n in range(10_000)), 400),
        (b"".join(part(b'name="f%d"' % n) for n in range(10_000)), 400),
        (part(b'name="file"'), 422),
        (part(b'name="other"; filename="a.csv"'), 422),
    ],
)
@pytest.mark.parametrize("charset", ["", "; charset=hex"])
def test_a_hostile_form_gets_its_answer_and_creates_nothing(http, made, body, status, charset):
    batches, jobs = made()
    kind = {"Content-Type": f"multipart/form-data; boundary=x{charset}"}
    response = send(http, body + b"--x--\r\n", kind)

    assert response.status_code == status, response.text
    assert "set-cookie" not in response.headers
    made_now = status == HTTPStatus.ACCEPTED
    assert made() == (batches + made_now, jobs + made_now)


def test_a_form_that_breaks_off_is_refused(http, made):
    before = made()
    for body in (part(FILE), part(FILE)[:-8], part(FILE)[:30], b""):
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        response = send(http, body, kind)
        assert_problem(response, response.status_code, "malformed_form")
    assert made() == before


def test_of_a_hundred_thousand_and_one_rows_none_is_taken(http, made):
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


def test_every_bad_row_is_told_and_one_is_enough_to_create_nothing(http, made):
    before = made()
    bad = set(range(7, 6000, 3))
    found = assert_problem(send(http, table(6000, bad)), 422, "invalid_input")

    assert [error["loc"][1] for error in found["errors"]] == sorted(bad)
    assert found["error_count"] == len(bad)
    assert made() == before


def test_of_very_many_bad_rows_the_first_are_told_and_all_are_counted(http):
    found = assert_problem(send(http, table(12_000, range(12_001))), 422)

    assert (len(found["errors"]), found["error_count"]) == (10_000, 12_000)
    assert "11,999 more" in found["detail"]


def test_a_dry_run_says_what_would_be_and_creates_nothing(http, made):
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


def test_a_sweep_says_first_how_many_jobs_it_makes(http):
    text = "prompt,steps\na {red|green} {cat|dog},4|8\n"
    dry = send(http, text, expand="product", dry_run="true").json()
    batch = send(http, text, expand="product").json()

    assert dry["counts"]["total"] == batch["counts"]["total"] == 8


def test_bad_rows_are_skipped_kept_mended_and_sent_again(http):
    header, rows = "prompt;cfg;negative", ["=SUM(1);4;", '\'-x;99;"a\nb"', "-;x;", "a;1;", "\0;1;c"]
    text = "\n".join([header, *rows, "too;4;many;cells", "few", ""])
    batch = send(http, text, on_error="skip").json()

    assert (batch["counts"]["total"], batch["counts"]["rejected"]) == (2, 5)
    response = http.get(batch["urls"]["errors"])
    assert response.headers["content-type"].startswith("text/csv")
    found = read_csv(response.text)
    assert [row["row_number"] for row in found] == ["2", "3", "5", "6", "7"]
    assert [row["error_column"] for row in found] == [
        "guidance_scale", "guidance_scale", "prompt", "", ""
    ]  # fmt: skip
    assert [row["prompt"] for row in found] == ["''-x", "'-", "'\0", "too", "few"]
    assert found[0]["negative"] == "a\nb"
    assert found[3]["negative"] == "many,cells"

    mended = response.text.replace("99", "9").replace(",x,", ",1,").replace("\0", "zero")
    again = send(http, mended, on_error="skip").json()
    assert (again["counts"]["total"], again["counts"]["rejected"]) == (5, 0)
    jobs = http.get(again["urls"]["jobs"]).json()["data"]
    assert [job["input"]["prompt"] for job in jobs[:2]] == ["'-x", "-"]


def test_of_many_rows_exactly_the_bad_ones_come_back_and_go_in_when_mended(http):
    bad = set(range(50, 10_001, 100))
    batch = send(http, table(10_000, bad), on_error="skip").json()

    assert (batch["counts"]["queued"], batch["counts"]["rejected"]) == (9900, 100)
    text = http.get(batch["urls"]["errors"]).text
    found = read_csv(text)
    assert [int(row["row_number"]) for row in found] == sorted(bad)
    mended = io.StringIO(newline="")
    writer = csv.DictWriter(mended, list(found[0]))
    writer.writeheader()
    writer.writerows(row | {"steps": "4"} for row in found)
    again = send(http, mended.getvalue()).json()
    assert (again["counts"]["queued"], again["counts"]["rejected"]) == (100, 0)


def test_bad_lines_of_json_are_given_back_as_they_came(http):
    text = '{"prompt": "a"}\n{"prompt": "b", "seed": -1}\n{oops\n'
    batch = send(http, text, NDJSON, on_error="skip").json()
    found = read_csv(http.get(batch["urls"]["errors"]).text)

    assert [row["record"] for row in found] == ['{"prompt": "b", "seed": -1}', "{oops"]
    assert [row["row_number"] for row in found] == ["2", "3"]


def test_a_batch_without_bad_rows_has_no_errors(http):
    batch = send(http, table(1), on_error="skip").json()
    response = http.get(batch["urls"]["errors"])

    assert (response.status_code, response.text) == (200, "")
    assert_problem(http.get("/v1/batches/bat_" + "0" * 32 + "/errors.csv"), 404)


def test_when_all_rows_are_bad_nothing_is_created_even_if_they_are_to_be_skipped(http, made):
    before = made()
    found = assert_problem(send(http, table(3, {1, 2, 3}), on_error="skip"), 422)

    assert len(found["errors"]) == 3
    assert made() == before


def test_ten_files_at_once_are_each_taken_once(http, made, label):
    def post(number):
        key = {"Idempotency-Key": f"{label}-{number}"}
        with httpx2.Client(base_url=http.base_url, timeout=120) as client:
            return [send(client, table(2000), CSV | key, label=label) for _ in range(2)]

    with ThreadPoolExecutor(10) as clients:
        answers = [answer for pair in clients.map(post, range(10)) for answer in pair]

    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [202] * 10
    assert made(label) == (10, 20_000)


def test_mixed_classes_of_two_files_at_once_do_not_lock_each_other_out(http, made, label):
    """Each takes places in both classes, in opposite order: one is broken off and done again."""

    def rows(first, second):
        return "prompt,priority\n" + f"a,{first}\n" * 5000 + f"a,{second}\n" * 100

    bodies = [rows("normal", "bulk"), rows("bulk", "normal")]
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda body: send(http, body, label=label), bodies))

    assert [answer.status_code for answer in answers] == [202] * 2, answers
    assert made(label) == (2, 10_200)


@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_stops_half_way_leaves_nothing_behind(http, api_url, made, form, reset):
    before = made()
    body = table(50_000).encode()
    kind = "text/csv"
    if form:
        part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
        body, kind = part + body + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"
    address = httpx2.URL(api_url)
    head = (
        f"POST /v1/batches HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(head.encode() + body[: len(body) // 2])
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert send(http, table(1)).status_code == 202
    batches, jobs = before
    assert made() == (batches + 1, jobs + 1)


def test_an_api_killed_in_mid_import_has_taken_nothing_and_then_each_valid_row_once(
    http, api_environment, made, numbers, tmp_path, label
):
    count, bad = 12_000, set(range(50, 12_001, 100))
    key = {"Idempotency-Key": label}
    fault = {"DARKROOM_FAULT_POINT": "in-import:2"}
    process, url = serve(api_environment | fault, tmp_path / "log")
    with (
        httpx2.Client(base_url=url, timeout=120) as client,
        pytest.raises(httpx2.TransportError),
    ):
        send(client, table(count, bad), CSV | key, label=label, on_error="skip")
    assert process.wait(10) == -signal.SIGKILL
    assert made(label) == (0, 0)

    for expected in (202, 200):
        answer = send(http, table(count, bad), CSV | key, label=label, on_error="skip")
        assert answer.status_code == expected, answer.text
    rejected = read_csv(http.get(answer.json()["urls"]["errors"]).text)
    assert numbers(answer.json()["id"]) == sorted(set(range(1, count + 1)) - bad)
    assert [int(row["row_number"]) for row in rejected] == sorted(bad)


@pytest.mark.parametrize(
    ("point", "expected"), [("before-submit-commit", 0), ("after-submit-commit", 1)]
)
def test_an_api_that_dies_around_its_commit_answers_the_same_key_once(
    api_environment, made, tmp_path, label, point, expected
):
    key = {"Idempotency-Key": label}
    process, url = serve(api_environment | {"DARKROOM_FAULT_POINT": point}, tmp_path / "log")
    with httpx2.Client(base_url=url) as client, pytest.raises(httpx2.TransportError):
        send(client, table(100), CSV | key, label=label)
    assert process.wait(10) == -signal.SIGKILL
    assert made(label) == (expected, expected * 100)


def test_a_large_file_takes_little_memory(http, api_url):
    port = httpx2.URL(api_url).port
    [server] = [
        process
        for process in psutil.Process().children()
        if any(held.laddr.port == port for held in process.net_connections("tcp4") if held.laddr)
        and "api" in process.cmdline()
    ]
    before = peak = server.memory_info().rss
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, server.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    response = send(http, table(30_000, range(2, 15_000)), on_error="skip")
    done.set()
    watcher.join()

    assert response.status_code == 202, response.text
    assert peak - before < 100 * 2**20
