"""Prompts that nothing survives."""

import time
from collections.abc import Sequence

from tests.chaos.client import FAILS, ExpectedImage
from tests.chaos.run import FaultRun


def in_a_microbatch(run: FaultRun, poisons: Sequence[str], *, others: int = 7) -> None:
    """Put each poison job into a microbatch of its own with `others` good jobs."""
    for number, poison in enumerate(poisons):
        size = (("width", 64 + 64 * (number % 8)), ("height", 64 + 64 * (number // 8)))
        jobs = [
            ExpectedImage("a good job", run.rng.randrange(2**32), fields=size)
            for _ in range(others)
        ]
        wrong = ExpectedImage(f"{poison} here", 1, ends=FAILS, fields=size)
        jobs.insert(run.rng.randint(0, others), wrong)
        run.submit(*jobs)
        run.injections += 1
    assert run.quiet()
    own_crashes(run)


def among_many(run: FaultRun, *, jobs: int, share: float) -> None:
    """Mix poison into a batch; the good jobs must succeed at half the usual rate or better."""
    run.quiet_within_s = 600
    began = time.monotonic()
    run.submit(*[ExpectedImage("a good job", seed) for seed in range(jobs)])
    assert run.quiet()
    usual = jobs / (time.monotonic() - began)
    wrong = set(run.rng.sample(range(jobs), round(jobs * share)))
    mixed = [
        ExpectedImage("poison:kill", seed, ends=FAILS)
        if seed in wrong
        else ExpectedImage("a good job", seed)
        for seed in range(jobs)
    ]
    began = time.monotonic()
    batch_id = run.submit(*mixed)
    good = "SELECT count(*) FROM job WHERE batch_id = :id AND status = 'succeeded'"
    good_jobs = jobs - len(wrong)
    reached = run.system.wait_until(
        lambda: run.system.value(good, id=batch_id) == good_jobs, within_s=run.quiet_within_s
    )
    run.injections += len(wrong)
    rate = good_jobs / (time.monotonic() - began)
    what = f"{good_jobs} good jobs succeeded, {rate:.0f}/s for {usual:.0f}/s without poison"
    run.require(what, holds=reached)
    assert run.quiet()
    own_crashes(run)


def own_crashes(run: FaultRun) -> None:
    """Check that each failed job was in three crashes, the last one alone, and no other failed.

    Where one kills the worker it may have been up to six: what else the worker held was there too.
    """
    crashes = run.system.rows(
        "SELECT prompt, attempt, error_code FROM job WHERE label = :label AND status = 'failed'",
        label=run.label,
    )
    assert {row.error_code for row in crashes} == {"worker_crashed"}
    workers_die = any("poison:worker" in row.prompt for row in crashes)
    for row in crashes:
        assert row.attempt in (range(3, 7) if workers_die else [3]), row
