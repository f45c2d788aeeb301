"""The open event streams of this process, all fed by one reader of the database.

Every `_READ_S` it looks which jobs and batches have new events, and reads on for the streams that
follow those; every `_READ_ALL_S` for all streams, because what became visible very late may have
escaped that look. So a stream that waits costs next to nothing: no thread, no connection. It is
given the next page when it has passed on the last: a client that reads slowly, or has much to catch
up with, keeps one page here at most.
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
_BUSY_SHARE: Final = 0.1  #: of the time, at most, is spent reading, however many streams there are
_KEYS_EVERY_S: Final = 0.5
_PATIENCE_S: Final = 1.0  #: between two tries of a database that does not answer

logger = logging.getLogger(__name__)

#: what `darkroom.events.feed` says in a transaction of its own
ChangedScopes: TypeAlias = Callable[[int], tuple[int, Collection[str] | None]]
EventsAfter: TypeAlias = Callable[
    [Collection[EventCursor]], Mapping[EventCursor, Sequence[FeedEvent]]
]


class LiveUpdate(NamedTuple):
    """What a gauge says; only the newest counts."""

    gauge: str
    value: BaseModel


@dataclass(frozen=True)
class LiveValue:
    """Something to tell of subjects that move, and no event."""

    name: str
    of_jobs: bool  #: or of batches
    every_s: float
    #: reads of these subjects; those of which nothing is known are left out
    read: Callable[[Collection[EventScope]], Mapping[EventScope, BaseModel]]
    #: whether a subject that was read has come to rest until its next event
    rests: bool


@dataclass(eq=False)
class EventStream:
    """One client that follows one subject."""

    place: EventCursor  #: it has been given what happened up to here
    moving: bool  #: whether gauges are to be read of its subject
    key_id: str | None = None  #: the key it was opened with
    behind: bool = True  #: whether there may be more, though nothing new was seen to happen
    _told: LiveUpdate | None = None  #: what its gauge said last
    _page: Sequence[FeedEvent] = ()
    _news: LiveUpdate | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _over: bool = False

    @property
    def hungry(self) -> bool:
        """Whether it has passed on all that it was given."""
        return not self._page

    def give(self, page: Sequence[FeedEvent]) -> None:
        """What happened next; nothing, when it has caught up."""
        self.behind = len(page) == PAGE
        if not page:
            return
        self.place = EventCursor(self.place.subject, page[-1].sequence)
        self.moving = True
        self._page = page
        self._wake.set()

    def tell(self, reading: LiveUpdate) -> None:
        """What a gauge says now; replaces what has not been passed on."""
        if reading != self._told:
            self._told = self._news = reading
            self._wake.set()

    def end(self) -> None:
        """Nothing more will come."""
        self._over = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[FeedEvent | LiveUpdate]:
        """Events in order, and between them what gauges say, until the subject's last event."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for happening in self._page:
                yield happening
                if happening.ends(self.place.subject):
                    return
            self._page = ()
            news, self._news = self._news, None
            if news is not None:
                yield news
            if self._over:
                return


class StreamHub:
    """`with streams.open(place) as stream:`; `run` feeds those that are open."""

    def __init__(
        self,
        *,
        stirred: ChangedScopes,
        since: EventsAfter,
        gauges: Sequence[LiveValue] = (),
        dead: Callable[[Collection[str]], Collection[str]] = lambda _: (),
    ) -> None:
        """`dead`: which of these keys open nothing any more."""
        self._stirred = stirred
        self._since = since
        self._newest = 0
        self._dead = dead
        self._gauges = gauges
        self._due: dict[str, float] = {}
        self._open: set[EventStream] = set()
        self._any = asyncio.Event()
        self._over = False

    @contextmanager
    def open(
        self, place: EventCursor, *, moving: bool = True, key_id: str | None = None
    ) -> Iterator[EventStream]:
        """A stream of what happens after this place; it ends when the key is revoked."""
        stream = EventStream(place, moving, key_id)
        self._open.add(stream)
        self._any.set()
        if self._over:
            stream.end()
        try:
            yield stream
        finally:
            self._open.discard(stream)

    def end(self) -> None:
        """End every stream, and those still to come: the process is about to leave."""
        self._over = True
        for stream in self._open:
            stream.end()

    async def run(self) -> None:
        """Read and hand out until cancelled; rests while no stream is open."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._any.wait()
            began = clock()
            pause = _PATIENCE_S
            try:
                await self._hand_out(began)
                await self._look_round(began)
            except (DBAPIError, PoolTimeout) as error:
                logger.warning("events cannot be read, streams wait: %s", type(error).__name__)
            except Exception:  # whatever it was: streams that wait for ever are worse
                logger.exception("events cannot be read, streams wait")
            else:
                pause = max(_READ_S, (clock() - began) * (1 / _BUSY_SHARE - 1))
            if not self._open:
                self._any.clear()
            await asyncio.sleep(pause)

    async def _hand_out(self, now: float) -> None:
        waiting = await self._stirred_places(now)
        if not waiting:
            return
        found = await asyncio.to_thread(self._since, waiting.keys())
        for place, streams in waiting.items():
            for stream in streams:
                stream.give(found.get(place, ()))

    async def _stirred_places(self, now: float) -> Mapping[EventCursor, Sequence[EventStream]]:
        """Places that streams wait at and that may have been passed, with the streams."""
        self._newest, subjects = await asyncio.to_thread(self._stirred, self._newest)
        everywhere = self._is_due("all", now, every_s=_READ_ALL_S) or subjects is None
        waiting: dict[EventCursor, list[EventStream]] = defaultdict(list)
        for stream in self._open:
            seen = everywhere or stream.behind or stream.place.subject.id in (subjects or ())
            if seen and stream.hungry:
                waiting[stream.place].append(stream)
        return waiting

    async def _look_round(self, now: float) -> None:
        if self._is_due("keys", now, every_s=_KEYS_EVERY_S):
            await self._shut_out()
        for gauge in self._gauges:
            if self._is_due(gauge.name, now, every_s=gauge.every_s):
                await self._look_at(gauge)

    def _is_due(self, what: str, now: float, *, every_s: float) -> bool:
        due = now >= self._due.get(what, 0)
        if due:
            self._due[what] = now + every_s
        return due

    async def _shut_out(self) -> None:
        """End the streams whose keys are revoked or expired: a request would be refused."""
        used = {stream.key_id for stream in self._open if stream.key_id is not None}
        if used:
            dead = await asyncio.to_thread(self._dead, used)
            for stream in self._open:
                if stream.key_id in dead:
                    stream.end()

    async def _look_at(self, gauge: LiveValue) -> None:
        moving: dict[EventScope, list[EventStream]] = defaultdict(list)
        for stream in self._open:
            if stream.moving and stream.place.subject.is_job == gauge.of_jobs:
                moving[stream.place.subject].append(stream)
                stream.moving = not gauge.rests
        if not moving:
            return
        for subject, value in (await asyncio.to_thread(gauge.read, moving.keys())).items():
            for stream in moving[subject]:
                stream.tell(LiveUpdate(gauge.name, value))
