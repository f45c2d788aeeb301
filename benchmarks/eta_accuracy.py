"""Accuracy of ETAs: a simulated hour of mixed load, and the error of each forecast.

`python -m benchmarks.eta_accuracy [--minutes 60] [--seeds 1] [--replicas 2]`. The database and
every statement are real: jobs are submitted, claimed, settled and forecast by the product's own
functions. Only time is simulated: `search_path` finds a `now()` before PostgreSQL's, which reads
the moment that the simulation has set. So an hour takes minutes, and the same seed gives the same
hour.

Five tenants with different weights submit single jobs and batches in all classes, three sizes and 4
to 30 steps, at random (Poisson), some of them in bursts; the replicas are busy for about three
quarters of the hour. A replica generates one microbatch at a time; its worker keeps two in flight.
A microbatch takes `(0.4 + 0.05 x cost)` seconds, with 15 % random deviation (log-normal) and a 10 %
wave of 20 minutes. The forecast knows only what the database shows.

Every few seconds a queued job of each class is forecast, and the last job of a batch. When they
have finished, the forecasts are compared with the actual times. Printed for each class: the number
of forecasts, the median of |p50 - actual| / actual, the share within 30 %, the share of jobs that
took longer than p50 (half of them, ideally), and the share that finished within p90.
"""

import argparse
import heapq
import itertools
import math
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from benchmarks._support import database_server
from darkroom import batches
from darkroom.db.connection import Sessions, migrate, open_sessions
from darkroom.db.tables import Job, Tenant
from darkroom.forecast import queue_position, snapshot
from darkroom.generation.model_registry import ModelRegistry, load_registry
from darkroom.generation.params import JobInput
from darkroom.jobs import lifecycle
from darkroom.jobs.bulk_insert import NewJob
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Succeeded
from darkroom.settings import Settings
from darkroom.status import Priority

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(hours=1)  # no worker crashes here
IN_FLIGHT = 2  #: dispatches of a worker
FORECAST_INTERVAL_S = 10.0
WARM_UP_S = 300.0
CLOCK = """
    CREATE SCHEMA simulated;
    CREATE FUNCTION simulated.now() RETURNS timestamptz LANGUAGE sql STABLE AS $$
        SELECT coalesce(nullif(current_setting('simulated.now', true), '')::timestamptz,
                        pg_catalog.now())
    $$;
"""


@dataclass(frozen=True)
class Source:
    """Random submissions of one tenant."""

    tenant_id: str
    weight: float
    priority: Priority
    every_s: float  #: between two submissions, on average
    min_jobs: int  #: of one submission
    max_jobs: int
    size: int  #: of the images, pixels
    steps: tuple[int, int]


SOURCES = (
    Source("ten_web", 1, Priority.INTERACTIVE, 6, 1, 1, 256, (4, 12)),
    Source("ten_web", 1, Priority.INTERACTIVE, 200, 8, 30, 256, (4, 12)),
    Source("ten_app", 1, Priority.NORMAL, 3, 1, 1, 256, (8, 30)),
    Source("ten_lab", 2, Priority.NORMAL, 300, 20, 80, 128, (8, 30)),
    Source("ten_shop", 2, Priority.BULK, 500, 50, 400, 256, (8, 20)),
    Source("ten_studio", 1, Priority.BULK, 600, 200, 1200, 192, (10, 30)),
)


@dataclass(frozen=True)
class RecordedForecast:
    """Forecast of one job, to be compared with its actual time."""

    job_id: str
    kind: str
    at_s: float
    p50_s: float
    p90_s: float


@dataclass
class SimulatedReplica:
    """Replica that generates one microbatch after the other."""

    free_at_s: float = 0.0
    in_flight: int = 0


@dataclass
class Simulation:
    """Installation in simulated time. `events`: scheduled calls by time."""

    sessions: Sessions
    registry: ModelRegistry
    rng: random.Random
    replicas: list[SimulatedReplica]
    sources: tuple[Source, ...] = SOURCES
    now_s: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    forecasts: list[RecordedForecast] = field(default_factory=list)
    finished: dict[str, float] = field(default_factory=dict)
    busy_s: float = 0.0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def at(self, moment_s: float, call: Callable[[], None]) -> None:
        """Schedule a call."""
        heapq.heappush(self.events, (moment_s, next(self._numbers), call))

    def transaction(self) -> Session:
        """Open a session whose `now()` is the simulated moment."""
        session = self.sessions()
        moment = BEGIN + timedelta(seconds=self.now_s)
        session.execute(
            text("SELECT set_config('simulated.now', :now, false)"), {"now": moment.isoformat()}
        )
        return session

    def run(self, until_s: float) -> Iterator[float]:
        """Run until that moment; yield the time of each event."""
        while self.events and self.events[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(self.events)
            call()
            yield self.now_s

    def arrive(self, source: Source) -> None:
        """Submit jobs, and schedule the source's next submission."""
        number = self.rng.randint(source.min_jobs, source.max_jobs)
        with self.transaction() as session:
            batch_id = None
            if number > 1:
                batch_id = batches.create(session, source.tenant_id, total=number).id
            jobs = [
                self._new_job(source, row if batch_id else None) for row in range(1, number + 1)
            ]
            lifecycle.submit(session, source.tenant_id, jobs, batch_id=batch_id)
            session.commit()
        self.at(self.now_s + self.rng.expovariate(1 / source.every_s), lambda: self.arrive(source))
        self.claim_all()

    def _new_job(self, source: Source, row_number: int | None) -> NewJob:
        job = JobInput(
            prompt="a red apple",
            priority=source.priority,
            width=source.size,
            height=source.size,
            num_inference_steps=self.rng.randint(*source.steps),
        )
        params = self.registry.resolve(job)
        key = self.registry.models[params.model].microbatch_key(params)
        return NewJob.of(job, params, key, row_number=row_number)

    def claim_all(self) -> None:
        """Let every worker with a free slot claim; a busy one lingers first, as in the product."""
        for replica in self.replicas:
            while replica.in_flight < IN_FLIGHT and self.claim(replica, lingering=True):
                pass
            if replica.in_flight in range(1, IN_FLIGHT):
                linger_s = max(claims.LINGER).total_seconds()
                self.at(self.now_s + linger_s, lambda it=replica: self.after_linger(it))  # type: ignore[misc]

    def after_linger(self, replica: SimulatedReplica) -> None:
        """Claim a microbatch however full it is."""
        if replica.in_flight < IN_FLIGHT:
            self.claim(replica, lingering=False)

    def claim(self, replica: SimulatedReplica, *, lingering: bool) -> bool:
        """Claim a microbatch. Return whether there was one."""
        limits = {model.name: model.max_microbatch for model in self.registry.models.values()}
        idle = not (lingering and replica.in_flight)
        with self.transaction() as session:
            jobs = claims.claim(session, "worker", max_microbatch=limits, lease=LEASE, idle=idle)
            session.commit()
        if not jobs:
            return False
        starts_s = max(self.now_s, replica.free_at_s)
        takes_s = self.takes_s(sum(job.cost for job in jobs))
        replica.free_at_s = starts_s + takes_s
        self.busy_s += takes_s
        replica.in_flight += 1
        self.at(replica.free_at_s, lambda: self.settle(replica, jobs))
        return True

    def takes_s(self, cost: float) -> float:
        """Return the seconds of a microbatch of this cost, now."""
        slow = 1 + 0.1 * math.sin(2 * math.pi * self.now_s / 1200)
        return (0.4 + 0.05 * cost) * slow * self.rng.lognormvariate(0, 0.15)

    def settle(self, replica: SimulatedReplica, jobs: Sequence[Job]) -> None:
        """Finish a microbatch."""
        replica.in_flight -= 1
        outcomes = [
            Succeeded(
                job.id,
                image_key="k",
                image_sha256="0" * 64,
                image_bytes=1,
                inference_ms=1,
                upload_ms=1,
            )
            for job in jobs
        ]
        with self.transaction() as session:
            dispatches.settle(session, jobs[0].dispatch_id or 0, outcomes)
            session.commit()
        self.finished |= {job.id: self.now_s for job in jobs}
        self.claim_all()

    def ask(self) -> None:
        """Forecast a queued job of each class, and the last job of a queued batch."""
        with self.transaction() as session:
            seen = snapshot.take_snapshot(session, self.registry)
            for job, kind in self._sample(session):
                forecast = seen.ask(job)
                if forecast.eta is not None:
                    eta = forecast.eta
                    self.forecasts.append(
                        RecordedForecast(job.id, kind, self.now_s, eta.p50_s, eta.p90_s)
                    )
            session.rollback()
        self.at(self.now_s + FORECAST_INTERVAL_S, self.ask)

    def _sample(self, session: Session) -> Iterator[tuple[Job, str]]:
        for rank, priority in enumerate(Priority):
            waiting = session.scalars(
                text("SELECT id FROM job WHERE status = 'queued' AND priority = :rank ORDER BY id"),
                {"rank": rank},
            ).all()
            if waiting:
                yield session.get_one(Job, self.rng.choice(waiting)), str(priority)
        waiting = session.scalars(
            text(
                "SELECT DISTINCT batch_id FROM job "
                "WHERE status = 'queued' AND batch_id IS NOT NULL ORDER BY 1"
            )
        ).all()
        if waiting:
            last = queue_position.last_of(session, self.rng.choice(waiting))
            if last is not None:
                yield last, "batch"


def prepare(url: str) -> Sessions:
    """Create a database with the simulated `now()` and the tenants."""
    name = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(CLOCK)
        connection.execute(f"ALTER DATABASE {name} SET search_path = public, simulated, pg_catalog")
    migrate(url)
    sessions = open_sessions(url, pool_size=1)
    with sessions.begin() as session:
        for tenant_id, weight in {(each.tenant_id, each.weight) for each in SOURCES}:
            session.execute(insert(Tenant).values(id=tenant_id, name=tenant_id, weight=weight))
        session.execute(text("SET SESSION synchronous_commit = off"))
    return sessions


def simulate(
    url: str,
    registry: ModelRegistry,
    *,
    seed: int,
    replicas: int,
    minutes: float,
    warm_up_s: float = WARM_UP_S,
) -> Simulation:
    """Run one simulation."""
    simulation = Simulation(
        prepare(url), registry, random.Random(seed), [SimulatedReplica() for _ in range(replicas)]
    )
    for source in simulation.sources:
        first_s = simulation.rng.expovariate(1 / source.every_s)
        simulation.at(min(first_s, 60.0), lambda it=source: simulation.arrive(it))  # type: ignore[misc]
    simulation.at(warm_up_s, simulation.ask)
    until_s = warm_up_s + 60 * minutes
    for _ in simulation.run(until_s):
        pass
    simulation.sessions.kw["bind"].dispose()
    return simulation


@dataclass(frozen=True)
class Score:
    """Accuracy of the forecasts of one kind."""

    number: int
    median_error: float  #: |p50 - actual| / actual
    within_30: float
    longer_than_p50: float
    within_p90: float


def scores(simulation: Simulation) -> dict[str, Score]:
    """Score the forecasts of finished jobs, by class; `all` is of the three classes."""
    kinds = defaultdict(list)
    for forecast in simulation.forecasts:
        if forecast.job_id in simulation.finished:
            actual_s = simulation.finished[forecast.job_id] - forecast.at_s
            kinds[forecast.kind].append((forecast, actual_s))
    kinds["all"] = [pair for kind, pairs in kinds.items() if kind != "batch" for pair in pairs]
    return {kind: _score(pairs) for kind, pairs in kinds.items()}


def _score(pairs: list[tuple[RecordedForecast, float]]) -> Score:
    errors = [abs(forecast.p50_s - actual) / actual for forecast, actual in pairs]
    return Score(
        len(pairs),
        statistics.median(errors),
        statistics.fmean(error <= 0.3 for error in errors),
        statistics.fmean(actual > forecast.p50_s for forecast, actual in pairs),
        statistics.fmean(actual <= forecast.p90_s for forecast, actual in pairs),
    )


def main() -> None:
    """Simulate, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="simulated (default 60)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="simulations, one per seed (default 1)"
    )
    parser.add_argument("--replicas", type=int, default=2, help="of the model (default 2)")
    arguments = parser.parse_args()
    settings = Settings()
    registry = load_registry(settings.models_dir, settings.default_model)
    with tempfile.TemporaryDirectory() as folder, database_server(Path(folder)) as admin_url:
        for seed in track(
            range(1, arguments.seeds + 1), "simulating", console=Console(stderr=True)
        ):
            name = f"eta_{seed}"
            with psycopg.connect(admin_url, autocommit=True) as admin:
                admin.execute(f"CREATE DATABASE {name}")
            url = f"{admin_url.rpartition('/')[0]}/{name}"
            done = simulate(
                url,
                registry,
                seed=seed,
                replicas=arguments.replicas,
                minutes=arguments.minutes,
            )
            print_scores(seed, done)


def print_scores(seed: int, done: Simulation) -> None:
    """Print a line for each class."""
    busy = done.busy_s / len(done.replicas) / done.now_s
    title = (
        f"seed {seed}: {len(done.finished):,} jobs finished, replicas busy {busy:.0%} of the time"
    )
    table = Table(
        "class",
        "forecasts",
        "median error",
        "within 30 %",
        "longer than p50",
        "within p90",
        title=title,
    )
    for kind, score in scores(done).items():
        table.add_row(
            kind,
            str(score.number),
            *(
                f"{value:.1%}"
                for value in (
                    score.median_error,
                    score.within_30,
                    score.longer_than_p50,
                    score.within_p90,
                )
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
