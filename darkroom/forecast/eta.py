"""ETA of a queued job: arithmetic over a queue snapshot and the measured throughput.

A job finishes after the microbatches ahead of it are claimed and its own is generated. The
microbatches are formed as `darkroom.queue.claims` forms them. Jobs that arrive meanwhile overtake
it: those of higher classes, and in its own class those of tenants that have used less of their
share (`darkroom.queue.fairness`). The one assumption is that they arrive as in the last minutes.

p50 and p90 are quantiles of a log-normal distribution, matched by its first two moments. Its mean
is the sum of the expected times; its variance is the observed one of microbatches, rate and
arrivals.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from darkroom.forecast.queue_position import QueuedJob, TailBucket, TenantShare
from darkroom.forecast.throughput import Throughput
from darkroom.generation.params import model_of
from darkroom.queue.fairness import AGEING, FADING

_Z90: Final = 1.2816  #: the standard normal's 90 % quantile
_ROUNDS: Final = 20  #: of the fixed point, whose error shrinks by the utilization each time
_TOLERANCE: Final = 0.001  #: relative change at which the fixed point ends
_NEGLIGIBLE: Final = 1e-3  #: cost a second of a tenant that last submitted hours ago
_MAX_S: Final = 30 * 86_400.0


@dataclass(frozen=True)
class Eta:
    """Seconds until a job finishes, with probability 50 % and 90 %."""

    p50_s: float
    p90_s: float


class EtaRequest(NamedTuple):
    """Job to forecast: a queued one, or one that may be submitted."""

    tenant_id: str
    priority: int
    start_tag: float
    id: str
    microbatch_key: str
    cost: float


class Forecast(NamedTuple):
    """Position and times of a job; the times are None while no rate is known."""

    position: int  #: 1 is next; exact in the front of its class, approximate in the tail
    starts_in_s: float | None  #: expected seconds until it is claimed
    eta: Eta | None


@dataclass
class _Microbatch:
    model: str
    cost: float = 0.0
    jobs: int = 0


@dataclass
class _ClassQueue:
    """Queued jobs of one class: the front one by one, the tail in cumulative sums."""

    #: of the front: each job's sort key, and the index of its microbatch
    rows: list[tuple[float, str]] = field(default_factory=list)
    microbatch_of: list[int] = field(default_factory=list)
    front_end: int = 0  #: microbatches to the end of the front, including those of higher classes
    #: of the tail: tags, and the jobs, microbatches and seconds up to each
    tags: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    microbatches: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class EtaModel:
    """Model of the queue at one moment, from which ETAs are computed."""

    def __init__(
        self,
        front: Sequence[QueuedJob],
        tail: Sequence[TailBucket],
        tenants: Sequence[TenantShare],
        throughput: Throughput | None,
        *,
        max_microbatch: Mapping[str, int],
    ) -> None:
        """Take `max_microbatch` by model; jobs of other models are ignored."""
        self._throughput = throughput
        self._max_microbatch = max_microbatch
        self._tenants = tenants
        self._active = [each for each in tenants if each.cost_per_s > _NEGLIGIBLE]
        self._microbatches: list[_Microbatch] = []
        self._open: dict[str, int] = {}  # by key, the last microbatch, which may have room
        self._costs: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # by key: jobs, cost
        self._classes: dict[int, _ClassQueue] = {}
        by_class: dict[int, tuple[list[QueuedJob], list[TailBucket]]] = defaultdict(
            lambda: ([], [])
        )
        for job in front:
            by_class[job.priority][0].append(job)
        for bucket in tail:
            by_class[bucket.priority][1].append(bucket)
        for rank, (jobs, buckets) in sorted(by_class.items()):
            self._add_front(rank, jobs)
            self._add_tail(rank, buckets)
        self._starts_s = self._cumulated_seconds()

    def _add_front(self, rank: int, jobs: Iterable[QueuedJob]) -> None:
        queue = _ClassQueue()
        for job in jobs:
            model = model_of(job.microbatch_key)
            if model not in self._max_microbatch:
                continue
            index = self._microbatch_for(job.microbatch_key, model)
            self._microbatches[index].jobs += 1
            self._microbatches[index].cost += job.cost
            queue.rows.append((job.start_tag, job.id))
            queue.microbatch_of.append(index)
            totals = self._costs[job.microbatch_key]
            totals[0] += 1
            totals[1] += job.cost
        queue.front_end = len(self._microbatches)
        self._classes[rank] = queue

    def _microbatch_for(self, key: str, model: str) -> int:
        index = self._open.get(key)
        if index is None or self._microbatches[index].jobs >= self._max_microbatch[model]:
            index = self._open[key] = len(self._microbatches)
            self._microbatches.append(_Microbatch(model))
        return index

    def _add_tail(self, rank: int, buckets: Sequence[TailBucket]) -> None:
        """Append the tail of a class in cumulative sums; its microbatches are taken as full."""
        queue = self._classes[rank]
        front_tag = queue.rows[-1][0] if queue.rows else -math.inf
        jobs, microbatches, seconds = float(len(queue.rows)), 0.0, 0.0
        for bucket in buckets:
            model = model_of(bucket.microbatch_key)
            if model not in self._max_microbatch or bucket.last_tag <= front_tag:
                continue  # the front has moved past it since the scan
            full = bucket.jobs / self._max_microbatch[model]
            jobs += bucket.jobs
            microbatches += full
            if self._throughput is not None:
                times = self._throughput.of(model)
                seconds += times.per_microbatch_s * full + times.per_cost_s * bucket.cost
            queue.tags.append(bucket.last_tag)
            queue.jobs.append(jobs)
            queue.microbatches.append(microbatches)
            queue.seconds.append(seconds)

    def _cumulated_seconds(self) -> list[float]:
        """Return the seconds before each microbatch, and of all of them."""
        seconds = [0.0]
        for each in self._microbatches:
            service_s = (
                self._throughput.of(each.model).seconds(each.cost) if self._throughput else 0.0
            )
            seconds.append(seconds[-1] + service_s)
        return seconds

    def ask(self, request: EtaRequest) -> Forecast:
        """Return the position of a job and, if a rate is known, its times."""
        ahead = self._ahead(request)
        position = round(ahead.jobs) + 1
        if self._throughput is None:
            return Forecast(position, None, None)
        return Forecast(position, *self._times(request, ahead, self._throughput))

    def in_flight(self) -> Eta | None:
        """Return the ETA of the last running dispatch."""
        if self._throughput is None or not self._throughput.running:
            return None
        last = max(self._throughput.remaining_s)
        return _quantiles(last, (self._throughput.overall.relative_stddev * last) ** 2)

    def of_more(self, tenant_id: str, priority: int, cost: float) -> Eta | None:
        """Return the ETA of the last of new jobs of this tenant, class and total cost."""
        if self._throughput is None:
            return None
        shares = [
            each
            for each in self._tenants
            if (each.tenant_id, each.priority) == (tenant_id, priority)
        ]
        tag = max([self._present(priority, 0.0), *(each.next_start_tag for each in shares)])
        tag += cost / (shares[0].weight if shares else 1.0)
        last = EtaRequest(tenant_id, priority, tag, "", "", 0.0)
        seconds = cost * self._throughput.per_cost_s
        ahead = self._ahead(last).plus(0.0, seconds / self._throughput.microbatch_s, seconds)
        return self._times(last, ahead, self._throughput)[1]

    def _present(self, priority: int, default: float) -> float:
        """Return the smallest start tag of a class: its virtual time."""
        queue = self._classes.get(priority)
        return queue.rows[0][0] if queue and queue.rows else default

    def _ahead(self, request: EtaRequest) -> "_Ahead":
        above = [queue for rank, queue in self._classes.items() if rank < request.priority]
        ahead = _Ahead(float(sum(_jobs(queue) for queue in above)), 0.0, 0.0)
        ahead = ahead.plus(
            0.0, *map(sum, zip(*map(_tail_total, above), strict=True)) if above else (0, 0)
        )
        own = self._classes.get(request.priority)
        if own is None or not own.rows:
            front_end = max((queue.front_end for queue in above), default=0)
            return ahead.plus(0.0, *self._front_ahead(front_end, request))
        index = bisect_left(own.rows, (request.start_tag, request.id))
        ahead = ahead.plus(float(index), 0.0, 0.0)
        if index < len(own.rows):
            microbatch = own.microbatch_of[index]
            return ahead.plus(0.0, float(microbatch), self._starts_s[microbatch])
        ahead = ahead.plus(0.0, *self._front_ahead(own.front_end, request))
        return ahead.plus(*_tail_up_to(own, request.start_tag))

    def _front_ahead(self, front_end: int, request: EtaRequest) -> tuple[float, float]:
        """Return the microbatches and seconds of the front, up to one with room for the job."""
        index = self._open.get(request.microbatch_key, front_end)
        model = model_of(request.microbatch_key)
        limit = self._max_microbatch.get(model, 1)
        has_room = index < front_end and self._microbatches[index].jobs < limit
        end = index if has_room else front_end
        return float(end), self._starts_s[end]

    def _times(
        self, request: EtaRequest, ahead: "_Ahead", throughput: Throughput
    ) -> tuple[float, Eta]:
        """Return the expected seconds until the job is claimed, and its ETA."""
        times = throughput.of(model_of(request.microbatch_key))
        wait = throughput.next_slot_s + ahead.seconds
        wait, variance = self._overtaken(request, wait, throughput)
        own = times.seconds(self._own_cost(request))
        idle = not throughput.running and not ahead.microbatches
        duration = own * (1.0 if idle else max(1.0, throughput.concurrency))
        each_ahead = _mean(ahead.seconds, ahead.microbatches)
        variance += ahead.microbatches * (times.relative_stddev * each_ahead) ** 2
        variance += throughput.concurrency * (times.relative_stddev * own) ** 2
        variance += (times.rate_drift * (wait + duration)) ** 2
        return wait, _quantiles(wait + duration, variance)

    def _own_cost(self, request: EtaRequest) -> float:
        """Return the cost of the job's microbatch, as full as its key has queued jobs."""
        jobs, cost = self._costs.get(request.microbatch_key, (0.0, 0.0))
        if not jobs:
            return request.cost
        limit = self._max_microbatch.get(model_of(request.microbatch_key), 1)
        return max(request.cost, min(jobs, limit) * cost / jobs)

    def _overtaken(
        self, request: EtaRequest, wait: float, throughput: Throughput
    ) -> tuple[float, float]:
        """Return the wait, extended by arrivals that overtake the job, and its variance.

        The fixed point of T = (wait + arrivals in T) / (1 - utilization by higher classes), as for
        the delay in a preemptive-resume priority queue; arrivals are compound Poisson, whose
        variance is the rate of squared costs.
        """
        above = [each for each in self._active if each.priority < request.priority]
        beside = [
            each
            for each in self._active
            if each.priority == request.priority and each.tenant_id != request.tenant_id
        ]
        present = self._present(request.priority, request.start_tag)
        per_cost = throughput.per_cost_s
        busy = sum(each.cost_per_s for each in above) * per_cost
        busy += self._aged_share_below(request, throughput)
        share = max(1.0 - busy, self._aged_share(request, throughput))
        total = wait / share
        for _ in range(_ROUNDS):
            others = sum(
                min(each.cost_per_s * total, _room(each, request, present)) for each in beside
            )
            before, total = total, min((wait + others * per_cost) / share, _MAX_S)
            if total - before <= _TOLERANCE * total:
                break
        squares = sum(each.squares_per_s for each in above) * total
        squares += sum(
            min(each.squares_per_s * total, _room(each, request, present) ** 2 / 4)
            for each in beside
        )
        extrapolation = 1.0 + total / (2 * FADING)  # the rates were measured over FADING seconds
        return total, squares * extrapolation * (per_cost / share) ** 2

    def _aged_share_below(self, request: EtaRequest, throughput: Throughput) -> float:
        """Return the share of the time that lower classes get by ageing."""
        lower = [
            rank for rank, queue in self._classes.items() if rank > request.priority and queue.rows
        ]
        service_s = throughput.microbatch_s
        return sum(
            service_s / (AGEING.total_seconds() * (rank - request.priority)) for rank in lower
        )

    def _aged_share(self, request: EtaRequest, throughput: Throughput) -> float:
        """Return the share that the job's class gets by ageing, whatever arrives above it."""
        service_s = throughput.microbatch_s
        return service_s / (AGEING.total_seconds() * max(request.priority, 1) + service_s)


class _Ahead(NamedTuple):
    jobs: float
    microbatches: float
    seconds: float

    def plus(self, jobs: float, microbatches: float, seconds: float) -> "_Ahead":
        return _Ahead(self.jobs + jobs, self.microbatches + microbatches, self.seconds + seconds)


def _jobs(queue: _ClassQueue) -> float:
    return queue.jobs[-1] if queue.jobs else float(len(queue.rows))


def _tail_total(queue: _ClassQueue) -> tuple[float, float]:
    """Return the microbatches and seconds of the tail."""
    return (queue.microbatches[-1], queue.seconds[-1]) if queue.tags else (0.0, 0.0)


def _tail_up_to(queue: _ClassQueue, tag: float) -> tuple[float, float, float]:
    """Return the jobs, microbatches and seconds of the tail up to `tag`."""
    if not queue.tags:
        return 0.0, 0.0, 0.0
    index = min(bisect_left(queue.tags, tag), len(queue.tags) - 1)
    jobs = queue.jobs[index] - len(queue.rows)
    return jobs, queue.microbatches[index], queue.seconds[index]


def _room(other: TenantShare, request: EtaRequest, present: float) -> float:
    """Return the highest cost of this tenant's new jobs that are served before the request."""
    return max(0.0, request.start_tag - max(other.next_start_tag, present)) * other.weight


def _mean(total: float, number: float) -> float:
    return total / number if number else 0.0


def _quantiles(mean: float, variance: float) -> Eta:
    """Return p50 and p90 of the log-normal distribution with these moments.

    Its sigma squared is ln(1 + variance / mean squared), its median mean x exp(-sigma squared / 2).
    """
    sigma_squared = math.log1p(variance / mean**2) if mean > 0 else 0.0
    median = mean * math.exp(-sigma_squared / 2)
    return Eta(median, median * math.exp(_Z90 * math.sqrt(sigma_squared)))
