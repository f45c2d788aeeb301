"""Executor of microbatches: claim, generate, store, settle, notify."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom.db.tables import Job
from darkroom.errors import (
    GeneratorUnavailable,
    MicrobatchCanceled,
    MicrobatchCrashed,
    StorageUnavailable,
)
from darkroom.fault_points import fault_point
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Outcome, Requeued, RequeueReason
from workers.generation.context import WorkerContext
from workers.generation.generate import MicrobatchRun, generate

_LINGER_POLL_S: Final = 0.04
_SETTLE_RETRY_S: Final = 1.0
_SETTLE_TIMEOUT_S: Final = 300.0  # generated and stored: worth waiting for a database restart

_Close: TypeAlias = Callable[[Session, int, Sequence[Outcome]], bool]

logger = logging.getLogger(__name__)


def process_queue(ctx: WorkerContext, *, stopping: Callable[[], bool]) -> int:
    """Run microbatches until none can be claimed; return how many were run."""
    ctx.store.check()  # nothing is generated that could not be stored
    done, last_key = 0, None
    while not stopping() and ctx.heartbeat.healthy():
        jobs = claim(ctx, last_key)
        if not jobs or not run_microbatch(ctx, jobs):
            break
        done, last_key = done + 1, jobs[0].microbatch_key
    return done


def run_microbatch(ctx: WorkerContext, jobs: Sequence[Job]) -> bool:
    """Generate, store and settle one claimed microbatch.

    Return False if a job was requeued because the store or a replica was unavailable.
    """
    fault_point("after-claim")
    ctx.notifier.notify_workers()  # other slots may be idle while more is queued
    ctx.notifier.notify_webhook_senders()  # job.started may have subscribers
    dispatch_id = jobs[0].dispatch_id
    assert dispatch_id is not None  # the CHECK running_has_dispatch
    with ctx.heartbeat.keep(dispatch_id) as in_flight:
        run = MicrobatchRun(dispatch_id, jobs, in_flight)
        try:
            generate(ctx, run)  # stores each image as it comes
        except MicrobatchCrashed as error:
            logger.warning(
                "dispatch %d crashed: %s; its jobs run in halves next", dispatch_id, error
            )
            settle_as_crashed(ctx, run)
            return True
        except MicrobatchCanceled:
            return settle(ctx, run, otherwise=RequeueReason.RELEASED)
        except GeneratorUnavailable:
            settle(ctx, run, otherwise=RequeueReason.UNAVAILABLE)
            raise
        return settle(ctx, run)


def claim(ctx: WorkerContext, last_key: str | None) -> Sequence[Job]:
    """Claim the next microbatch and commit; return no jobs if none can be claimed.

    While this worker generates another one, wait for the microbatch to fill.
    """
    until = time.monotonic() + max(claims.LINGER).total_seconds()
    while True:
        idle = not ctx.heartbeat.busy() or time.monotonic() > until
        jobs = _claim(ctx, last_key, idle=idle)
        if jobs or idle:
            return jobs
        time.sleep(_LINGER_POLL_S)


def _claim(ctx: WorkerContext, last_key: str | None, *, idle: bool) -> Sequence[Job]:
    limits = {model.name: model.max_microbatch for model in ctx.registry.models.values()}
    with ctx.sessions.begin() as session:
        jobs = claims.claim(
            session,
            ctx.worker_id,
            max_microbatch=limits,
            lease=ctx.lease,
            last_key=last_key,
            idle=idle,
        )
        if jobs:
            fault_point("before-claim-commit")
    return jobs


def settle(ctx: WorkerContext, run: MicrobatchRun, otherwise: RequeueReason | None = None) -> bool:
    """Commit all outcomes. Return False if a job was requeued because something was unavailable.

    Jobs without an outcome are requeued for the reason `otherwise`.
    """
    outcomes = run.outcomes(otherwise)
    _close(ctx, run, outcomes, dispatches.settle)
    return not any(
        isinstance(outcome, Requeued) and outcome.reason is RequeueReason.UNAVAILABLE
        for outcome in outcomes
    )


def settle_as_crashed(ctx: WorkerContext, run: MicrobatchRun) -> None:
    """Commit the outcomes from before the crash; the other jobs become suspects."""
    crash = partial(dispatches.crash, max_attempts=ctx.max_attempts)
    _close(ctx, run, run.outcomes(), crash)


def _close(
    ctx: WorkerContext, run: MicrobatchRun, outcomes: Sequence[Outcome], close: _Close
) -> None:
    """Close the dispatch, then notify webhook senders and remove images that no job refers to."""
    closed, unused = _commit(ctx, run.dispatch_id, outcomes, close)
    if closed:
        ctx.notifier.notify_webhook_senders()
    else:
        logger.warning(
            "dispatch %d lost its lease; its jobs were requeued and its images are discarded",
            run.dispatch_id,
        )
    for key in unused:
        _remove(ctx, key)


def _commit(
    ctx: WorkerContext, dispatch_id: int, outcomes: Sequence[Outcome], close: _Close
) -> tuple[bool, Sequence[str]]:
    """Close the dispatch in one transaction, waiting for the database if need be.

    Return whether it was still open, and the keys of images that no job refers to.
    """
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        try:
            with ctx.sessions.begin() as session:
                closed = close(session, dispatch_id, outcomes)
                unused = dispatches.unused_images(session, outcomes)
                fault_point("before-settle-commit")
        except (DBAPIError, PoolTimeout) as error:
            if time.monotonic() > deadline:
                raise
            logger.warning(
                "could not settle dispatch %d: %s; retrying in %.0f s",
                dispatch_id,
                error,
                _SETTLE_RETRY_S,
            )
            time.sleep(_SETTLE_RETRY_S)
        else:
            fault_point("after-settle-commit")
            return closed, unused


def _remove(ctx: WorkerContext, key: str) -> None:
    """Remove an image: its job was canceled, or requeued and generated elsewhere."""
    try:
        ctx.store.delete(key)
    except StorageUnavailable as error:
        logger.warning("could not remove unused image %s: %s; the cleaner will", key, error)
