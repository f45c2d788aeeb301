"""Admission to the model: a few microbatches at a time, or one that must be alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class AdmissionGate:
    """Slots, given in the order in which they are requested. For one event loop."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = asyncio.Semaphore(slots)
        self._line = asyncio.Lock()  # so that none overtakes a microbatch that waits for all slots

    @asynccontextmanager
    async def admitted(self, *, alone: bool) -> AsyncIterator[None]:
        """Hold one slot while the block runs, or all of them if `alone`."""
        acquired = 0
        try:
            async with self._line:
                for _ in range(self._slots if alone else 1):
                    await self._free.acquire()
                    acquired += 1
            yield
        finally:
            for _ in range(acquired):
                self._free.release()
