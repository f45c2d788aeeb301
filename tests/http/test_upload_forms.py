"""Files of rows as multipart forms, well-formed and hostile."""

from http import HTTPStatus

import pytest

from tests.support.api_server import assert_problem
from tests.support.uploads import send


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
