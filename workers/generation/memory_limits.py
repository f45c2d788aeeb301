"""How many jobs of a kind fit into the replica's memory together, as learned from failures."""

import threading
import time
from collections.abc import Callable
from typing import Final

#: Then the whole microbatch is tried again: what else used the memory may be gone.
REMEMBERED_S: Final = 600.0


class MemoryLimits:
    """Limits by microbatch key, each kept for a while. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._learned: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def rows(self, key: str, wanted: int) -> int:
        """Return how many of `wanted` jobs to generate together; at least 1."""
        with self._lock:
            limit, until = self._learned.get(key, (wanted, 0.0))
        return min(wanted, limit) if self._clock() < until else wanted

    def halve(self, key: str, rows: int) -> None:
        """Allow half of `rows`, which together found too little memory."""
        with self._lock:
            self._learned[key] = (max(1, rows // 2), self._clock() + REMEMBERED_S)
