"""Says every second how much there is to draw, for those who decide how many draw it."""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom.db.connection import Sessions
from darkroom.forecast import backlog
from darkroom.generation.model_registry import ModelRegistry

_EVERY_S: Final = 1.0
_COUNTED: Final = 10_000  #: jobs of one key: more would not make more replicas

logger = logging.getLogger(__name__)


def microbatches(session: Session, registry: ModelRegistry) -> dict[str, int]:
    """How many microbatches each model has before it, those under way included."""
    found = Counter(dict.fromkeys(registry.models, 0))
    for key, jobs in backlog.queued_jobs(session, most=_COUNTED).items():
        if model := registry.model_for_key(key):
            found[model.name] += math.ceil(jobs / model.max_microbatch)
    for key, dispatches in backlog.running_microbatches(session).items():
        if model := registry.model_for_key(key):
            found[model.name] += dispatches
    return dict(found)


class BacklogReporter:
    """A thread of every worker: they say the same, so that any one is enough."""

    def __init__(
        self,
        sessions: Sessions,
        registry: ModelRegistry,
        publish: Callable[[Mapping[str, int]], None],
        *,
        every_s: float = _EVERY_S,
    ) -> None:
        self._sessions, self._registry, self._publish = sessions, registry, publish
        self._every_s = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demand", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End, and wait for it."""
        self._closing.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                with self._sessions.begin() as session:
                    found = microbatches(session, self._registry)
                self._publish(found)
            except (DBAPIError, PoolTimeout) as error:
                logger.debug("nobody counts what waits: %s", error)
            except Exception:  # whatever it was: a thread that ends silently is worse
                logger.exception("nobody is told what waits")
