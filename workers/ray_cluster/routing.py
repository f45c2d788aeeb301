"""Routing from a model to the Ray Serve application that generates for it.

The application has the model's name, unless `workers.deploy.replace` wrote another one to the
cluster's key-value store.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from ray.exceptions import RayError

from workers.ray_cluster import kv

FRESH_S: Final = 1.0  #: how long a worker uses what it read

logger = logging.getLogger(__name__)


def application_for(model: str) -> str:
    """Return the name of the model's application. Raises as `kv.read`."""
    return kv.read(f"serving:{model}") or model


def route(model: str, application: str) -> None:
    """Send the model's microbatches to this application from now on."""
    kv.write(f"serving:{model}", application)


class RoutingCache:
    """Routes read within the last second. Threads may share it.

    While the cluster does not answer, the last known application is returned.
    """

    def __init__(self, read: Callable[[str], str] = application_for) -> None:
        self._read = read
        self._known: dict[str, tuple[str, float]] = {}

    def __call__(self, model: str) -> str:
        application, until = self._known.get(model, (model, 0.0))
        if time.monotonic() > until:
            try:
                application = self._read(model)
            except (RayError, RuntimeError, TimeoutError) as error:
                logger.debug("could not read the route of %s: %s; keeping the last", model, error)
            self._known[model] = (application, time.monotonic() + FRESH_S)
        return application
