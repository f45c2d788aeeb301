"""The API while Redis or PostgreSQL is down or frozen."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.api_server import assert_problem


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
