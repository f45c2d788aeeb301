"""Jobs that arrive together share a commit and nothing else."""

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
def committer(sessions):
    opened = GroupCommitter(sessions)
    yield opened
    opened.close()


def submit(committer, *new_jobs):
    """Submit all at once; return the job or the error of each."""

    async def together():
        waiting = [committer.submit(DEFAULT_TENANT, one) for one in new_jobs]
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(together())


def test_jobs_that_arrive_together_are_committed_in_few_transactions(sessions, registry, committer):
    accepted = submit(committer, *[new_job(registry, {"seed": n}) for n in range(200)])
    with sessions.begin() as session:
        moments = session.scalar(select(func.count(Job.created_at.distinct())))
        stored = {job.id: job for job in session.scalars(select(Job))}

    assert moments < 20
    assert [job.seed for job in accepted] == list(range(200))
    assert {job.id for job in accepted} == stored.keys()
    for job in accepted:
        for name in Job.__mapper__.column_attrs.keys():  # noqa: SIM118  # no dict
            assert getattr(job, name) == getattr(stored[job.id], name), name


def test_a_job_that_the_database_rejects_does_not_fail_its_group(sessions, registry, committer):
    good = new_job(registry, {})
    template = replace(good.template, columns={**good.template.columns, "width": 0})
    bad = good._replace(template=template)
    outcomes = submit(committer, good, good, bad, good)

    assert [isinstance(outcome, Job) for outcome in outcomes] == [True, True, False, True]
    assert isinstance(outcomes[2], DBAPIError)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_without_a_database_all_pending_requests_fail(registry, committer, postgres_server):
    postgres_server.kill()
    outcomes = submit(committer, *[new_job(registry, {})] * 5)

    assert all(isinstance(outcome, DBAPIError) for outcome in outcomes)
    postgres_server.restart()
    assert isinstance(submit(committer, new_job(registry, {}))[0], Job)


def test_requests_over_the_limit_are_rejected(registry, committer, postgres_server):
    postgres_server.freeze()
    outcomes = submit_and_thaw(committer, postgres_server, [new_job(registry, {})] * 6000)

    rejected = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
    accepted = sum(isinstance(outcome, Job) for outcome in outcomes)
    assert rejected >= 6000 - group_commit.MAX_PENDING - group_commit.MAX_GROUP
    assert rejected + accepted == 6000


def submit_and_thaw(committer, server, new_jobs):
    async def together():
        submissions = [committer.submit(DEFAULT_TENANT, one) for one in new_jobs]
        tasks = [asyncio.ensure_future(submission) for submission in submissions]
        await asyncio.sleep(0)
        server.thaw()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(together())
