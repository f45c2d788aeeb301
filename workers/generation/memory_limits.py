"""How many jobs of a kind fit into the replica's memory together, as far as was learned."""

import threading
import time
from collections.abc import Callable
from typing import Final

#: then the whole microbatch is tried again: what else was in the memory may be gone
REMEMBERED_S: Final = 600.0


class MemoryLimits:
    """Limits by microbatch key, each for a while. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._learned: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def of(self, key: str, wanted: int) -> int:
        """How many of so many to draw together; never 0."""
        with self._lock:
            limit, until = self._learned.get(key, (wanted, 0.0))
        return min(wanted, limit) if self._clock() < until else wanted

    def halve(self, key: str, drawn: int) -> None:
        """So many together were too many."""
        with self._lock:
            self._learned[key] = (max(1, drawn // 2), self._clock() + REMEMBERED_S)
