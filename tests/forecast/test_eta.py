"""How long a job will take: measured, reckoned, and compared with what happens."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, text, update

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT, Dispatch, Job
from darkroom.forecast import queue_position, snapshot, throughput
from darkroom.forecast.eta import EtaModel, EtaRequest
from darkroom.forecast.queue_position import QueuedJob, TailBucket, TenantShare
from darkroom.forecast.throughput import DispatchSpan
from darkroom.jobs import lifecycle
from darkroom.queue import claims, control, dispatches
from darkroom.queue.outcomes import Failed
from darkroom.status import Priority
from tests.conftest import LEASE, LIMITS, new_job, plan_of

KEY = "darkroom-demo@1/64x64/float32"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}


def span(began, ended, *, cost=8.0, size=8, drawn=True):
    return DispatchSpan("darkroom-demo", size, cost, began, ended, drawn)


def steady(number=40, *, each_s=2.0):
    """One replica without a pause, two dispatches in flight: each lasts twice what it takes."""
    ends = [-each_s * place for place in range(number)]
    return throughput.throughput_of([span(end - 2 * each_s, end) for end in ends], [])


@given(st.lists(st.tuples(st.floats(-1000, 0), st.floats(0.001, 100)), min_size=1, max_size=30))
def test_shares_add_up_to_the_time_in_which_anything_was_drawn(given):
    spans = [span(began, began + lasted) for began, lasted in given]
    edges = sorted({edge for each in spans for edge in (each.began, each.ended)})
    busy = sum(
        after - before
        for before, after in pairwise(edges)
        if any(each.began <= before and each.ended >= after for each in spans)
    )

    assert sum(throughput.shares(spans)) == pytest.approx(busy, rel=1e-6, abs=1e-6)


def test_what_is_drawn_side_by_side_counts_once():
    known = steady(each_s=2.0)

    assert known.microbatch_s == pytest.approx(2.0, rel=0.05)
    assert known.company == pytest.approx(2.0, rel=0.05)
    assert known.of("darkroom-demo").seconds(8.0) == pytest.approx(2.0, rel=0.05)


def test_a_rate_tells_what_a_microbatch_takes_from_what_its_cost_does():
    ends = [(-3.0 * place, cost) for place, cost in enumerate([4.0, 8.0, 16.0, 32.0] * 10)]
    fit = throughput.fit([(span(end - 1, end, cost=cost), 0.5 + 0.1 * cost) for end, cost in ends])

    assert fit.per_microbatch_s == pytest.approx(0.5)
    assert fit.per_cost_s == pytest.approx(0.1)
    assert fit.relative_stddev < 0.1


def test_without_anything_drawn_no_rate_is_known():
    assert throughput.throughput_of([], []) is None
    assert throughput.throughput_of([span(-3, -1, drawn=False)], [span(-1, 0)]) is None


def queue_of(number, *, behind=(), tenancies=(), pace_=None, priority=1, key=KEY):
    front = [QueuedJob(priority, float(n), f"job_{n:05}", key, 1.0) for n in range(number)]
    return EtaModel(front, behind, tenancies, pace_ or steady(), seats=LIMITS)


def last_of(queue_length, **fields):
    subject = EtaRequest("ten_a", 1, queue_length - 1.0, f"job_{queue_length - 1:05}", KEY, 1.0)
    return subject._replace(**fields)


def test_a_job_waits_for_the_microbatches_ahead_of_its_own():
    waits = [queue_of(80).ask(last_of(place + 1)) for place in range(80)]

    assert [each.position for each in waits] == list(range(1, 81))
    begins = [each.begins_s for each in waits]
    assert begins[:8] == [0.0] * 8
    assert begins[79] == pytest.approx(9 * 2.0, rel=0.1)
    assert begins == sorted(begins)
    for each in waits:
        assert each.eta.p50_s < each.eta.p90_s


def test_what_stands_behind_the_front_counts_as_what_stands_in_it():
    known = queue_of(800).ask(last_of(800))
    behind = [TailBucket(1, KEY, 400.0 + 40 * n, 440.0 + 40 * n, 40, 40.0) for n in range(10)]
    summed = queue_of(400, behind=behind).ask(last_of(800))

    assert summed.position == pytest.approx(known.position, rel=0.02)
    assert summed.eta.p50_s == pytest.approx(known.eta.p50_s, rel=0.05)


def test_who_submits_more_important_jobs_delays_the_others():
    busy = [TenantShare("ten_b", 0, 0.0, 1.0, cost_per_s=2.0, squares_per_s=2.0)]
    alone = queue_of(80).ask(last_of(80))
    beside = queue_of(80, tenancies=busy).ask(last_of(80))

    assert beside.begins_s == pytest.approx(2 * alone.begins_s, rel=0.1)  # half of 4 a second
    assert beside.eta.p90_s / beside.eta.p50_s > alone.eta.p90_s / alone.eta.p50_s


def test_nobody_is_overtaken_by_those_who_have_used_up_their_share():
    far = [TenantShare("ten_b", 1, 1e6, 1.0, cost_per_s=3.0, squares_per_s=3.0)]
    near = [TenantShare("ten_b", 1, 0.0, 1.0, cost_per_s=3.0, squares_per_s=3.0)]
    alone = queue_of(80).ask(last_of(80)).begins_s

    assert queue_of(80, tenancies=far).ask(last_of(80)).begins_s == pytest.approx(alone)
    assert queue_of(80, tenancies=near).ask(last_of(80)).begins_s > 1.5 * alone


def test_a_class_that_is_never_free_still_gets_its_turns():
    flooded = [TenantShare("ten_b", 0, 0.0, 1.0, cost_per_s=100.0, squares_per_s=100.0)]
    queue = queue_of(16, priority=2, tenancies=flooded)
    waits = queue.ask(last_of(16, priority=2))

    assert 60 < waits.begins_s < 90  # one microbatch ahead, and bulk's turn comes each 60 s


def draw_some(sessions, number=6):
    """So many microbatches, each with 2 s on its clock, one after the other."""
    for _ in range(number):
        with sessions.begin() as session:
            taken = claims.claim(session, "w", max_microbatch=LIMITS, lease=LEASE)
            ends = [Failed(job.id, "x", "y") for job in taken]
            dispatches.settle(session, taken[0].dispatch_id, ends)
    with sessions.begin() as session:
        session.execute(
            update(Dispatch).values(
                created_at=func.now() - text("(id + 1) * interval '2 s'"),
                finished_at=func.now() - text("id * interval '2 s'"),
            )
        )


def test_the_queue_of_the_database_is_the_one_that_is_asked(sessions, registry, queue_jobs):
    queue_jobs(*[SMALL] * 100)
    with sessions.begin() as session:
        waiting = session.get_one(Job, session.scalar(text("SELECT max(id) FROM job")))
        before = snapshot.take_snapshot(session, registry).ask(waiting)
    draw_some(sessions)
    with sessions.begin() as session:
        look = snapshot.take_snapshot(session, registry)
        after = look.ask(waiting)
        assert queue_position.position(session, waiting) == after.position

    assert (before.position, before.eta) == (100, None)
    assert after.position == 52
    assert after.begins_s == pytest.approx(6 * 2.0, rel=0.1)
    assert [(depth.model, depth.jobs) for depth in look.scan.depths] == [("darkroom-demo", 52)]


def test_a_batch_is_done_when_its_last_job_is(sessions, registry, queue_jobs):
    queue_jobs(*[SMALL] * 60)
    draw_some(sessions)
    with sessions.begin() as session:
        batch = batches.create(session, DEFAULT_TENANT, total=40)
        made = [new_job(registry, SMALL, row_number=row) for row in range(1, 41)]
        ids = lifecycle.submit(session, DEFAULT_TENANT, made, batch_id=batch.id)
        look = snapshot.take_snapshot(session, registry)
        eta = look.of_batch(session, batch, waiting=True)
        assert eta == look.ask(session.get_one(Job, ids[-1])).eta
        more = look.of_more(DEFAULT_TENANT, Priority.BULK, 40.0)
        assert more.p50_s > eta.p50_s
        control.pause(session)
        paused = snapshot.take_snapshot(session, registry)
        assert paused.of_batch(session, batch, waiting=True) is None


def test_a_look_reads_its_index_and_no_more_however_long_the_queue_is(sessions, queue_jobs):
    [first] = queue_jobs(SMALL | {"priority": "bulk"})
    changed = {"id", "start_tag"}
    columns = ", ".join(c.name for c in Job.__table__.columns if c.name not in changed)
    with sessions.begin() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(
            text(
                f"INSERT INTO job (id, start_tag, {columns}) SELECT 'job_' || md5(n::text), n, "
                f"{columns} FROM job, generate_series(1, 20000) n WHERE id = :first"
            ),
            {"first": first},
        )
        session.execute(text("ANALYZE job"))
        near = session.scalars(text("SELECT id FROM job ORDER BY start_tag LIMIT 1 OFFSET 700"))
        job = session.get_one(Job, near.one())
        assert queue_position.position(session, job) == 701
        far = session.get_one(Job, session.scalar(text("SELECT id FROM job WHERE start_tag = 9e3")))
        assert queue_position.position(session, far) is None  # it does not count that far
        ahead = queue_position.ahead_of(job)
        for plan in (
            plan_of(session, queue_position.queue_front_of(2)),
            plan_of(session, ahead[-1]),
        ):
            assert "job_next" in plan, plan
            assert "Seq Scan" not in plan, plan
            assert "Sort" not in plan, plan


@pytest.mark.timeout(300)
def test_half_of_the_forecasts_of_a_simulated_time_are_within_thirty_percent(
    empty_database_url, registry
):
    from benchmarks import eta_accuracy as eta

    done = eta.simulate(empty_database_url, registry, seed=3, replicas=1, minutes=2, warm_up_s=90)
    score = eta.scores(done)["all"]

    assert score.number > 10
    assert score.median_error < 0.3
    assert score.within_p90 > 0.6
