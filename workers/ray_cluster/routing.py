"""Which application of the cluster draws for a model, where it is not the one of its name.

A note in the cluster: workers read it, `workers.deploy.replace` writes it.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from ray.exceptions import RayError

from workers.ray_cluster import kv

FRESH_S: Final = 1.0  #: so long a worker goes on with what it read

logger = logging.getLogger(__name__)


def application_of(model: str) -> str:
    """The name of the application that draws for the model. Raises as `cluster_notes.read`."""
    return kv.read(f"serving:{model}") or model


def move(model: str, application: str) -> None:
    """From now on, this one draws for the model."""
    kv.write(f"serving:{model}", application)


class RoutingCache:
    """What was read, kept for a second: each microbatch asks. Threads may share it.

    While the cluster does not answer, the last known application is the one to try.
    """

    def __init__(self, read: Callable[[str], str] = application_of) -> None:
        self._read = read
        self._known: dict[str, tuple[str, float]] = {}

    def __call__(self, model: str) -> str:
        application, until = self._known.get(model, (model, 0.0))
        if time.monotonic() > until:
            try:
                application = self._read(model)
            except (RayError, RuntimeError, TimeoutError) as error:
                logger.debug("cannot read who draws for %s: %s", model, error)
            self._known[model] = (application, time.monotonic() + FRESH_S)
        return application
