"""Events in commit order, on real rows, with two transactions at once."""

import threading
import time

import pytest
from sqlalchemy import select, text

from darkroom import batches
from darkroom.db.tables import DEFAULT_TENANT, Event
from darkroom.events import feed
from darkroom.events import log as event_log
from darkroom.events.feed import BEGINNING, PAGE, EventCursor, EventScope
from darkroom.ids import is_id
from darkroom.jobs import lifecycle
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Failed, Succeeded
from tests.conftest import new_job

SOON_S = 20


@pytest.fixture
def batch_of(sessions, registry):
    """Queues a batch of `total` jobs and returns its id."""

    def make(total):
        with sessions.begin() as session:
            batch = batches.create(session, DEFAULT_TENANT, total=total, label=None)
            rows = [new_job(registry, {}, row_number=row + 1) for row in range(total)]
            lifecycle.submit(session, DEFAULT_TENANT, rows, batch_id=batch.id)
        return batch.id

    return make


def succeeded(job):
    return Succeeded(job.id, f"a/{job.id}.png", "0" * 64, 10, inference_ms=5, upload_ms=1)


def settle(sessions, taken):
    with sessions.begin() as session:
        dispatches.settle(session, taken[0].dispatch_id, [succeeded(job) for job in taken])


def subject(subject_id, tenant_id=DEFAULT_TENANT):
    return EventScope(tenant_id, subject_id)


def events_after(sessions, *cursors):
    with sessions.begin() as session:
        return feed.events_after(session, cursors)


def events_of(sessions, subject_id, after=0):
    cursor = EventCursor(subject(subject_id), after)
    return events_after(sessions, cursor).get(cursor, [])


def blocked(sessions):
    """Return how many transactions wait for a lock."""
    with sessions.begin() as session:
        return session.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )


def wait_until(condition):
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_has_events_for_its_start_and_its_end(sessions, queue_jobs, claim):
    queue_jobs({}, {})
    good, bad = claim()
    with sessions.begin() as session:
        outcomes = [succeeded(good), Failed(bad.id, "invalid_output", "no image", retryable=True)]
        dispatches.settle(session, good.dispatch_id, outcomes)

    assert [event.type for event in events_of(sessions, good.id)] == [
        "job.started",
        "job.succeeded",
    ]
    started, failed = events_of(sessions, bad.id)
    assert (failed.error_code, failed.error_message) == ("invalid_output", "no image")
    assert (started.ends(subject(bad.id)), failed.ends(subject(bad.id))) == (False, True)


def test_a_batch_has_the_events_of_its_jobs_and_last_its_own(sessions, batch_of, claim):
    batch_id = batch_of(3)
    settle(sessions, claim())

    found = events_of(sessions, batch_id)
    assert [event.type for event in found] == [
        *["job.started"] * 3,
        *["job.succeeded"] * 3,
        "batch.completed",
    ]
    assert [event.sequence for event in found] == sorted(event.sequence for event in found)
    assert [event.row_number for event in found[:3]] == [1, 2, 3]
    assert [event.ends(subject(batch_id)) for event in found] == [False] * 6 + [True]


def test_reading_continues_at_a_cursor(sessions, batch_of, claim):
    batch_id = batch_of(4)
    claim()
    found = events_of(sessions, batch_id)

    for number, event in enumerate(found, start=1):
        assert events_of(sessions, batch_id, after=event.sequence) == found[number:]


def test_each_cursor_is_read_separately_up_to_a_page(sessions, batch_of, claim):
    first, second = batch_of(2), batch_of(2)
    claim()
    with sessions.begin() as session:
        copies = select(Event.tenant_id, Event.type, Event.job_id, Event.batch_id).where(
            Event.batch_id == first
        )
        for _ in range(PAGE // 2):
            columns = [Event.tenant_id, Event.type, Event.job_id, Event.batch_id]
            session.execute(Event.__table__.insert().from_select(columns, copies.limit(2)))
    start, other = EventCursor(subject(first), 0), EventCursor(subject(second), 0)
    page = events_after(sessions, start)[start]
    half = EventCursor(subject(first), page[PAGE // 2 - 1].sequence)

    assert len(page) == PAGE
    both = events_after(sessions, start, half, other, EventCursor(subject("job_" + "0" * 32), 0))
    assert both[start] == page
    assert both[half][: PAGE // 2] == page[PAGE // 2 :]
    assert len(both[other]) == 2
    assert len(both) == 3


def test_another_tenant_reads_nothing(sessions, batch_of, claim):
    batch_id = batch_of(1)
    [job] = claim()

    for subject_id in (batch_id, job.id):
        assert events_of(sessions, subject_id)
        foreign = EventCursor(subject(subject_id, "ten_other"), 0)
        assert events_after(sessions, foreign) == {}
        with sessions.begin() as session:
            assert feed.latest(session, foreign.subject) == (foreign, BEGINNING)


def test_events_of_a_batch_are_numbered_in_commit_order(sessions, batch_of, claim):
    """Otherwise a reader could see the larger number, and later a smaller one appear."""
    batch_id = batch_of(16)
    one = claim("one")
    before = events_of(sessions, batch_id)[-1].sequence
    other = threading.Thread(target=claim, args=["two"])
    with sessions.begin() as session:
        event_log.record_jobs(session, one)
        other.start()
        wait_until(lambda: blocked(sessions) == 1)
        assert events_of(sessions, batch_id, after=before) == []
    other.join(SOON_S)

    ids = [event.job_id for event in events_of(sessions, batch_id, after=before)]
    assert set(ids[:8]) == {job.id for job in one}
    assert not set(ids[8:]) & set(ids[:8])
    assert len(ids) == 16


def test_an_event_that_becomes_visible_late_is_still_read(sessions, batch_of, claim):
    """Numbers of two batches overtake each other, so one cursor for the table would miss some."""
    first, second = batch_of(8), batch_of(8)
    one, two = claim("one"), claim("two")
    cursors = [
        EventCursor(subject(batch_id), events_of(sessions, batch_id)[-1].sequence)
        for batch_id in (first, second)
    ]
    with sessions.begin() as slow:
        dispatches.settle(slow, one[0].dispatch_id, [succeeded(job) for job in one])
        settle(sessions, two)  # does not wait: it is another batch
        early = events_after(sessions, *cursors)
    late = events_after(sessions, *cursors)

    assert list(early) == [cursors[1]]
    assert late[cursors[1]] == early[cursors[1]]
    assert late[cursors[0]][-1].sequence < early[cursors[1]][0].sequence
    assert len(late[cursors[0]]) == 9


def test_a_changed_scope_is_seen_although_newer_events_were_visible_before(
    sessions, batch_of, claim
):
    first, second = batch_of(8), batch_of(8)
    one = claim("one")
    with sessions.begin() as slow:
        dispatches.settle(slow, one[0].dispatch_id, [succeeded(job) for job in one])
        two = claim("two")
        with sessions.begin() as session:
            newest, early = feed.changed_scopes(session, 0)
    with sessions.begin() as session:
        last, late = feed.changed_scopes(session, newest)

    assert early == {first, second, *(job.id for job in one), *(job.id for job in two)}
    assert (last, late) == (newest, early)


def test_the_events_of_a_concurrent_cancel_come_afterwards(sessions, batch_of, claim):
    batch_id = batch_of(17)

    def cancel():
        with sessions.begin() as session:
            lifecycle.cancel_batch(session, DEFAULT_TENANT, batch_id)

    one = claim("one")
    other = threading.Thread(target=cancel)
    with sessions.begin() as session:
        event_log.record_jobs(session, one)
        other.start()
        wait_until(lambda: blocked(sessions) == 1)
    other.join(SOON_S)
    settle(sessions, one)

    types = [event.type for event in events_of(sessions, batch_id)]
    assert types == [
        *["job.started"] * 16,
        *["job.canceled"] * 17,
        "batch.canceled",
    ]


def test_reading_many_cursors_is_one_index_descent_for_each(sessions, batch_of, claim):
    batch_of(8)
    claim()
    with sessions.begin() as session:
        session.execute(
            text(
                "INSERT INTO event (tenant_id, type, job_id, batch_id) "
                "SELECT tenant_id, type, job_id, batch_id FROM event, generate_series(1, 1000)"
            )
        )
        session.execute(text("ANALYZE event"))
        cursors = [EventCursor(subject(f"job_{number:032x}"), 0) for number in range(3000)]
        compiled = feed._events_query(Event.job_id, cursors).compile(session.connection())
        plan = (
            session.connection()
            .exec_driver_sql(f"EXPLAIN {compiled.string}", compiled.params)
            .scalars()
        )
        lines = "\n".join(plan)

    assert "Seq Scan on event" not in lines
    assert "event_pk" not in lines
    assert "event_job" in lines


def test_an_id_leads_back_to_the_cursor_of_its_event(sessions, batch_of, claim):
    batch_id = batch_of(2)
    one, _ = claim()
    found = events_of(sessions, batch_id)

    with sessions.begin() as session:
        for event in found:
            cursor = feed.cursor_for(session, subject(batch_id), event.id)
            assert cursor == EventCursor(subject(batch_id), event.sequence)
            assert is_id("evt", event.id)
        assert feed.latest(session, subject(batch_id)) == (cursor, event.id)
        assert feed.cursor_for(session, subject(one.id), found[1].id) is None
        assert feed.cursor_for(session, subject(one.id), BEGINNING).sequence == 0
    assert len({event.id for event in found}) == 2


@pytest.mark.parametrize("digits", ["0" * 31 + "1", "f" * 32, "7" * 32])
def test_an_unknown_event_id_has_no_cursor(sessions, queue_jobs, digits):
    [job_id] = queue_jobs({})
    with sessions.begin() as session:
        assert feed.cursor_for(session, subject(job_id), f"evt_{digits}") is None
