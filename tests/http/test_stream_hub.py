"""The hub that feeds open streams, on functions instead of a database."""

import asyncio
from contextlib import ExitStack
from datetime import UTC, datetime

from sqlalchemy.exc import OperationalError

from api.schemas.job_parts import StepProgress
from api.stream_hub import LiveValue, StreamHub
from darkroom.event_types import EventType
from darkroom.events.feed import EventCursor, EventScope, FeedEvent

SOON_S = 30


def hub_of(events_after, **more):
    return StreamHub(changed_scopes=lambda _: (0, None), events_after=events_after, **more)


def event_of(sequence, type_=EventType.JOB_STARTED):
    now = datetime.now(UTC)
    about = (now, "job_1", "bat_1", None, None, None, None, None)
    return FeedEvent(sequence, f"evt_{sequence}", type_, *about)


def test_a_slow_reader_gets_its_next_page_when_it_has_sent_the_last():
    cursor = EventCursor(EventScope("ten", "bat_1"), 0)
    read = []

    def pages(cursors):
        read.extend(cursors)
        return {at: [event_of(at.sequence + number) for number in (1, 2, 3)] for at in cursors}

    async def follow():
        hub = hub_of(pages)
        running = asyncio.create_task(hub.run())
        with hub.open(cursor) as slow, hub.open(cursor) as fast:
            pages_of_slow = aiter(slow)
            seen = [(await anext(pages_of_slow)).sequence]
            async for event in fast:
                if event.sequence == 9:
                    break
            assert read.count(cursor) == 1  # for both at once
            assert [at.sequence for at in read] == [0, 3, 6]  # for the fast one alone
            seen += [(await anext(pages_of_slow)).sequence for _ in range(5)]
        running.cancel()
        return seen

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == [1, 2, 3, 4, 5, 6]


def test_only_streams_of_changed_subjects_are_read_and_now_and_then_all():
    cursors = [EventCursor(EventScope("ten", f"bat_{number}"), 0) for number in range(3)]
    changes, read = iter([(5, {"bat_1"}), (6, {"bat_2"}), (6, set()), (6, set())]), []

    def events_after(cursors):
        read.append({cursor.subject.id for cursor in cursors})
        return {}

    async def follow():
        hub = StreamHub(changed_scopes=lambda _: next(changes), events_after=events_after)
        with ExitStack() as stack:
            for cursor in cursors:
                stack.enter_context(hub.open(cursor))
            await hub._feed_events(now=100)  # new streams may all have missed an event
            await hub._feed_events(now=101)
            await hub._feed_events(now=102)
            await hub._feed_events(now=105)

    asyncio.run(follow())
    assert read == [{"bat_0", "bat_1", "bat_2"}, {"bat_2"}, {"bat_0", "bat_1", "bat_2"}]


def test_streams_continue_when_the_database_is_back():
    answers = iter([OperationalError("", {}, Exception()), RuntimeError("a bug"), None])

    def read(cursors):
        answer = next(answers)
        if answer is not None:
            raise answer
        return {cursor: [event_of(7, EventType.JOB_SUCCEEDED)] for cursor in cursors}

    async def follow():
        hub = hub_of(read)
        running = asyncio.create_task(hub.run())
        with hub.open(EventCursor(EventScope("ten", "job_" + "0" * 32), 0)) as stream:
            received = [event.sequence async for event in stream]
        running.cancel()
        return received

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == [7]


def test_a_hub_that_ends_ends_open_and_later_streams():
    async def follow():
        hub = hub_of(lambda _: {})
        with hub.open(EventCursor(EventScope("ten", "bat_1"), 0)) as before:
            hub.end()
            with hub.open(EventCursor(EventScope("ten", "bat_1"), 0)) as after:
                return [event async for event in before], [event async for event in after]

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == ([], [])


def test_a_live_value_is_read_of_changing_subjects_and_sent_when_it_changed():
    changing, still = EventScope("ten", "bat_1"), EventScope("ten", "bat_2")
    asked = []

    def measure(subjects):
        asked.extend(subjects)
        return {subject: StepProgress(step=len(asked) // 3, steps=9) for subject in subjects}

    async def follow():
        live_value = LiveValue("progress", of_jobs=False, every_s=0, read=measure, settles=False)
        hub = hub_of(lambda _: {}, live_values=[live_value])
        running = asyncio.create_task(hub.run())
        with (
            hub.open(EventCursor(changing, 0)) as stream,
            hub.open(EventCursor(still, 0), changing=False),
        ):
            updates = aiter(stream)
            received = [(await anext(updates)).value.step for _ in range(3)]
        running.cancel()
        return received

    assert asyncio.run(asyncio.wait_for(follow(), SOON_S)) == [0, 1, 2]
    assert set(asked) == {changing}
    assert len(asked) > 3
