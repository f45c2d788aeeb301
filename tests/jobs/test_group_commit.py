"""Jobs that arrive together share a commit, and no more than that."""

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from darkroom.db.tables import DEFAULT_TENANT, Job
from darkroom.errors import Overloaded
from darkroom.jobs import group_commit
from darkroom.jobs.group_commit import GroupCommitter
from tests.conftest import new_job


@pytest.fixture
def door(sessions):
    opened = GroupCommitter(sessions)
    yield opened
    opened.close()


def submit(door, *submissions):
    """What became of each, all submitted at once."""

    async def together():
        waiting = [door.submit(DEFAULT_TENANT, one) for one in submissions]
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(together())


def test_jobs_that_arrive_together_are_committed_in_few_transactions(sessions, registry, door):
    accepted = submit(door, *[new_job(registry, {"seed": n}) for n in range(200)])
    with sessions.begin() as session:
        moments = session.scalar(select(func.count(Job.created_at.distinct())))
        stored = {job.id: job for job in session.scalars(select(Job))}

    assert moments < 20
    assert [job.seed for job in accepted] == list(range(200))
    assert {job.id for job in accepted} == stored.keys()
    for job in accepted:
        for name in Job.__mapper__.column_attrs.keys():  # noqa: SIM118  # no dict
            assert getattr(job, name) == getattr(stored[job.id], name), name


def test_one_that_the_database_refuses_does_not_fail_its_company(sessions, registry, door):
    good = new_job(registry, {})
    template = replace(good.template, columns={**good.template.columns, "width": 0})
    bad = good._replace(template=template)
    outcomes = submit(door, good, good, bad, good)

    assert [isinstance(outcome, Job) for outcome in outcomes] == [True, True, False, True]
    assert isinstance(outcomes[2], DBAPIError)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_without_a_database_all_who_wait_are_told(registry, door, postgres_server):
    postgres_server.kill()
    outcomes = submit(door, *[new_job(registry, {})] * 5)

    assert all(isinstance(outcome, DBAPIError) for outcome in outcomes)
    postgres_server.restart()
    assert isinstance(submit(door, new_job(registry, {}))[0], Job)


def test_more_than_can_wait_are_turned_away(registry, door, postgres_server):
    postgres_server.freeze()
    outcomes = submit_and_thaw(door, postgres_server, [new_job(registry, {})] * 6000)

    turned_away = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
    accepted = sum(isinstance(outcome, Job) for outcome in outcomes)
    assert turned_away >= 6000 - group_commit.MAX_PENDING - group_commit.MAX_GROUP
    assert turned_away + accepted == 6000


def submit_and_thaw(door, server, submissions):
    async def together():
        waiting = [asyncio.ensure_future(door.submit(DEFAULT_TENANT, one)) for one in submissions]
        await asyncio.sleep(0)
        server.thaw()
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(together())
