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


class FakeGenerator:
    """Generator that answers what the test says: results, events, or an error to raise."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []  #: number of jobs of each call
        self.alone = []  #: whether each call was to run alone

    def connect(self):
        pass

    def start(self, microbatch, *, alone=False):
        self.calls.append(len(microbatch))
        self.alone.append(alone)
        return FakeCall(self.answer, microbatch)


class FakeCall:
    def __init__(self, answer, microbatch):
        self._answer, self._microbatch = answer, microbatch

    def events(self, *, timeout_s, step_timeout_s):  # noqa: ARG002  # nothing here takes long
        yield Accepted()
        yield Started()
        answer = self._answer(self._microbatch)
        indices = itertools.count()
        for item in [answer] if isinstance(answer, Exception) else answer:
            if isinstance(item, Exception):
                raise item
            is_event = isinstance(item, (Progress, Finished))
            yield item if is_event else Finished(next(indices), item)

    def cancel(self):
        pass

    def cancel_rows(self, indices):
        raise AssertionError(f"canceled without a request: {indices}")


class SlowGenerator:
    """Generator that finishes a job when the test says so, and leaves out canceled ones."""

    def __init__(self):
        self._changed = threading.Condition()
        self._wanted, self._finished = set(), set()
        self.microbatch = None
        self.canceled_rows = set()
        self.canceled = False

    def connect(self):
        pass

    def start(self, microbatch, *, alone=False):  # noqa: ARG002  # it runs one call at a time
        with self._changed:
            self.microbatch = microbatch
            self.canceled_rows, self.canceled = set(), False
            self._changed.notify_all()
        return self

    def events(self, *, timeout_s, step_timeout_s):  # noqa: ARG002  # the test decides
        yield Accepted()
        yield Started()
        left = set(range(len(self.microbatch)))
        deadline = time.monotonic() + 30
        while left:
            assert time.monotonic() < deadline
            with self._changed:
                self._changed.wait_for(lambda: self.canceled or left & self._due(), 0.05)
                due = left & self._due()
            if self.canceled:
                raise MicrobatchCanceled
            if not due:
                yield Progress(dict.fromkeys(left, (1, 9)))
                continue
            index = min(due)
            left.remove(index)
            image = images_of(self.microbatch)[index]
            yield Finished(index, Canceled() if index in self.canceled_rows else image)
            with self._changed:  # asked for the next, so the consumer has this one
                self._finished.add(index)
                self._changed.notify_all()

    def _due(self):
        return self._wanted | self.canceled_rows

    def finish(self, *indices):
        """Finish these rows."""
        with self._changed:
            self._wanted |= set(indices)
            self._changed.notify_all()

    def cancel_rows(self, indices):
        with self._changed:
            self.canceled_rows |= set(indices)
            self._changed.notify_all()

    def cancel(self):
        with self._changed:
            self.canceled = True
            self._changed.notify_all()

    def wait_canceled(self, index):
        """Return whether the row is canceled, after a moment if need be."""
        with self._changed:
            return self._changed.wait_for(lambda: index in self.canceled_rows, 20)

    def wait_finished(self, index):
        """Return whether the row is finished, after a moment if need be."""
        with self._changed:
            return self._changed.wait_for(lambda: index in self._finished, 20)

    def wait_started(self):
        with self._changed:
            assert self._changed.wait_for(lambda: self.microbatch is not None, 20)


def images_of(microbatch):
    return [Image(np.zeros((p.height, p.width, 3), np.uint8), 1) for p in microbatch]


@pytest.fixture
def ctx(sessions, registry, s3_settings, redis_url):
    settings = Settings(redis_url=SecretStr(redis_url))
    notifier = WorkNotifier(settings)
    publisher = ProgressPublisher(open_progress_redis(settings))
    heartbeat = LeaseHeartbeat(sessions, lease=LEASE)
    heartbeat.start()
    with ThreadPoolExecutor(4) as encoders:
        yield WorkerContext(
            worker_id="worker",
            sessions=sessions,
            registry=registry,
            generator=FakeGenerator(images_of),
            store=store_of(s3_settings),
            heartbeat=heartbeat,
            notifier=notifier,
            progress=publisher,
            memory_limits=MemoryLimits(),
            encoders=encoders,
            lease=LEASE,
            microbatch_timeout_s=5,
            step_timeout_s=5,
            max_attempts=3,
        )
    heartbeat.close()
    publisher.close()
    notifier.close()


@pytest.fixture
def slow_ctx(ctx):
    """Worker context whose generator finishes a job when the test says so."""
    return replace(ctx, generator=SlowGenerator())


def job(ctx, job_id):
    with ctx.sessions.begin() as session:
        return queries.find(session, DEFAULT_TENANT, job_id)


def cancel(ctx, *job_ids):
    with ctx.sessions.begin() as session:
        for job_id in job_ids:
            lifecycle.cancel(session, DEFAULT_TENANT, job_id)
