"""Open event streams of this process, all fed by one reader of the database.

Every `_READ_S` the reader finds the jobs and batches with new events, and reads on for the streams
of those; every `_READ_ALL_S` for all streams, because an event that became visible very late may
have escaped. So an idle stream costs next to nothing: no thread, no connection. A stream gets its
next page when it has sent the last: a slow client, or one far behind, keeps one page in memory at
most.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.events.feed import PAGE, EventCursor, EventScope, FeedEvent

_READ_S: Final = 0.2
_READ_ALL_S: Final = 5.0
_BUSY_SHARE: Final = 0.1  #: of the time, at most, is spent reading, however many streams are open
_KEYS_EVERY_S: Final = 0.5
_RETRY_S: Final = 1.0  #: after a failed read

logger = logging.getLogger(__name__)

#: functions of `darkroom.events.feed` in a transaction of their own
ChangedScopes: TypeAlias = Callable[[int], tuple[int, Collection[str] | None]]
EventsAfter: TypeAlias = Callable[
    [Collection[EventCursor]], Mapping[EventCursor, Sequence[FeedEvent]]
]


class LiveUpdate(NamedTuple):
    """Reading of a live value; only the newest counts."""

    name: str
    value: BaseModel


@dataclass(frozen=True)
class LiveValue:
    """Value that streams send while their subject changes, besides its events."""

    name: str
    of_jobs: bool  #: or of batches
    every_s: float
    #: reads the values of these subjects; leaves out those without one
    read: Callable[[Collection[EventScope]], Mapping[EventScope, BaseModel]]
    settles: bool  #: whether one reading is valid until the subject's next event


@dataclass(eq=False)
class EventStream:
    """One client that follows one subject."""

    cursor: EventCursor  #: it has been given the events up to here
    changing: bool  #: whether live values of its subject are read
    key_id: str | None = None  #: the key it was opened with
    behind: bool = True  #: whether it may have more events, though no new one was seen
    _latest: LiveUpdate | None = None
    _page: Sequence[FeedEvent] = ()
    _unsent: LiveUpdate | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    @property
    def idle(self) -> bool:
        """True when it has sent all that it was given."""
        return not self._page

    def give(self, page: Sequence[FeedEvent]) -> None:
        """Take the next events; none when it has caught up."""
        self.behind = len(page) == PAGE
        if not page:
            return
        self.cursor = EventCursor(self.cursor.subject, page[-1].sequence)
        self.changing = True
        self._page = page
        self._wake.set()

    def update(self, update: LiveUpdate) -> None:
        """Take a live value in place of an unsent one."""
        if update != self._latest:
            self._latest = self._unsent = update
            self._wake.set()

    def end(self) -> None:
        """Finish the stream after what it was given."""
        self._closed = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[FeedEvent | LiveUpdate]:
        """Yield events in order, and live values between them, until the subject's last event."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for event in self._page:
                yield event
                if event.ends(self.cursor.subject):
                    return
            self._page = ()
            update, self._unsent = self._unsent, None
            if update is not None:
                yield update
            if self._closed:
                return


class StreamHub:
    """Reader that feeds open streams: `with hub.open(cursor) as stream:` while `run` runs."""

    def __init__(
        self,
        *,
        changed_scopes: ChangedScopes,
        events_after: EventsAfter,
        live_values: Sequence[LiveValue] = (),
        dead_keys: Callable[[Collection[str]], Collection[str]] = lambda _: (),
    ) -> None:
        """`dead_keys` returns those of the keys that are revoked or expired."""
        self._changed_scopes = changed_scopes
        self._events_after = events_after
        self._newest = 0
        self._dead_keys = dead_keys
        self._live_values = live_values
        self._due: dict[str, float] = {}
        self._streams: set[EventStream] = set()
        self._any = asyncio.Event()
        self._closed = False

    @contextmanager
    def open(
        self, cursor: EventCursor, *, changing: bool = True, key_id: str | None = None
    ) -> Iterator[EventStream]:
        """Yield a stream of the events after a cursor. It ends when its key is revoked."""
        stream = EventStream(cursor, changing, key_id)
        self._streams.add(stream)
        self._any.set()
        if self._closed:
            stream.end()
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    def end(self) -> None:
        """End every stream, and those still to come: the process is about to exit."""
        self._closed = True
        for stream in self._streams:
            stream.end()

    async def run(self) -> None:
        """Feed the streams until canceled. Rests while no stream is open."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._any.wait()
            started = clock()
            pause = _RETRY_S
            try:
                await self._feed_events(started)
                await self._feed_live_values(started)
            except (DBAPIError, PoolTimeout) as error:
                reason = type(error).__name__
                logger.warning("reading events failed: %s; retrying in %.1f s", reason, pause)
            except Exception:  # any error: streams that wait for ever are worse
                logger.exception("reading events failed; retrying in %.1f s", pause)
            else:
                pause = max(_READ_S, (clock() - started) * (1 / _BUSY_SHARE - 1))
            if not self._streams:
                self._any.clear()
            await asyncio.sleep(pause)

    async def _feed_events(self, now: float) -> None:
        waiting = await self._due_cursors(now)
        if not waiting:
            return
        found = await asyncio.to_thread(self._events_after, waiting.keys())
        for cursor, streams in waiting.items():
            for stream in streams:
                stream.give(found.get(cursor, ()))

    async def _due_cursors(self, now: float) -> Mapping[EventCursor, Sequence[EventStream]]:
        """Return the cursors that may have events after them, with the streams that wait there."""
        self._newest, changed = await asyncio.to_thread(self._changed_scopes, self._newest)
        everywhere = self._is_due("all", now, every_s=_READ_ALL_S) or changed is None
        waiting: dict[EventCursor, list[EventStream]] = defaultdict(list)
        for stream in self._streams:
            due = everywhere or stream.behind or stream.cursor.subject.id in (changed or ())
            if due and stream.idle:
                waiting[stream.cursor].append(stream)
        return waiting

    async def _feed_live_values(self, now: float) -> None:
        if self._is_due("keys", now, every_s=_KEYS_EVERY_S):
            await self._end_streams_of_dead_keys()
        for live_value in self._live_values:
            if self._is_due(live_value.name, now, every_s=live_value.every_s):
                await self._feed_live_value(live_value)

    def _is_due(self, task: str, now: float, *, every_s: float) -> bool:
        due = now >= self._due.get(task, 0)
        if due:
            self._due[task] = now + every_s
        return due

    async def _end_streams_of_dead_keys(self) -> None:
        """End streams whose key is revoked or expired: a new request would be refused."""
        used = {stream.key_id for stream in self._streams if stream.key_id is not None}
        if used:
            dead = await asyncio.to_thread(self._dead_keys, used)
            for stream in self._streams:
                if stream.key_id in dead:
                    stream.end()

    async def _feed_live_value(self, live_value: LiveValue) -> None:
        changing: dict[EventScope, list[EventStream]] = defaultdict(list)
        for stream in self._streams:
            if stream.changing and stream.cursor.subject.is_job == live_value.of_jobs:
                changing[stream.cursor.subject].append(stream)
                stream.changing = not live_value.settles
        if not changing:
            return
        read = await asyncio.to_thread(live_value.read, changing.keys())
        for scope, value in read.items():
            for stream in changing[scope]:
                stream.update(LiveUpdate(live_value.name, value))
