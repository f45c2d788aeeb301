"""Reporter of the microbatches that wait, for the autoscaler."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom.db.connection import Sessions
from darkroom.forecast import backlog
from darkroom.generation.model_registry import ModelRegistry
from darkroom.periodic import PeriodicTask

_INTERVAL: Final = timedelta(seconds=1)
_COUNTED: Final = 10_000  #: jobs of one key: more would not make more replicas


def microbatches(session: Session, registry: ModelRegistry) -> dict[str, int]:
    """Return how many microbatches each model has queued and running."""
    found = Counter(dict.fromkeys(registry.models, 0))
    for key, jobs in backlog.waiting(session, most=_COUNTED).items():
        if model := registry.model_for_key(key):
            found[model.name] += math.ceil(jobs / model.max_microbatch)
    for key, dispatches in backlog.under_way(session).items():
        if model := registry.model_for_key(key):
            found[model.name] += dispatches
    return dict(found)


def backlog_reporter(
    sessions: Sessions,
    registry: ModelRegistry,
    publish: Callable[[Mapping[str, int]], None],
) -> PeriodicTask:
    """Return the task that reports. Each worker has one: all say the same, any one is enough."""

    def report() -> None:
        with sessions.begin() as session:
            found = microbatches(session, registry)
        publish(found)

    return PeriodicTask("backlog", report, interval=_INTERVAL, transient=(DBAPIError, PoolTimeout))
