"""How long a waiting job will still take: arithmetic over what waits and how fast it is drawn.

A job is done once the microbatches ahead of it have been claimed and its own is drawn. The
microbatches are formed as `darkroom.queue.claims` forms them; meanwhile others arrive and go before
it: those of classes above, and of its own class those whose tenants have used up less of their
share. That they go on to arrive as in the last minutes is the one assumption.

The half-time estimate and the one for nine in ten are quantiles of a log-normal distribution. Its
mean is the sum of what is expected; its variance is that which was observed, of the microbatches,
of their rate, and of what arrives.
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
_ROUNDS: Final = 20  #: of the fixed point; it closes in by the utilization each time
_CLOSE: Final = 0.001  #: and no further than this
_NEGLIGIBLE: Final = 1e-3  #: cost a second: a tenant that was here hours ago
_MOST_S: Final = 30 * 86_400.0


@dataclass(frozen=True)
class Eta:
    """Seconds until the end of a job: in one of two cases sooner, in nine of ten."""

    p50_s: float
    p90_s: float


class EtaRequest(NamedTuple):
    """What is asked about: a job that waits, or would."""

    tenant_id: str
    priority: int
    start_tag: float
    id: str
    microbatch_key: str
    cost: float


class Forecast(NamedTuple):
    """Where a job stands, and how long it will take; None where no rate is known yet."""

    position: int  #: 1 is next; exact among the first thousand of a class, by and large behind
    begins_s: float | None  #: when it will be claimed, in half of all cases
    eta: Eta | None


@dataclass
class _Microbatch:
    model: str
    cost: float = 0.0
    jobs: int = 0


@dataclass
class _Class:
    """The waiting jobs of one class: first one by one, then sums."""

    #: of the front: each job's place in the order, and which microbatch it goes into
    rows: list[tuple[float, str]] = field(default_factory=list)
    seats: list[int] = field(default_factory=list)
    last: int = 0  #: microbatches up to the end of the front, those of the classes above too
    #: behind the front: tags, and how many jobs, microbatches and seconds lie before each
    tags: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    microbatches: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class EtaModel:
    """What waits at one moment, and at what pace it goes."""

    def __init__(
        self,
        front: Sequence[QueuedJob],
        behind: Sequence[TailBucket],
        tenancies: Sequence[TenantShare],
        pace: Throughput | None,
        *,
        seats: Mapping[str, int],
    ) -> None:
        """`seats`: of a microbatch, by model; jobs of other models are not drawn, nor counted."""
        self._pace = pace
        self._seats = seats
        self._tenancies = tenancies
        self._arriving = [each for each in tenancies if each.cost_per_s > _NEGLIGIBLE]
        self._microbatches: list[_Microbatch] = []
        self._open: dict[str, int] = {}  # by key, the microbatch that still has seats
        self._costs: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # by key: jobs, cost
        self._classes: dict[int, _Class] = {}
        by_class: dict[int, tuple[list[QueuedJob], list[TailBucket]]] = defaultdict(
            lambda: ([], [])
        )
        for job in front:
            by_class[job.priority][0].append(job)
        for each in behind:
            by_class[each.priority][1].append(each)
        for rank, (rows, sums) in sorted(by_class.items()):
            self._seat(rank, rows)
            self._stack(rank, sums)
        self._until = self._cumulated()

    def _seat(self, rank: int, rows: Iterable[QueuedJob]) -> None:
        waiting = _Class()
        for job in rows:
            model = model_of(job.microbatch_key)
            if model not in self._seats:
                continue
            at = self._place_of(job.microbatch_key, model)
            self._microbatches[at].jobs += 1
            self._microbatches[at].cost += job.cost
            waiting.rows.append((job.start_tag, job.id))
            waiting.seats.append(at)
            known = self._costs[job.microbatch_key]
            known[0] += 1
            known[1] += job.cost
        waiting.last = len(self._microbatches)
        self._classes[rank] = waiting

    def _place_of(self, key: str, model: str) -> int:
        at = self._open.get(key)
        if at is None or self._microbatches[at].jobs >= self._seats[model]:
            at = self._open[key] = len(self._microbatches)
            self._microbatches.append(_Microbatch(model))
        return at

    def _stack(self, rank: int, sums: Sequence[TailBucket]) -> None:
        """Behind the rows of the class, sums; they fill microbatches whole."""
        waiting = self._classes[rank]
        reached = waiting.rows[-1][0] if waiting.rows else -math.inf
        jobs, microbatches, seconds = float(len(waiting.rows)), 0.0, 0.0
        for each in sums:
            model = model_of(each.microbatch_key)
            if model not in self._seats or each.last_tag <= reached:
                continue  # the front has moved on since they were summed
            waiting.tags.append(each.last_tag)
            jobs += each.jobs
            microbatches += each.jobs / self._seats[model]
            if self._pace is not None:
                fit = self._pace.of(model)
                seconds += fit.per_microbatch_s * each.jobs / self._seats[model]
                seconds += fit.per_cost_s * each.cost
            waiting.jobs.append(jobs)
            waiting.microbatches.append(microbatches)
            waiting.seconds.append(seconds)

    def _cumulated(self) -> list[float]:
        """The seconds that the microbatches take before each, and all together."""
        until = [0.0]
        for each in self._microbatches:
            until.append(
                until[-1] + (self._pace.of(each.model).seconds(each.cost) if self._pace else 0.0)
            )
        return until

    def ask(self, subject: EtaRequest) -> Forecast:
        """Where the job stands, and how long it will take."""
        ahead = self._ahead(subject)
        position = round(ahead.jobs) + 1
        if self._pace is None:
            return Forecast(position, None, None)
        return Forecast(position, *self._times(subject, ahead, self._pace))

    def in_flight(self) -> Eta | None:
        """When what is being drawn now will have ended."""
        if self._pace is None or not self._pace.running:
            return None
        last = max(self._pace.residues_s)
        return _quantiles(last, (self._pace.overall.relative_stddev * last) ** 2)

    def of_more(self, tenant_id: str, priority: int, cost: float) -> Eta | None:
        """When the last of new jobs of the tenant that cost so much would have ended."""
        if self._pace is None:
            return None
        theirs = [
            each
            for each in self._tenancies
            if (each.tenant_id, each.priority) == (tenant_id, priority)
        ]
        waiting = self._classes.get(priority)
        present = waiting.rows[0][0] if waiting and waiting.rows else 0.0
        tag = max([present, *(each.next_start_tag for each in theirs)])
        tag += cost / (theirs[0].weight if theirs else 1.0)
        last = EtaRequest(tenant_id, priority, tag, "", "", 0.0)
        seconds = cost * self._pace.per_cost_s
        ahead = self._ahead(last).plus(0.0, seconds / self._pace.microbatch_s, seconds)
        return self._times(last, ahead, self._pace)[1]

    def _ahead(self, subject: EtaRequest) -> "_Ahead":
        above = [each for rank, each in self._classes.items() if rank < subject.priority]
        before = _Ahead(float(sum(_jobs(each) for each in above)), 0.0, 0.0)
        before = before.plus(
            0.0, *map(sum, zip(*map(_deep, above), strict=True)) if above else (0, 0)
        )
        mine = self._classes.get(subject.priority)
        if mine is None or not mine.rows:
            last = max((each.last for each in above), default=0)
            return before.plus(0.0, *self._front(last, subject))
        at = bisect_left(mine.rows, (subject.start_tag, subject.id))
        before = before.plus(float(at), 0.0, 0.0)
        if at < len(mine.rows):
            return before.plus(0.0, float(mine.seats[at]), self._until[mine.seats[at]])
        before = before.plus(0.0, *self._front(mine.last, subject))
        return before.plus(*_between(mine, subject.start_tag))

    def _front(self, last: int, subject: EtaRequest) -> tuple[float, float]:
        """All microbatches of the front; less the one in which the job finds a seat, if any."""
        at = self._open.get(subject.microbatch_key, last)
        model = model_of(subject.microbatch_key)
        free = at < last and self._microbatches[at].jobs < self._seats.get(model, 1)
        last = at if free else last
        return float(last), self._until[last]

    def _times(self, subject: EtaRequest, ahead: "_Ahead", pace: Throughput) -> tuple[float, Eta]:
        """When it will be claimed, and when it will have ended."""
        fit = pace.of(model_of(subject.microbatch_key))
        wait = pace.next_seat_s + ahead.seconds
        total, variance = self._overtaken(subject, wait, pace)
        own = fit.seconds(self._own_cost(subject))
        idle = not pace.running and not ahead.microbatches
        lasts = own * (1.0 if idle else max(1.0, pace.company))
        variance += (
            ahead.microbatches
            * (fit.relative_stddev * _mean(ahead.seconds, ahead.microbatches)) ** 2
        )
        variance += pace.company * (fit.relative_stddev * own) ** 2
        variance += (fit.rate_drift * (total + lasts)) ** 2
        return total, _quantiles(total + lasts, variance)

    def _own_cost(self, subject: EtaRequest) -> float:
        """Of the microbatch it will be in: as full as jobs of its key wait."""
        jobs, cost = self._costs.get(subject.microbatch_key, (0.0, 0.0))
        if not jobs:
            return subject.cost
        seats = self._seats.get(model_of(subject.microbatch_key), 1)
        return max(subject.cost, min(jobs, seats) * cost / jobs)

    def _overtaken(self, subject: EtaRequest, wait: float, pace: Throughput) -> tuple[float, float]:
        """The wait with all that arrives meanwhile and goes before it; and its variance."""
        above = [each for each in self._arriving if each.priority < subject.priority]
        beside = [
            each
            for each in self._arriving
            if each.priority == subject.priority and each.tenant_id != subject.tenant_id
        ]
        waiting = self._classes.get(subject.priority)
        present = waiting.rows[0][0] if waiting and waiting.rows else subject.start_tag
        per_cost = pace.per_cost_s
        busy = sum(each.cost_per_s for each in above) * per_cost + self._turns_below(subject, pace)
        share = max(1.0 - busy, self._own_turns(subject, pace))
        total = wait / share
        for _ in range(_ROUNDS):
            others = sum(
                min(each.cost_per_s * total, _room(each, subject, present)) for each in beside
            )
            before, total = total, min((wait + others * per_cost) / share, _MOST_S)
            if total - before <= _CLOSE * total:
                break
        varied = sum(each.squares_per_s for each in above) * total
        varied += sum(
            min(each.squares_per_s * total, _room(each, subject, present) ** 2 / 4)
            for each in beside
        )
        rates_are_guesses = 1.0 + total / (2 * FADING)
        return total, varied * rates_are_guesses * (per_cost / share) ** 2

    def _turns_below(self, subject: EtaRequest, pace: Throughput) -> float:
        """What classes below take by their age, as a share of the time."""
        lower = [
            rank for rank, each in self._classes.items() if rank > subject.priority and each.rows
        ]
        turn = pace.microbatch_s
        return sum(turn / (AGEING.total_seconds() * (rank - subject.priority)) for rank in lower)

    def _own_turns(self, subject: EtaRequest, pace: Throughput) -> float:
        """What its class gets by its age at least, however much arrives above it."""
        turn = pace.microbatch_s
        return turn / (AGEING.total_seconds() * max(subject.priority, 1) + turn)


class _Ahead(NamedTuple):
    jobs: float
    microbatches: float
    seconds: float

    def plus(self, jobs: float, microbatches: float, seconds: float) -> "_Ahead":
        return _Ahead(self.jobs + jobs, self.microbatches + microbatches, self.seconds + seconds)


def _jobs(waiting: _Class) -> float:
    return waiting.jobs[-1] if waiting.jobs else float(len(waiting.rows))


def _deep(waiting: _Class) -> tuple[float, float]:
    """Microbatches and seconds behind its front."""
    return (waiting.microbatches[-1], waiting.seconds[-1]) if waiting.tags else (0.0, 0.0)


def _between(waiting: _Class, tag: float) -> tuple[float, float, float]:
    """Jobs, microbatches and seconds from the end of the front up to the tag."""
    at = bisect_left(waiting.tags, tag)
    rows = float(len(waiting.rows))
    if not waiting.tags:
        return 0.0, 0.0, 0.0
    if at == len(waiting.tags):
        return waiting.jobs[-1] - rows, waiting.microbatches[-1], waiting.seconds[-1]
    return waiting.jobs[at] - rows, waiting.microbatches[at], waiting.seconds[at]


def _room(other: TenantShare, subject: EtaRequest, present: float) -> float:
    """The most that this tenant's coming jobs can cost and yet stand before the subject."""
    return max(0.0, subject.start_tag - max(other.next_start_tag, present)) * other.weight


def _mean(total: float, number: float) -> float:
    return total / number if number else 0.0


def _quantiles(mean: float, variance: float) -> Eta:
    """Of the log-normal distribution with these moments."""
    squared = math.log1p(variance / mean**2) if mean > 0 else 0.0
    median = mean * math.exp(-squared / 2)
    return Eta(median, median * math.exp(_Z90 * math.sqrt(squared)))
