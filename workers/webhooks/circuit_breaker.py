"""Who may send now: room in this process, a limit for each destination, rest for failing ones.

A destination that nobody knows, or that fails, has one place; one that answers has eight at once
and some seconds of work waiting for them. So receivers that hang hold a place each and no more.
Lives in the memory of one sender: what it forgets when it dies, it learns again.
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

AT_ONCE: Final = 8  #: attempts in flight to one destination that answers
_AHEAD_S: Final = 2.0  #: of work may wait for these, so that claims need not keep its pace
_MOST_AHEAD: Final = 32  #: for each of the eight
_SHARE: Final = 0.75  #: of all places, for one tenant, and for destinations that do not answer
_DOUBTFUL_AFTER: Final = 5  #: failures in a row
_OPEN_AFTER: Final = 10  #: failures in a row, a timeout being worth four: then it is left alone
_TIMEOUT_WEIGHT: Final = 4
_FIRST_REST_S: Final = 5.0
_LONGEST_REST_S: Final = 300.0
MAX_DEFER_S: Final = 15.0  #: because of a crowd; a rest may be longer
_REMEMBERED: Final = 50_000  #: destinations; those that are doing nothing are forgotten first


@dataclass
class _Destination:
    """What is known of one: its places taken, its failures, how long it takes to answer."""

    inside: int = 0
    answered: bool = False
    failures: int = 0  #: in a row, weighted
    rests: int = 0  #: in a row
    rest_until: float = 0.0
    seconds: float = 1.0  #: of an answer, smoothed
    probed_at: float = 0.0
    tail: float = 0.0  #: when the last of those that were put off may come
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    @property
    def good(self) -> bool:
        return self.answered and self.failures < _DOUBTFUL_AFTER

    @property
    def places(self) -> int:
        ahead = min(max(_AHEAD_S / max(self.seconds, 0.001), 1), _MOST_AHEAD)
        return int(AT_ONCE * ahead) if self.good else 1


class DestinationLimiter:
    """Counts who is inside. `admit` may be called from another thread than the rest."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._destinations: dict[str, _Destination] = {}
        self._tenants: Counter[str] = Counter()
        self._inside = 0
        self._doubtful = 0
        self._doubted: set[str] = set()  #: deliveries inside that count as doubtful
        self._lock = threading.Lock()

    @property
    def room(self) -> int:
        """How many more may come in."""
        return self._capacity - self._inside

    def admit(self, claim: Claim) -> float | None:
        """None: it is inside, until it leaves. Otherwise in how many seconds to ask again."""
        with self._lock:
            known = self._known(claim.destination)
            wait_s = self._wait_s(claim, known)
            if wait_s is None:
                self._enter(claim, known)
            return wait_s

    def _known(self, destination: str) -> _Destination:
        known = self._destinations.pop(destination, None) or _Destination()
        self._destinations[destination] = known  # now the youngest
        if len(self._destinations) > _REMEMBERED:
            oldest = next(iter(self._destinations))
            if self._destinations[oldest].inside == 0:
                del self._destinations[oldest]
        return known

    def _wait_s(self, claim: Claim, known: _Destination) -> float | None:
        now = self._clock()
        share = self._capacity * _SHARE
        if known.rest_until > now:
            return (known.rest_until - now) * random.uniform(1, 1.1)  # noqa: S311  # not a secret
        if known.inside >= known.places:
            return self._busy_s(known, now)
        if self._tenants[claim.tenant_id] >= share:
            return 1.0
        if self._inside >= self._capacity or (not known.good and self._doubtful >= share):
            return 1.0
        return None

    def _busy_s(self, known: _Destination, now: float) -> float:
        """One behind the other at the pace of the destination, so that few come in vain.

        A probe may hang: then at a pace that falls.
        """
        pace_s = known.seconds / AT_ONCE if known.good else max(now - known.probed_at, 0.1)
        head = now + (known.places * pace_s / 2 if known.good else 0)
        known.tail = min(max(known.tail, head) + pace_s, now + MAX_DEFER_S)
        return max(known.tail - now, 0.02)

    def _enter(self, claim: Claim, known: _Destination) -> None:
        self._inside += 1
        self._tenants[claim.tenant_id] += 1
        known.inside += 1
        if not known.good:
            known.probed_at = self._clock()
            self._doubtful += 1
            self._doubted.add(claim.id)

    def turns(self, claim: Claim) -> asyncio.Semaphore:
        """Eight of a destination's deliveries have their turn at once."""
        return self._destinations[claim.destination].turns

    def leave(self, claim: Claim) -> None:
        """It is sent, or handed back."""
        with self._lock:
            self._inside -= 1
            self._tenants[claim.tenant_id] -= 1
            if not self._tenants[claim.tenant_id]:
                del self._tenants[claim.tenant_id]
            self._destinations[claim.destination].inside -= 1
            if claim.id in self._doubted:
                self._doubted.remove(claim.id)
                self._doubtful -= 1

    def learn(
        self, claim: Claim, outcome: AttemptOutcome, seconds: float, *, rest_s: float | None = None
    ) -> bool:
        """How its destination behaved, and for how long it asked to be left alone.

        Whether others, who were put off because nobody could vouch for it, may come now.
        """
        with self._lock:
            known = self._destinations[claim.destination]
            if outcome is AttemptOutcome.HTTP_2XX:
                vouched = not known.good and known.tail > self._clock()
                known.seconds += (seconds - known.seconds) / (4 if known.answered else 1)
                known.answered, known.failures, known.rests = True, 0, 0
                known.tail = 0.0 if vouched else known.tail
                return vouched
            if rest_s:
                until = self._clock() + min(rest_s, _LONGEST_REST_S)
                known.rest_until = max(known.rest_until, until)
            known.failures += _TIMEOUT_WEIGHT if outcome is AttemptOutcome.TIMEOUT else 1
            if known.failures >= _OPEN_AFTER and known.rest_until <= self._clock():
                rest_s = min(_FIRST_REST_S * 2**known.rests, _LONGEST_REST_S)
                known.rest_until = self._clock() + rest_s
                known.rests += 1
            return False
