"""Clients and API processes that die in the middle of an upload, and its memory."""

import signal
import socket
import struct
import threading

import httpx2
import psutil
import pytest
from sqlalchemy import select

from darkroom.db.tables import Job
from tests.support.api_server import CSV, serve
from tests.support.uploads import read_csv, send, table


@pytest.fixture
def row_numbers(sessions):
    """The row numbers of a batch's jobs, in order; twice what is there twice."""

    def read(batch_id):
        rows = select(Job.row_number).where(Job.batch_id == batch_id).order_by(Job.row_number)
        with sessions.begin() as session:
            return session.scalars(rows).all()

    return read


@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_disconnects_in_mid_upload_creates_nothing(http, api_url, made, form, reset):
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


def test_an_api_killed_in_mid_import_has_created_nothing_and_then_each_valid_row_once(
    http, api_environment, made, row_numbers, tmp_path, label
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
    assert row_numbers(answer.json()["id"]) == sorted(set(range(1, count + 1)) - bad)
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


def test_a_large_file_takes_little_memory(http, api):
    server = psutil.Process(api.process.pid)
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
