"""The heart: claim a microbatch, have it drawn, store the images, settle it."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom import fault_points
from darkroom.db.tables import Job
from darkroom.errors import (
    GeneratorUnavailable,
    MicrobatchCanceled,
    MicrobatchCrashed,
    StorageUnavailable,
)
from darkroom.queue import claims, dispatches
from darkroom.queue.outcomes import Outcome, Requeued, RequeueReason
from workers.generation.context import WorkerContext
from workers.generation.generate import MicrobatchRun, generate

_LINGER_POLL_S: Final = 0.04
_SETTLE_RETRY_S: Final = 1.0
_SETTLE_PATIENCE_S: Final = 300.0  # drawn and stored: worth waiting for a database restart

logger = logging.getLogger(__name__)


def process_queue(ctx: WorkerContext, *, stopping: Callable[[], bool]) -> int:
    """Draw microbatches until nothing is left to claim; how many were drawn."""
    ctx.store.check()  # nothing is drawn that could not be stored
    drawn, last_key = 0, None
    while not stopping() and ctx.leases.healthy():
        claimed = claim(ctx, last_key)
        if not claimed or not run_microbatch(ctx, claimed):
            break
        drawn, last_key = drawn + 1, claimed[0].microbatch_key
    return drawn


def run_microbatch(ctx: WorkerContext, claimed: Sequence[Job]) -> bool:
    """One microbatch from claimed to settled. False when some of it went back to the queue."""
    fault_points.fault_point("after-claim")
    ctx.notifier.notify_workers()  # there may be more, and other slots asleep
    ctx.notifier.notify_webhook_senders()  # somebody may want to know that they have started
    dispatch_id = claimed[0].dispatch_id
    assert dispatch_id is not None  # the CHECK running_has_dispatch
    with ctx.leases.holding(dispatch_id) as hold:
        work = MicrobatchRun(dispatch_id, claimed, hold)
        try:
            generate(ctx, work)
        except MicrobatchCrashed as error:
            logger.warning("dispatch %d crashed: %s", dispatch_id, error)
            crash(ctx, work)
            return True
        except MicrobatchCanceled:
            return settle(ctx, dispatch_id, work.outcomes(otherwise=RequeueReason.RELEASED))
        except GeneratorUnavailable:
            settle(ctx, dispatch_id, work.outcomes(otherwise=RequeueReason.UNAVAILABLE))
            raise
        return settle(ctx, dispatch_id, work.outcomes())


def claim(ctx: WorkerContext, last_key: str | None) -> Sequence[Job]:
    """The next microbatch in a dispatch of ours, committed; empty when nothing waits.

    While this worker draws something else there is time for a microbatch to fill.
    """
    until = time.monotonic() + max(claims.LINGER).total_seconds()
    while True:
        idle = not ctx.leases.busy() or time.monotonic() > until
        claimed = _claim(ctx, last_key, idle=idle)
        if claimed or idle:
            return claimed
        time.sleep(_LINGER_POLL_S)


def _claim(ctx: WorkerContext, last_key: str | None, *, idle: bool) -> Sequence[Job]:
    limits = {model.name: model.max_microbatch for model in ctx.registry.models.values()}
    with ctx.sessions.begin() as session:
        claimed = claims.claim(
            session,
            ctx.worker_id,
            max_microbatch=limits,
            lease=ctx.lease,
            last_key=last_key,
            idle=idle,
        )
        if claimed:
            fault_points.fault_point("before-claim-commit")
    return claimed


def settle(ctx: WorkerContext, dispatch_id: int, outcomes: Sequence[Outcome]) -> bool:
    """Commit the outcomes, unless others have the jobs. False when some went back to the queue."""
    _commit(ctx, dispatch_id, outcomes, dispatches.settle)
    return not any(
        isinstance(outcome, Requeued) and outcome.reason is RequeueReason.UNAVAILABLE
        for outcome in outcomes
    )


def crash(ctx: WorkerContext, work: MicrobatchRun) -> None:
    """Commit what was done before the crash; the others may be why."""
    close = partial(dispatches.crash, max_attempts=ctx.max_attempts)
    _commit(ctx, work.dispatch_id, work.outcomes(), close)


def _commit(
    ctx: WorkerContext,
    dispatch_id: int,
    outcomes: Sequence[Outcome],
    close: Callable[[Session, int, Sequence[Outcome]], bool],
) -> None:
    """Close the dispatch in one transaction, waiting for the database if need be."""
    deadline = time.monotonic() + _SETTLE_PATIENCE_S
    while True:
        try:
            with ctx.sessions.begin() as session:
                closed = close(session, dispatch_id, outcomes)
                unused = dispatches.unused_images(session, outcomes)
                fault_points.fault_point("before-settle-commit")
            fault_points.fault_point("after-settle-commit")
            break
        except (DBAPIError, PoolTimeout) as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("dispatch %d cannot be settled yet: %s", dispatch_id, error)
            time.sleep(_SETTLE_RETRY_S)
    if closed:
        ctx.notifier.notify_webhook_senders()
    else:
        logger.warning("dispatch %d was fenced out: its lease ran out, others drew it", dispatch_id)
    _remove(ctx, unused)


def _remove(ctx: WorkerContext, image_keys: Sequence[str]) -> None:
    """Images that nobody refers to: of jobs that were canceled, or that others drew."""
    for key in image_keys:
        try:
            ctx.store.delete(key)
        except StorageUnavailable as error:
            logger.warning("%s stays in the store, unused: %s", key, error)
