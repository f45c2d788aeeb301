"""Publishes how far jobs have come, from a thread of its own: nobody waits for Redis."""

import logging
import threading
from collections.abc import Mapping
from typing import Final

from redis import Redis, RedisError

from darkroom.jobs import progress
from darkroom.jobs.progress import Steps

_PAUSE_S: Final = 0.25  #: so often at most, however many jobs there are

logger = logging.getLogger(__name__)


class ProgressPublisher:
    """A thread that publishes the latest news and drops what Redis does not take."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._news: dict[int, dict[str, Steps]] = {}
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="noticeboard", daemon=True)
        self._thread.start()

    def note(self, dispatch_id: int, steps: Mapping[str, Steps]) -> None:
        """Where these jobs of the dispatch are now. Returns at once."""
        with self._lock:
            self._news.setdefault(dispatch_id, {}).update(steps)
        self._wanted.set()

    def close(self) -> None:
        """Let the thread end."""
        self._closing.set()
        self._wanted.set()
        self._thread.join(timeout=2)
        self._redis.close()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing.is_set():
                return
            with self._lock:
                news, self._news = self._news, {}
            try:
                progress.publish(self._redis, news)
            except RedisError as error:
                logger.debug("nobody sees the progress: %s", error)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("nobody sees the progress")
            self._closing.wait(_PAUSE_S)
