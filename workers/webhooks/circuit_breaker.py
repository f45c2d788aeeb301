"""Destination limiter: a concurrency limit, a fair share and a circuit breaker per destination.

An unknown or failing destination (half-open) gets one concurrent request; a healthy one (closed)
gets eight, and some seconds of claimed work ahead of them. So a receiver that hangs blocks one
request and no more. After failures in a row the circuit opens, and nothing is sent for a while.
The state lives in the memory of one sender; after a restart it is learned again.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from darkroom.webhooks.deliveries import AttemptOutcome, Claim

MAX_CONCURRENT: Final = 8  #: attempts in flight to one healthy destination
_PREFETCH_S: Final = 2.0  #: of work claimed ahead, so that claims need not keep its pace
_MAX_PREFETCH: Final = 32  #: claims for each of the eight
_SHARE: Final = 0.75  #: of the capacity, for one tenant, and for all half-open destinations
_HALF_OPEN_AFTER: Final = 5  #: failures in a row
_OPEN_AFTER: Final = 10  #: failures in a row, a timeout counting as four
_TIMEOUT_WEIGHT: Final = 4
_MIN_OPEN_S: Final = 5.0
_MAX_OPEN_S: Final = 300.0
MAX_DEFER_S: Final = 15.0  #: because of a backlog; an open circuit may take longer
_MAX_DESTINATIONS: Final = 50_000  #: remembered; idle ones are forgotten first


@dataclass
class _Destination:
    """State of one destination: its circuit, its claims, and how fast it answers."""

    acquired: int = 0
    answered: bool = False
    failures: int = 0  #: in a row, weighted
    openings: int = 0  #: in a row
    open_until: float = 0.0
    latency_s: float = 1.0  #: smoothed
    probed_at: float = 0.0
    last_deferred_to: float = 0.0  #: when the last of its deferred deliveries is due
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CONCURRENT))

    @property
    def closed(self) -> bool:
        return self.answered and self.failures < _HALF_OPEN_AFTER

    @property
    def limit(self) -> int:
        prefetch = min(max(_PREFETCH_S / max(self.latency_s, 0.001), 1), _MAX_PREFETCH)
        return int(MAX_CONCURRENT * prefetch) if self.closed else 1


class DestinationLimiter:
    """Limiter of acquired claims. `acquire` may be called from another thread than the rest."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._destinations: dict[str, _Destination] = {}
        self._by_tenant: Counter[str] = Counter()
        self._acquired = 0
        self._probes: set[str] = set()  #: ids of claims of half-open destinations
        self._lock = threading.Lock()

    @property
    def available(self) -> int:
        """Number of claims that may still be acquired."""
        return self._capacity - self._acquired

    def acquire(self, claim: Claim) -> float | None:
        """Admit the claim until `release`, or return in how many seconds to try again."""
        with self._lock:
            destination = self._destination(claim.destination)
            wait_s = self._wait_s(claim, destination)
            if wait_s is None:
                self._count(claim, destination)
            return wait_s

    def _destination(self, key: str) -> _Destination:
        destination = self._destinations.pop(key, None) or _Destination()
        self._destinations[key] = destination  # now the most recently used one
        if len(self._destinations) > _MAX_DESTINATIONS:
            oldest = next(iter(self._destinations))
            if self._destinations[oldest].acquired == 0:
                del self._destinations[oldest]
        return destination

    def _wait_s(self, claim: Claim, destination: _Destination) -> float | None:
        now = self._clock()
        share = self._capacity * _SHARE
        if destination.open_until > now:
            remaining_s = destination.open_until - now
            return remaining_s * random.uniform(1, 1.1)  # noqa: S311  # not a secret
        if destination.acquired >= destination.limit:
            return self._defer_s(destination, now)
        if self._by_tenant[claim.tenant_id] >= share:
            return 1.0
        probes_exhausted = not destination.closed and len(self._probes) >= share
        if self._acquired >= self._capacity or probes_exhausted:
            return 1.0
        return None

    def _defer_s(self, destination: _Destination, now: float) -> float:
        """Space deferred deliveries at the destination's pace, so that few are due too early.

        While a probe hangs, the pace falls.
        """
        if destination.closed:
            pace_s = destination.latency_s / MAX_CONCURRENT
            head = now + destination.limit * pace_s / 2
        else:
            pace_s = max(now - destination.probed_at, 0.1)
            head = now
        next_at = max(destination.last_deferred_to, head) + pace_s
        destination.last_deferred_to = min(next_at, now + MAX_DEFER_S)
        return max(destination.last_deferred_to - now, 0.02)

    def _count(self, claim: Claim, destination: _Destination) -> None:
        self._acquired += 1
        self._by_tenant[claim.tenant_id] += 1
        destination.acquired += 1
        if not destination.closed:
            destination.probed_at = self._clock()
            self._probes.add(claim.id)

    def slots(self, claim: Claim) -> asyncio.Semaphore:
        """Return the semaphore of the eight concurrent requests to the claim's destination."""
        return self._destinations[claim.destination].slots

    def release(self, claim: Claim) -> None:
        """Free what `acquire` took: the claim was sent or returned to the queue."""
        with self._lock:
            self._acquired -= 1
            self._by_tenant[claim.tenant_id] -= 1
            if not self._by_tenant[claim.tenant_id]:
                del self._by_tenant[claim.tenant_id]
            self._destinations[claim.destination].acquired -= 1
            self._probes.discard(claim.id)

    def record_result(
        self,
        claim: Claim,
        outcome: AttemptOutcome,
        seconds: float,
        *,
        retry_after_s: float | None = None,
    ) -> bool:
        """Update the destination's circuit; return whether it closed with deliveries deferred.

        `retry_after_s`: how long the destination asked to be left alone.
        """
        with self._lock:
            destination = self._destinations[claim.destination]
            if outcome is AttemptOutcome.HTTP_2XX:
                return self._record_success(destination, seconds)
            self._record_failure(destination, outcome, retry_after_s)
            return False

    def _record_success(self, destination: _Destination, seconds: float) -> bool:
        waited_for = not destination.closed and destination.last_deferred_to > self._clock()
        weight = 4 if destination.answered else 1
        destination.latency_s += (seconds - destination.latency_s) / weight
        destination.answered, destination.failures, destination.openings = True, 0, 0
        if waited_for:
            destination.last_deferred_to = 0.0
        return waited_for

    def _record_failure(
        self, destination: _Destination, outcome: AttemptOutcome, retry_after_s: float | None
    ) -> None:
        now = self._clock()
        if retry_after_s:
            until = now + min(retry_after_s, _MAX_OPEN_S)
            destination.open_until = max(destination.open_until, until)
        destination.failures += _TIMEOUT_WEIGHT if outcome is AttemptOutcome.TIMEOUT else 1
        if destination.failures >= _OPEN_AFTER and destination.open_until <= now:
            destination.open_until = now + min(_MIN_OPEN_S * 2**destination.openings, _MAX_OPEN_S)
            destination.openings += 1
