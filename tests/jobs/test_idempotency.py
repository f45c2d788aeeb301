"""A request that is sent twice is carried out once."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from darkroom import idempotency
from darkroom.db.connection import open_sessions
from darkroom.db.tables import DEFAULT_TENANT, IdempotencyKey, Job, Tenant
from darkroom.idempotency import RETENTION, IdempotencyKeyReused
from tests.support.api_server import CSV, assert_problem


@pytest.fixture
def key():
    return {"Idempotency-Key": uuid.uuid4().hex}


def test_a_thousand_posts_with_one_key_make_one_job(http, key, api_database):
    label = uuid.uuid4().hex
    body = {"prompt": "a red apple", "label": label}
    with ThreadPoolExecutor(50) as clients:
        answers = list(
            clients.map(lambda _: http.post("/v1/jobs", json=body, headers=key), range(1000))
        )

    assert {answer.content for answer in answers} == {answers[0].content}
    codes = [answer.status_code for answer in answers]
    assert (codes.count(202), codes.count(200)) == (1, 999)
    replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
    assert replayed.count("true") == 999
    sessions = open_sessions(api_database, pool_size=1)
    with sessions.begin() as session:
        made = session.scalar(select(func.count()).select_from(Job).where(Job.label == label))
    sessions.kw["bind"].dispose()
    assert made == 1


def test_the_same_key_with_another_body_is_rejected(http, key):
    assert http.post("/v1/jobs", json={"prompt": "a"}, headers=key).status_code == 202
    again = http.post("/v1/jobs", json={"prompt": "b"}, headers=key)

    assert_problem(again, 409, "idempotency_key_reused")


def test_a_rejected_request_does_not_use_up_its_key(http, key):
    assert http.post("/v1/jobs", json={"prompt": ""}, headers=key).status_code == 422
    assert http.post("/v1/jobs", json={"prompt": "a"}, headers=key).status_code == 202


def test_a_batch_is_created_once_too(http, key):
    first = http.post("/v1/batches", content="prompt\na\n", headers=CSV | key)
    again = http.post("/v1/batches", content="prompt\na\n", headers=CSV | key)
    other = http.post("/v1/batches", content="prompt\nb\n", headers=CSV | key)

    assert (first.status_code, again.status_code) == (202, 200)
    assert first.content == again.content
    assert_problem(other, 409, "idempotency_key_reused")


@pytest.mark.parametrize("invalid", ["", "a b", "x" * 256, "caf\u00e9"])
def test_an_invalid_key_is_rejected(http, invalid):
    headers = [(b"Idempotency-Key", invalid.encode("latin-1"))]
    assert_problem(http.post("/v1/jobs", json={"prompt": "a"}, headers=headers), 422)


def test_a_key_expires_after_a_day(sessions):
    def ask(request):
        with sessions.begin() as session:
            return idempotency.once(
                session, DEFAULT_TENANT, "key", request=request, act=request.decode
            )

    assert ask(b"first").body == "first"
    with pytest.raises(IdempotencyKeyReused):
        ask(b"second")
    with sessions.begin() as session:
        yesterday = func.now() - RETENTION - timedelta(seconds=1)
        session.execute(update(IdempotencyKey).values(created_at=yesterday))

    assert ask(b"second").body == "second"
    with sessions.begin() as session:
        session.execute(update(IdempotencyKey).values(created_at=yesterday))
        idempotency.delete_expired(session)
        assert session.scalar(select(func.count()).select_from(IdempotencyKey)) == 0


def test_a_request_that_did_not_commit_stores_no_response(sessions):
    def act():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), sessions.begin() as session:
        idempotency.once(session, DEFAULT_TENANT, "key", request=b"r", act=act)
    with sessions.begin() as session:
        answer = idempotency.once(session, DEFAULT_TENANT, "key", request=b"r", act=lambda: "done")
    assert not answer.replayed


def test_a_key_belongs_to_one_tenant(sessions):
    with sessions.begin() as session:
        session.add(Tenant(id="ten_other", name="other"))
    for tenant, said in ((DEFAULT_TENANT, "mine"), ("ten_other", "theirs")):
        with sessions.begin() as session:
            answer = idempotency.once(
                session, tenant, "key", request=said.encode(), act=lambda said=said: said
            )
        assert answer == idempotency.StoredResponse(said, replayed=False)
