"""Counters and histograms of what every process of the installation finishes.

Workers and webhook senders have no port. They record each finished job and attempt in the database,
so the API reads on from there at each scrape (decision 22).
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Final

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom.db.connection import Sessions
from darkroom.jobs import finished
from darkroom.jobs.finished import FinishedJob
from darkroom.status import FINISHED
from darkroom.webhooks import attempt_counts
from darkroom.webhooks.deliveries import AttemptOutcome

_PAGE: Final = 10_000  #: jobs that one scrape counts at most; the next scrape counts the rest
_OVERLAP: Final = 250  #: events that are looked at again, for those that became visible late
_EVERY_REPLICA: Final = (
    " since this API process started. Every API process counts the whole installation: aggregate"
    " replicas with max, not sum."
)
_QUEUE_BUCKETS: Final = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_INFERENCE_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_UPLOAD_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

logger = logging.getLogger(__name__)


class ActivityCollector(Collector):
    """Instruments that each scrape brings up to date."""

    def __init__(self, sessions: Sessions, models: Iterable[str]) -> None:
        self._sessions = sessions
        self._started = time.monotonic()
        self._lock = threading.Lock()  # two scrapes at once would count twice
        self._first = 0
        self._newest = 0
        self._counted: set[int] = set()
        self._attempts_until: datetime | None = None
        self._jobs = Counter(
            "darkroom_jobs_finished",
            f"Jobs that reached a final status{_EVERY_REPLICA}",
            ("status", "model"),
            registry=None,
        )
        self._queue_s = _histogram(
            "darkroom_job_queue_seconds",
            "Seconds from submission to the last start of finished jobs",
            _QUEUE_BUCKETS,
        )
        self._inference_s = _histogram(
            "darkroom_inference_seconds", "Seconds of generating an image", _INFERENCE_BUCKETS
        )
        self._upload_s = _histogram(
            "darkroom_image_upload_seconds", "Seconds of storing an image", _UPLOAD_BUCKETS
        )
        self._attempts = Counter(
            "darkroom_webhook_attempts",
            f"Webhook attempts by outcome{_EVERY_REPLICA}",
            ("outcome",),
            registry=None,
        )
        self._start_at_zero(models)

    def _start_at_zero(self, models: Iterable[str]) -> None:
        """Create every series, so that the first increase is one."""
        for model in models:
            for status in FINISHED:
                self._jobs.labels(status.value, model)
            for histogram in (self._queue_s, self._inference_s, self._upload_s):
                histogram.labels(model)
        for outcome in AttemptOutcome:
            self._attempts.labels(outcome.value)

    def collect(self) -> Iterator[Metric]:
        """Count what is new and yield the instruments, with old counts if the database is down."""
        with self._lock:
            try:
                with self._sessions.begin() as session:
                    self._count_attempts(session)
                    self._count_jobs(session)
            except (DBAPIError, PoolTimeout) as error:
                reason = type(error).__name__
                logger.warning("counting finished jobs failed: %s; the next scrape retries", reason)
        histograms = (self._queue_s, self._inference_s, self._upload_s)
        for instrument in (self._jobs, *histograms, self._attempts):
            yield from instrument.collect()

    def _start(self, session: Session) -> datetime:
        """Set the first event to count, and return the moment of the first attempt to count."""
        age = timedelta(seconds=time.monotonic() - self._started)
        self._first = self._newest = finished.last_event_before(session, age)
        return attempt_counts.settled_until(session, age)

    def _count_attempts(self, session: Session) -> None:
        after = self._attempts_until or self._start(session)
        until = max(after, attempt_counts.settled_until(session))
        for outcome, number in attempt_counts.count_attempts(session, after, until).items():
            self._attempts.labels(outcome).inc(number)
        self._attempts_until = until

    def _count_jobs(self, session: Session) -> None:
        after = max(self._first, self._newest - _OVERLAP)
        found = finished.finished_after(session, after, counted=self._counted, limit=_PAGE)
        for job in found:
            self._observe(job)
        self._counted.update(job.event_id for job in found)
        self._newest = max(self._counted, default=self._newest)
        oldest = self._newest - _OVERLAP
        self._counted = {number for number in self._counted if number > oldest}

    def _observe(self, job: FinishedJob) -> None:
        self._jobs.labels(job.status.value, job.model).inc()
        if job.queued is not None:
            self._queue_s.labels(job.model).observe(job.queued.total_seconds())
        if job.inference_ms is not None:
            self._inference_s.labels(job.model).observe(job.inference_ms / 1000)
        if job.upload_ms is not None:
            self._upload_s.labels(job.model).observe(job.upload_ms / 1000)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text + _EVERY_REPLICA, ("model",), buckets=buckets, registry=None)
