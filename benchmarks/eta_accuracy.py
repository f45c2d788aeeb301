"""How good the forecasts are: a simulated hour of mixed load, and what became of each forecast.

`python -m benchmarks.eta_accuracy [--minutes 60] [--seeds 1] [--replicas 2]`. The database is real,
and so is every statement: jobs are submitted, claimed, settled and forecast by the functions of the
product. Only time is made: the database gets a `now()` of its own, found before PostgreSQL's
(`search_path`), that reads the moment which the simulation has set. So an hour takes minutes, and
the same seed gives the same hour.

Five tenants with different weights submit single jobs and batches in all classes, three sizes and
4 to 30 steps, at random (Poisson), some of them in bursts; the replicas are busy for about three
quarters of the hour. A replica draws one microbatch at a time, and its worker keeps two in flight.
A microbatch takes `(0.4 + 0.05 x cost)` seconds, give or take 15 % (log-normal) for each, and 10 %
that come and go within 20 minutes. The forecaster knows none of this: it reads what the database
shows.

Every few seconds a waiting job of each class is asked about, as is the last job of a batch. Once
they have ended, the forecasts are compared with what happened. Printed for each class: how many
were asked, the median of |p50 - actual| / actual, the share of them within 30 %, the share of jobs
that took longer than their p50 (a half, if it is a median), and the share that ended within p90.
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
LEASE = timedelta(hours=1)  # nobody dies here
IN_FLIGHT = 2  #: dispatches of a worker
ASK_EVERY_S = 10.0
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
    """A tenant and what it submits, at random."""

    tenant_id: str
    weight: float
    priority: Priority
    every_s: float  #: between two submissions, on average
    fewest: int  #: jobs of one
    most: int
    size: int  #: of the pictures, pixels
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
class Asked:
    """A forecast, to be compared."""

    job_id: str
    what: str
    at_s: float
    p50_s: float
    p90_s: float


@dataclass
class Replica:
    """Draws one microbatch after the other."""

    free_at_s: float = 0.0
    in_flight: int = 0


@dataclass
class Simulation:
    """An installation in made time. `events`: what happens next, and when."""

    sessions: Sessions
    registry: ModelRegistry
    chance: random.Random
    replicas: list[Replica]
    sources: tuple[Source, ...] = SOURCES
    now_s: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)
    busy_s: float = 0.0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def at(self, moment_s: float, what: Callable[[], None]) -> None:
        """Have it happen then."""
        heapq.heappush(self.events, (moment_s, next(self._numbers), what))

    def transaction(self) -> Session:
        """A session that believes it is now."""
        session = self.sessions()
        moment = BEGIN + timedelta(seconds=self.now_s)
        session.execute(
            text("SELECT set_config('simulated.now', :now, false)"), {"now": moment.isoformat()}
        )
        return session

    def run(self, until_s: float) -> Iterator[float]:
        """Up to that moment; yields where it is."""
        while self.events and self.events[0][0] <= until_s:
            self.now_s, _, happen = heapq.heappop(self.events)
            happen()
            yield self.now_s

    def arrive(self, source: Source) -> None:
        """A submission, and the next one of its kind."""
        number = self.chance.randint(source.fewest, source.most)
        with self.transaction() as session:
            batch_id = None
            if number > 1:
                batch_id = batches.create(session, source.tenant_id, total=number).id
            made = [
                self._new_job(source, row if batch_id else None) for row in range(1, number + 1)
            ]
            lifecycle.submit(session, source.tenant_id, made, batch_id=batch_id)
            session.commit()
        self.at(
            self.now_s + self.chance.expovariate(1 / source.every_s), lambda: self.arrive(source)
        )
        self.claim_all()

    def _new_job(self, source: Source, row_number: int | None) -> NewJob:
        asked = JobInput(
            prompt="a red apple",
            priority=source.priority,
            width=source.size,
            height=source.size,
            num_inference_steps=self.chance.randint(*source.steps),
        )
        params = self.registry.resolve(asked)
        key = self.registry.models[params.model].microbatch_key(params)
        return NewJob.of(asked, params, key, row_number=row_number)

    def claim_all(self) -> None:
        """Every worker with a seat left claims; one that draws lingers, as the pump does."""
        for replica in self.replicas:
            while replica.in_flight < IN_FLIGHT and self.claim(replica, patient=True):
                pass
            if replica.in_flight in range(1, IN_FLIGHT):
                linger_s = max(claims.LINGER).total_seconds()
                self.at(self.now_s + linger_s, lambda it=replica: self.after_linger(it))  # type: ignore[misc]

    def after_linger(self, replica: Replica) -> None:
        """It has waited for company; now it takes what there is."""
        if replica.in_flight < IN_FLIGHT:
            self.claim(replica, patient=False)

    def claim(self, replica: Replica, *, patient: bool) -> bool:
        """Whether it got anything."""
        limits = {model.name: model.max_microbatch for model in self.registry.models.values()}
        idle = not (patient and replica.in_flight)
        with self.transaction() as session:
            taken = claims.claim(session, "worker", max_microbatch=limits, lease=LEASE, idle=idle)
            session.commit()
        if not taken:
            return False
        begins_s = max(self.now_s, replica.free_at_s)
        takes_s = self.takes_s(sum(job.cost for job in taken))
        replica.free_at_s = begins_s + takes_s
        self.busy_s += takes_s
        replica.in_flight += 1
        self.at(replica.free_at_s, lambda: self.settle(replica, taken))
        return True

    def takes_s(self, cost: float) -> float:
        """A microbatch, this time."""
        slow = 1 + 0.1 * math.sin(2 * math.pi * self.now_s / 1200)
        return (0.4 + 0.05 * cost) * slow * self.chance.lognormvariate(0, 0.15)

    def settle(self, replica: Replica, taken: Sequence[Job]) -> None:
        """It is drawn."""
        replica.in_flight -= 1
        drawn = [
            Succeeded(
                job.id,
                image_key="k",
                image_sha256="0" * 64,
                image_bytes=1,
                inference_ms=1,
                upload_ms=1,
            )
            for job in taken
        ]
        with self.transaction() as session:
            dispatches.settle(session, taken[0].dispatch_id or 0, drawn)
            session.commit()
        self.ended |= {job.id: self.now_s for job in taken}
        self.claim_all()

    def ask(self) -> None:
        """Of each class a waiting job, and of the batches that wait one's last job."""
        with self.transaction() as session:
            look = snapshot.take_snapshot(session, self.registry)
            for job, what in self._some(session):
                forecast = look.ask(job)
                if forecast.eta is not None:
                    eta = forecast.eta
                    self.asked.append(Asked(job.id, what, self.now_s, eta.p50_s, eta.p90_s))
            session.rollback()
        self.at(self.now_s + ASK_EVERY_S, self.ask)

    def _some(self, session: Session) -> Iterator[tuple[Job, str]]:
        for rank, priority in enumerate(Priority):
            waiting = session.scalars(
                text("SELECT id FROM job WHERE status = 'queued' AND priority = :rank ORDER BY id"),
                {"rank": rank},
            ).all()
            if waiting:
                yield session.get_one(Job, self.chance.choice(waiting)), str(priority)
        waiting = session.scalars(
            text(
                "SELECT DISTINCT batch_id FROM job "
                "WHERE status = 'queued' AND batch_id IS NOT NULL ORDER BY 1"
            )
        ).all()
        if waiting:
            last = queue_position.last_of(session, self.chance.choice(waiting))
            if last is not None:
                yield last, "batch"


def prepare(url: str) -> Sessions:
    """A database whose `now()` is ours, and its tenants."""
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
    """The hour."""
    simulation = Simulation(
        prepare(url), registry, random.Random(seed), [Replica() for _ in range(replicas)]
    )
    for source in simulation.sources:
        first_s = simulation.chance.expovariate(1 / source.every_s)
        simulation.at(min(first_s, 60.0), lambda it=source: simulation.arrive(it))  # type: ignore[misc]
    simulation.at(warm_up_s, simulation.ask)
    until_s = warm_up_s + 60 * minutes
    for _ in simulation.run(until_s):
        pass
    simulation.sessions.kw["bind"].dispose()
    return simulation


@dataclass(frozen=True)
class Score:
    """How forecasts of one kind did."""

    number: int
    median_error: float  #: |p50 - actual| / actual
    within_30: float
    longer_than_p50: float
    within_p90: float


def scores(simulation: Simulation) -> dict[str, Score]:
    """By class; `all` is of the three classes. Only of jobs that have ended by now."""
    kinds = defaultdict(list)
    for asked in simulation.asked:
        if asked.job_id in simulation.ended:
            kinds[asked.what].append((asked, simulation.ended[asked.job_id] - asked.at_s))
    kinds["all"] = [pair for kind, pairs in kinds.items() if kind != "batch" for pair in pairs]
    return {kind: _score(pairs) for kind, pairs in kinds.items()}


def _score(pairs: list[tuple[Asked, float]]) -> Score:
    errors = [abs(asked.p50_s - actual) / actual for asked, actual in pairs]
    return Score(
        len(pairs),
        statistics.median(errors),
        statistics.fmean(error <= 0.3 for error in errors),
        statistics.fmean(actual > asked.p50_s for asked, actual in pairs),
        statistics.fmean(actual <= asked.p90_s for asked, actual in pairs),
    )


def main() -> None:
    """Simulate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="simulated (default 60)")
    parser.add_argument("--seeds", type=int, default=1, help="so many hours (default 1)")
    parser.add_argument("--replicas", type=int, default=2, help="(default 2)")
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
    """A line for each class."""
    busy = done.busy_s / len(done.replicas) / done.now_s
    title = f"seed {seed}: {len(done.ended):,} jobs drawn, replicas busy {busy:.0%} of the time"
    table = Table(
        "of", "asked", "median error", "within 30 %", "longer than p50", "within p90", title=title
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
