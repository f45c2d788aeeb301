"""Which application of the cluster draws for a model, where it is not the one of its name.

A pointer in the cluster's key-value store: workers read it, `workers.replace` moves it.
"""

import time
from collections.abc import Callable
from typing import Final

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

FRESH_S: Final = 1.0  #: so long a worker goes on with what it read


def application_of(model: str) -> str:
    """The name of the application that draws for the model. Needs a connection to the cluster."""
    told = _internal_kv_get(_key(model))
    return told.decode() if told else model


def move(model: str, application: str) -> None:
    """From now on, this one draws for the model."""
    _internal_kv_put(_key(model), application.encode(), overwrite=True)


def _key(model: str) -> bytes:
    return f"darkroom:serving:{model}".encode()


class Pointers:
    """What was read, kept for a second: each microbatch asks. Threads may share it."""

    def __init__(self, read: Callable[[str], str] = application_of) -> None:
        self._read = read
        self._known: dict[str, tuple[str, float]] = {}

    def __call__(self, model: str) -> str:
        application, until = self._known.get(model, ("", 0.0))
        if time.monotonic() > until:
            application = self._read(model)
            self._known[model] = (application, time.monotonic() + FRESH_S)
        return application
