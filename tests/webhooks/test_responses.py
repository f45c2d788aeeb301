"""Classification of responses, and `Retry-After`."""

import pytest

from workers.webhooks.transport import classify_response


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "http_2xx"),
        (202, "http_2xx"),
        (204, "http_2xx"),
        (301, "http_3xx"),
        (304, "http_3xx"),
        (400, "http_4xx"),
        (404, "http_4xx"),
        (410, "http_410"),
        (429, "http_4xx"),
        (500, "http_5xx"),
        (101, "invalid_response"),
        (799, "invalid_response"),
    ],
)
def test_only_2xx_is_success(status, outcome):
    assert classify_response(status, {}).outcome == outcome


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("1e9", None),
        ("9" * 400, None),
        ("\u0663", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_or_nothing(text, seconds):
    headers = {b"Retry-After": text.encode("utf-8")}

    assert classify_response(503, headers).retry_after_s == seconds


@pytest.mark.parametrize(("status", "overloaded"), [(429, True), (503, True), (500, False)])
def test_429_and_503_mean_the_whole_destination(status, overloaded):
    assert classify_response(status, {}).overloaded is overloaded


def test_retry_after_may_be_a_date():
    headers = {b"retry-after": b"Fri, 31 Dec 2100 23:59:59 GMT"}

    assert classify_response(429, headers).retry_after_s > 10**9
