"""Worker context on real servers, with fake generators."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from pydantic import SecretStr

from darkroom.db.tables import DEFAULT_TENANT
from darkroom.errors import MicrobatchCanceled
from darkroom.jobs import lifecycle, queries
from darkroom.jobs.progress import open_progress_redis
from darkroom.queue.notifier import WorkNotifier
from darkroom.settings import Settings
from tests.support.servers import store_of
from workers.generation.context import WorkerContext
from workers.generation.generator import Accepted, Canceled, Finished, Image, Progress, Started
from workers.generation.heartbeat import LeaseHeartbeat
from workers.generation.memory_limits import MemoryLimits
from workers.generation.progress_publisher import ProgressPublisher

LEASE = timedelta(seconds=30)


class ByHand:
    """A generator that answers what the test says: drawings, happenings, or an error to raise."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []  #: how many jobs each held
        self.alone = []  #: which of them nobody else might be drawn with

    def connect(self):
        """Nobody is far."""

    def begin(self, microbatch, *, alone=False):
        self.calls.append(len(microbatch))
        self.alone.append(alone)
        return Answer(self.answer, microbatch)


class Answer:
    def __init__(self, answer, microbatch):
        self._answer, self._microbatch = answer, microbatch

    def happenings(self, *, timeout_s, step_timeout_s):  # noqa: ARG002  # nothing here takes long
        yield Accepted()
        yield Started()
        answer = self._answer(self._microbatch)
        places = itertools.count()
        for said in [answer] if isinstance(answer, Exception) else answer:
            if isinstance(said, Exception):
                raise said
            drawing = not isinstance(said, (Progress, Finished))
            yield Finished(next(places), said) if drawing else said

    def cancel(self):
        """There is nothing to stop."""

    def withdraw(self, indices):
        raise AssertionError(f"nobody asked for that: {indices}")


class Patient:
    """A generator that draws a job when the test says so, and leaves out what is withdrawn."""

    def __init__(self):
        self._happened = threading.Condition()
        self._wanted, self._drawn = set(), set()
        self.microbatch = None
        self.withdrawn = set()
        self.canceled = False

    def connect(self):
        """Nobody is far."""

    def begin(self, microbatch, *, alone=False):  # noqa: ARG002  # it draws one at a time
        with self._happened:
            self.microbatch = microbatch
            self.withdrawn, self.canceled = set(), False
            self._happened.notify_all()
        return self

    def happenings(self, *, timeout_s, step_timeout_s):  # noqa: ARG002  # the test has the time
        yield Accepted()
        yield Started()
        left = set(range(len(self.microbatch)))
        deadline = time.monotonic() + 30
        while left:
            assert time.monotonic() < deadline
            with self._happened:
                self._happened.wait_for(lambda: self.canceled or left & self._due(), 0.05)
                due = left & self._due()
            if self.canceled:
                raise MicrobatchCanceled
            if not due:
                yield Progress(dict.fromkeys(left, (1, 9)))
                continue
            place = min(due)
            left.remove(place)
            drawn = pictures_of(self.microbatch)[place]
            yield Finished(place, Canceled() if place in self.withdrawn else drawn)
            with self._happened:  # asked for the next, so this one was taken
                self._drawn.add(place)
                self._happened.notify_all()

    def _due(self):
        return self._wanted | self.withdrawn

    def draw(self, *places):
        """From now on these are drawn."""
        with self._happened:
            self._wanted |= set(places)
            self._happened.notify_all()

    def withdraw(self, indices):
        with self._happened:
            self.withdrawn |= set(indices)
            self._happened.notify_all()

    def cancel(self):
        with self._happened:
            self.canceled = True
            self._happened.notify_all()

    def left_out(self, place):
        """Whether it is, soon."""
        with self._happened:
            return self._happened.wait_for(lambda: place in self.withdrawn, 20)

    def has_drawn(self, place):
        """Whether it has, soon."""
        with self._happened:
            return self._happened.wait_for(lambda: place in self._drawn, 20)

    def wait_until_begun(self):
        with self._happened:
            assert self._happened.wait_for(lambda: self.microbatch is not None, 20)


def pictures_of(microbatch):
    return [Image(np.zeros((p.height, p.width, 3), np.uint8), 1) for p in microbatch]


@pytest.fixture
def ctx(sessions, registry, s3_settings, redis_url):
    settings = Settings(redis_url=SecretStr(redis_url))
    notifier, board = WorkNotifier(settings), ProgressPublisher(open_progress_redis(settings))
    leases = LeaseHeartbeat(sessions, lease=LEASE)
    leases.start()
    with ThreadPoolExecutor(4) as encoders:
        yield WorkerContext(
            worker_id="worker",
            sessions=sessions,
            registry=registry,
            generator=ByHand(pictures_of),
            store=store_of(s3_settings),
            leases=leases,
            notifier=notifier,
            board=board,
            seats=MemoryLimits(),
            encoders=encoders,
            lease=LEASE,
            microbatch_timeout_s=5,
            step_timeout_s=5,
            max_attempts=3,
        )
    leases.close()
    board.close()
    notifier.close()


@pytest.fixture
def patient_shop(ctx):
    """The worker_context, with a generator that draws when the test says so."""
    return replace(ctx, generator=Patient())


def job(ctx, job_id):
    with ctx.sessions.begin() as session:
        return queries.find(session, DEFAULT_TENANT, job_id)


def cancel(ctx, *job_ids):
    with ctx.sessions.begin() as session:
        for job_id in job_ids:
            lifecycle.cancel(session, DEFAULT_TENANT, job_id)
