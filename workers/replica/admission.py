"""Whose turn it is with the model: a few microbatches at a time, or one that wants to be alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class AdmissionGate:
    """Places, given in the order in which they were asked for. For one event loop."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = asyncio.Semaphore(places)
        self._line = asyncio.Lock()  # so that nobody overtakes who waits for all places

    @asynccontextmanager
    async def taken(self, *, alone: bool) -> AsyncIterator[None]:
        """While the block runs, a place is taken; all of them by who is `alone`."""
        taken = 0
        try:
            async with self._line:
                for _ in range(self._places if alone else 1):
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()
