"""Step progress, published to Redis in a thread of its own: generation never waits for it."""

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from redis import Redis, RedisError

from darkroom.jobs import progress
from darkroom.jobs.progress import Steps
from darkroom.periodic import PeriodicTask

_INTERVAL: Final = timedelta(seconds=0.25)  #: between two publications, however many jobs


class ProgressPublisher:
    """Publisher of the latest steps; drops those that Redis does not take."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._latest: dict[int, dict[str, Steps]] = {}
        self._lock = threading.Lock()
        self._task = PeriodicTask(
            "step-progress",
            self._publish,
            interval=_INTERVAL,
            transient=(RedisError,),
            on_failure="generation continues",
        )
        self._task.start()

    def note(self, dispatch_id: int, steps: Mapping[str, Steps]) -> None:
        """Publish soon how far these jobs of the dispatch are. Return at once."""
        with self._lock:
            self._latest.setdefault(dispatch_id, {}).update(steps)

    def close(self) -> None:
        """End the thread."""
        self._task.close(timedelta(seconds=2))
        self._redis.close()

    def _publish(self) -> None:
        with self._lock:
            latest, self._latest = self._latest, {}
        if latest:
            progress.publish(self._redis, latest)
