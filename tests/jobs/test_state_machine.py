"""Stateful test of a job's life: the rows against a model in memory, for any order of actions.

Each rule runs one action in a transaction of its own and applies its effect to the model. After
every step all rows, events and batches are compared with the model.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT
from darkroom.errors import Deleted, JobNotFinished, NothingToRetry
from darkroom.jobs import deletion, lifecycle
from darkroom.queue import claims, dispatches
from darkroom.status import FINISHED
from tests.conftest import LEASE, LIMITS, new_job
from tests.support.expected_jobs import ExpectedBatch, ExpectedJob, outcome_of

MAX_ATTEMPTS = 3
MAX_MICROBATCH = LIMITS["darkroom-demo"]
WORKERS = ("one", "two", "three")
KINDS = ("succeeded", "failed", "requeued")


class JobLife(RuleBasedStateMachine):
    """Actions in any order; `known` holds the expected jobs."""

    sessions = None
    registry = None
    job = Bundle("job")
    batch = Bundle("batch")
    dispatch = Bundle("dispatch")

    @initialize()
    def begin(self):
        self.known: dict[str, ExpectedJob] = {}
        self.batches: dict[str, ExpectedBatch] = {}
        self.dispatched: dict[int, list[str]] = {}  #: jobs of each dispatch ever opened
        self.workers: dict[int, str] = {}
        self.open: set[int] = set()

    def act(self, action, *arguments, **named):
        with self.sessions.begin() as session:
            return action(session, *arguments, **named)

    # --- the client -----------------------------------------------------------------------------

    @rule(target=job, width=st.sampled_from([64, 128]), start=st.booleans(), end=st.booleans())
    def submit(self, width, start, end):
        made = [self.new_job(width, start=start, end=end)]
        [job_id] = self.act(lifecycle.submit, DEFAULT_TENANT, made)
        self.known[job_id] = ExpectedJob(job_id, width, None, start, end)
        return job_id

    @rule(
        target=batch,
        widths=st.lists(st.sampled_from([64, 128]), min_size=1, max_size=10),
        end=st.booleans(),
    )
    def submit_batch(self, widths, end):
        made = [
            self.new_job(width, end=end, row_number=row)
            for row, width in enumerate(widths, start=1)
        ]
        with self.sessions.begin() as session:
            batch = batches.create(session, DEFAULT_TENANT, total=len(made), label=None)
            ids = lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
        self.expect_batch(batch.id, zip(ids, widths, strict=True), end=end)
        return batch.id

    def new_job(self, width, *, start=False, end=False, **where):
        limits = {"start_within_s": 600 if start else None, "deadline_s": 600 if end else None}
        return new_job(self.registry, {"width": width, "height": 64} | limits, **where)

    def expect_batch(self, batch_id, made, *, end=False):
        batch = self.batches[batch_id] = ExpectedBatch(batch_id)
        for job_id, width in made:
            job = ExpectedJob(job_id, width, batch, has_start=False, has_deadline=end)
            self.known[job_id] = job
            batch.jobs.append(job)

    @rule(target=job, batch_id=batch, index=st.integers(0, 9))
    def pick_one_of(self, batch_id, index):
        members = self.batches[batch_id].jobs
        return members[index % len(members)].id

    @rule(job_id=job)
    def cancel(self, job_id):
        job = self.known[job_id]
        if job.deleted:
            with pytest.raises(Deleted):
                self.act(lifecycle.cancel, DEFAULT_TENANT, job_id)
            return
        self.act(lifecycle.cancel, DEFAULT_TENANT, job_id)
        if job.status == "queued":
            self.end(job, "canceled")
        elif job.status == "running":
            job.cancel_requested = True

    @rule(batch_id=batch)
    def cancel_batch(self, batch_id):
        batch = self.batches[batch_id]
        self.act(lifecycle.cancel_batch, DEFAULT_TENANT, batch_id)
        if batch.finished:
            return
        batch.canceled, batch.paused = True, False
        for job in batch.jobs:
            if job.status == "queued":
                self.end(job, "canceled")

    @rule(batch_id=batch)
    def pause(self, batch_id):
        self.act(lifecycle.pause_batch, DEFAULT_TENANT, batch_id)
        self.set_paused(self.batches[batch_id], paused=True)

    @rule(batch_id=batch)
    def resume(self, batch_id):
        self.act(lifecycle.resume_batch, DEFAULT_TENANT, batch_id)
        self.set_paused(self.batches[batch_id], paused=False)

    @staticmethod
    def set_paused(batch, *, paused):
        if not batch.finished and not batch.canceled:
            batch.paused = paused
        for job in batch.jobs:
            if job.status == "queued":
                job.paused = paused

    @rule(target=job, job_id=job)
    def retry(self, job_id):
        old = self.known[job_id]
        rejected = Deleted if old.deleted else None if old.status in FINISHED else JobNotFinished
        if rejected is None and old.status == "succeeded":
            rejected = NothingToRetry
        if rejected is not None:
            with pytest.raises(rejected):
                self.act(lifecycle.retry, DEFAULT_TENANT, job_id)
            return multiple()
        again = self.act(lifecycle.retry, DEFAULT_TENANT, job_id).id
        assert old.retried_as in {None, again}
        if old.retried_as is None:
            old.retried_as = again
            self.known[again] = ExpectedJob(
                again, old.width, None, has_start=False, has_deadline=False
            )
        return again

    @rule(job_id=job)
    def delete(self, job_id):
        job = self.known[job_id]
        rejected = Deleted if job.deleted else None if job.status in FINISHED else JobNotFinished
        if rejected is not None:
            with pytest.raises(rejected):
                self.act(deletion.delete, DEFAULT_TENANT, job_id)
            return
        self.act(deletion.delete, DEFAULT_TENANT, job_id)
        job.deleted = True

    # --- workers --------------------------------------------------------------------------------

    @rule(target=dispatch, worker=st.sampled_from(WORKERS))
    def claim(self, worker):
        taken = self.act(claims.claim, worker, max_microbatch=LIMITS, lease=LEASE)
        could = [job for job in self.known.values() if job.claimable]
        if not taken:
            assert could == []
            return multiple()
        [(width, isolation_group)] = {(job.width, job.isolation_group) for job in taken}
        batch = {
            job.id for job in could if (job.width, job.isolation_group) == (width, isolation_group)
        }
        assert {job.id for job in taken} <= batch
        assert len(taken) == min(MAX_MICROBATCH, len(batch))
        [dispatch_id] = {job.dispatch_id for job in taken}
        assert dispatch_id > max(self.dispatched, default=0)  # a fencing token only ever grows
        self.dispatched[dispatch_id] = [job.id for job in taken]
        self.workers[dispatch_id] = worker
        self.open.add(dispatch_id)
        for job in taken:
            known = self.known[job.id]
            known.status, known.dispatch = "running", dispatch_id
            known.attempt += 1
        return dispatch_id

    @rule(dispatch_ids=st.lists(dispatch, max_size=4))
    def renew(self, dispatch_ids):
        kept = self.act(dispatches.renew, dispatch_ids, lease=LEASE)

        assert kept == self.open & set(dispatch_ids)

    @rule(
        dispatch_id=dispatch,
        kinds=st.lists(st.sampled_from(KINDS), min_size=MAX_MICROBATCH, max_size=MAX_MICROBATCH),
    )
    def settle(self, dispatch_id, kinds):
        """Settle a dispatch, even one that was closed long ago."""
        kind_of = dict(zip(self.dispatched[dispatch_id], kinds, strict=False))
        outcomes = [outcome_of(job_id, dispatch_id, kind) for job_id, kind in kind_of.items()]
        moved = self.act(_settle_with_long_backoff, dispatch_id, outcomes)
        assert moved == (dispatch_id in self.open)
        for job in self.close(dispatch_id):
            match kind_of[job.id]:
                case "succeeded":
                    self.end(job, "succeeded")
                case "failed":
                    self.end(job, "failed")
                case _:
                    self.requeue(job, attempt=job.attempt - 1)
                    job.backing_off = True

    @rule(dispatch_id=dispatch)
    def crash(self, dispatch_id):
        moved = self.act(dispatches.crash, dispatch_id, max_attempts=MAX_ATTEMPTS)
        assert moved == (dispatch_id in self.open)
        self.suspect(dispatch_id)

    @rule(worker=st.sampled_from(WORKERS))
    def release(self, worker):
        mine = {each for each in self.open if self.workers[each] == worker}
        moved = self.act(dispatches.release, worker)
        assert moved == sum(len(self.dispatched[each]) for each in mine)
        for dispatch_id in mine:
            for job in self.close(dispatch_id):
                self.requeue(job, attempt=job.attempt - 1)

    # --- time -----------------------------------------------------------------------------------

    @rule(dispatch_ids=st.lists(dispatch, max_size=3))
    def leases_lapse(self, dispatch_ids):
        silent = self.open & set(dispatch_ids)
        past = "UPDATE dispatch SET leased_until = now() - interval '1 s' WHERE id = ANY(:ids)"
        with self.sessions.begin() as session:
            session.execute(text(past), {"ids": list(dispatch_ids)})
        assert self.act(dispatches.expire_leases, max_attempts=MAX_ATTEMPTS) == len(silent)
        for dispatch_id in sorted(silent):
            self.suspect(dispatch_id)

    @rule(job_id=job, reaped=st.booleans())
    def deadlines_pass(self, job_id, reaped):
        job = self.known[job_id]
        past = """UPDATE job SET
            expires_at = CASE WHEN expires_at IS NOT NULL THEN timestamptz '2000-01-01' END,
            deadline_at = CASE WHEN deadline_at IS NOT NULL THEN timestamptz '2000-01-01' END
            WHERE id = :id"""
        with self.sessions.begin() as session:
            session.execute(text(past), {"id": job_id})
        job.overdue = True
        if reaped:
            self.reap()

    def reap(self):
        self.act(lifecycle.expire_overdue)
        for job in self.known.values():
            if job.status == "queued" and job.expires and job.overdue:
                self.end(job, "expired")

    @precondition(lambda self: any(job.backing_off for job in self.known.values()))
    @rule()
    def backoffs_end(self):
        with self.sessions.begin() as session:
            session.execute(text("UPDATE job SET scheduled_at = now() - interval '1 s'"))
        for job in self.known.values():
            job.backing_off = False

    # --- effects --------------------------------------------------------------------------------

    def close(self, dispatch_id):
        """Close a dispatch; return its jobs that were not canceled, none if it was closed."""
        if dispatch_id not in self.open:
            return []
        self.open.discard(dispatch_id)
        running = [self.known[job_id] for job_id in self.dispatched[dispatch_id]]
        for job in running:
            if job.ends_as:
                self.end(job, job.ends_as)
        return sorted((job for job in running if job.status == "running"), key=lambda job: job.id)

    def suspect(self, dispatch_id):
        suspects = self.close(dispatch_id)
        for index, job in enumerate(suspects):
            half = "a" if index < (len(suspects) + 1) // 2 else "b"
            if job.attempt >= MAX_ATTEMPTS:
                self.end(job, "failed")
            else:
                job.isolation_group = f"{dispatch_id}{half}" if job.attempt == 1 else job.id
                self.requeue(job, attempt=job.attempt)

    @staticmethod
    def requeue(job, *, attempt):
        job.status, job.dispatch, job.attempt = "queued", None, attempt
        job.paused = job.batch is not None and job.batch.paused

    def end(self, job, status):
        assert job.status not in FINISHED
        job.status, job.paused = status, False
        job.ends += 1
        if job.batch is not None:
            job.batch.finished = all(each.status in FINISHED for each in job.batch.jobs)

    # --- invariants -----------------------------------------------------------------------------

    @invariant()
    def rows_are_as_known(self):
        with self.sessions.begin() as session:
            rows = session.execute(
                text("SELECT id, status, attempt, isolation_group, dispatch_id, paused FROM job")
            ).all()
        expected = [
            (job.id, job.status, job.attempt, job.isolation_group, job.dispatch, job.paused)
            for job in getattr(self, "known", {}).values()
        ]
        assert sorted(map(tuple, rows)) == sorted(expected)

    @invariant()
    def each_finished_job_has_one_event(self):
        query = """SELECT job_id, type FROM event
            WHERE job_id IS NOT NULL AND type <> 'job.started'"""
        with self.sessions.begin() as session:
            events = Counter(map(tuple, session.execute(text(query))))
        expected = Counter(
            {
                (job.id, f"job.{job.status}"): job.ends
                for job in getattr(self, "known", {}).values()
                if job.ends
            }
        )
        assert events == expected
        assert set(events.values()) <= {1}

    @invariant()
    def batches_finish_once_and_count_right(self):
        query = "SELECT batch_id, type FROM event WHERE job_id IS NULL"
        with self.sessions.begin() as session:
            events = sorted(map(tuple, session.execute(text(query))))
            found = [batches.find(session, DEFAULT_TENANT, each) for each in self.mine()]
            counted = batches.count(session, found)
        known = [self.batches[batch.id] for batch in found]
        assert events == sorted(
            (batch.id, "batch.canceled" if batch.canceled else "batch.completed")
            for batch in known
            if batch.finished
        )
        for row, counts, batch in zip(found, counted, known, strict=True):
            assert (row.finished_at is not None) == batch.finished
            assert counts.by_status == Counter(job.status for job in batch.jobs)

    def mine(self):
        return getattr(self, "batches", {})

    def teardown(self):
        with self.sessions.begin() as session:
            session.execute(text("TRUNCATE event, job, dispatch, batch, fair_share CASCADE"))


def _settle_with_long_backoff(session, dispatch_id, outcomes):
    """Settle, and prolong the backoff of 0.5 s or more, which could end on a busy machine."""
    moved = dispatches.settle(session, dispatch_id, outcomes)
    prolong = "UPDATE job SET scheduled_at = scheduled_at + interval '1 h'"
    session.execute(text(f"{prolong} WHERE scheduled_at > now()"))
    return moved


@pytest.fixture
def life(sessions, registry):
    """Returns the machine on an empty database that need not survive a power failure."""
    with sessions.begin() as session:
        name = session.scalar(text("SELECT current_database()"))
        session.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    sessions.kw["bind"].dispose()
    return type("JobLife", (JobLife,), {"sessions": sessions, "registry": registry})


@pytest.mark.timeout(600)  # 20 s on success; shrinking a failure takes longer
def test_each_job_finishes_once_whatever_the_order_of_actions(life):
    run_state_machine_as_test(
        life, settings=settings(max_examples=30, stateful_step_count=40, derandomize=True)
    )


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_each_job_finishes_once_in_long_runs(life):
    run_state_machine_as_test(life, settings=settings(max_examples=600, stateful_step_count=60))
