"""Faults of workers: killed at a named line, killed all at once, frozen, rolled."""

import time
from collections.abc import Sequence
from datetime import datetime

from tests.chaos.client import ExpectedImage
from tests.chaos.report import percentile
from tests.chaos.run import FaultRun
from tests.chaos.system import LEASE_S
from tests.support.servers import ServerProcess

WORKER_POINTS = (
    "before-claim-commit",
    "after-claim",
    "in-generate",
    "before-settle-commit",
    "after-settle-commit",
)


def killed_at(run: FaultRun, points: Sequence[str], *, jobs_each: int = 24) -> None:
    """Workers die at these points, one each and all in this round, while others stay."""
    victims = [run.system.start_worker(fault_at(run, point), keep=False) for point in points]
    run.system.wait_ready(*victims)
    run.load(jobs_each * len(points), prompts=["slow:0.1 a red apple"], largest=jobs_each)
    held: dict[ServerProcess, tuple[datetime, list[str]]] = {}
    while len(held) < len(victims):
        for victim in victims:
            if victim not in held and victim.running.process.poll() is not None:
                assert victim.running.process.returncode == -9, run.system.log_of(victim)[-2000:]
                held[victim] = run.system.now(), run.jobs_of(victim)
                run.injections += 1
        top_up(run, jobs_each)
        run.system.supervise()
        time.sleep(0.01)
    for died_at, jobs in held.values():
        wait_for_recovery(run, died_at, jobs)


def killed_again_and_again(run: FaultRun, *, rounds: int, jobs_each: int) -> None:
    """At each point so often; what the dead held is done again within a lease and 5 s.

    One at a time: a job that is there at three deaths fails, as it should, and is no measure.
    """
    for point in WORKER_POINTS * rounds:
        killed_at(run, [point], jobs_each=jobs_each)
        assert run.quiet()
    p95 = percentile(run.recoveries, 0.95)
    what = f"p95 {p95:.1f} s, at most {max(run.recoveries):.1f} s"
    run.require(what, holds=p95 <= LEASE_S + 5)


def fault_at(run: FaultRun, point: str) -> dict[str, str]:
    return {"DARKROOM_FAULT_POINT": f"{point}:{run.rng.randint(1, 3)}"}


def top_up(run: FaultRun, jobs: int) -> None:
    """There is always something to die over."""
    if run.unfinished() == 0:
        wanted = [
            ExpectedImage("slow:0.1 a red apple", run.rng.randrange(2**32)) for _ in range(jobs)
        ]
        run.submit(*wanted)


def wait_for_recovery(run: FaultRun, died_at: datetime, jobs: Sequence[str]) -> None:
    """Until all that a dead worker held has ended elsewhere; how long after its death."""
    if not jobs:
        return
    ended = "SELECT count(*) = 0 FROM job WHERE id = ANY(:ids) AND finished_at IS NULL"
    assert run.system.wait_until(lambda: run.system.value(ended, ids=list(jobs)), within_s=120)
    last = run.system.value("SELECT max(finished_at) FROM job WHERE id = ANY(:ids)", ids=list(jobs))
    run.recoveries.append((last - died_at).total_seconds())


def all_killed(run: FaultRun, *, jobs: int, down_s: float) -> None:
    """No worker at all for a while; the API goes on taking jobs."""
    load = run.load(jobs, prompts=["slow:0.02 a cat"], largest=40)
    run.wait_for_running()
    for worker in run.system.workers:
        run.system.forget(worker)
        worker.kill()
        run.injections += 1
    unknown = sum(each.unknown for each in run.client.submissions)
    time.sleep(down_s)
    assert sum(each.unknown for each in run.client.submissions) == unknown
    back = time.monotonic()
    for worker in run.system.workers:
        run.system.keep(worker)
    run.system.supervise()
    assert run.quiet(load)
    run.notes.append(f"backlog drained {time.monotonic() - back:.0f} s after the start")


def frozen(
    run: FaultRun, *, jobs: int, sleeper: ServerProcess | None = None, patience_s: float = 30
) -> None:
    """A worker sleeps past its lease with microbatches in hand, and wakes when others drew them."""
    load = run.load(jobs, prompts=["slow:0.2 a dog"], largest=40)
    sleeper = sleeper or run.rng.choice(run.system.workers)
    before = run.refused(sleeper)
    run.wait_for_running([sleeper])
    sleeper.freeze()
    run.injections += 1
    held, theirs = run.held_by(sleeper), run.jobs_of(sleeper)
    ended = "SELECT count(*) FROM job WHERE id = ANY(:ids) AND finished_at IS NOT NULL"
    run.system.wait_until(lambda: run.system.value(ended, ids=theirs) == len(theirs), within_s=60)
    sleeper.thaw()
    run.late_tried += len(held)
    run.system.wait_until(lambda: run.refused(sleeper) - before >= len(held), within_s=patience_s)
    run.late_refused += run.refused(sleeper) - before
    assert run.quiet(load)


def rolled(run: FaultRun, *, jobs: int, times: int) -> None:
    """SIGTERM to one worker after the other; each successor is up before the next goes."""
    load = run.load(jobs, prompts=["slow:0.05 a house"], largest=40)
    for turn in range(times):
        top_up(run, 80)
        old = run.system.workers[turn % len(run.system.workers)]
        successor = run.system.start_worker()
        run.system.wait_ready(successor)
        run.system.workers[turn % len(run.system.workers)] = successor
        run.system.stop_worker(old)
        assert old.running.process.returncode == 0, run.system.log_of(old)[-2000:]
        run.injections += 1
    assert run.quiet(load)
    spent = run.system.value("SELECT max(attempt) FROM job WHERE label = :label", label=run.label)
    assert spent == 1, "a worker that left in peace cost a job an attempt"
