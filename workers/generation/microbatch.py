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
from darkroom.queue.outcomes import HandedBack, Outcome, SentBack
from workers.generation.context import Workshop
from workers.generation.generate import Work, draw

_LINGER_POLL_S: Final = 0.04
_SETTLE_RETRY_S: Final = 1.0
_SETTLE_PATIENCE_S: Final = 300.0  # drawn and stored: worth waiting for a database restart

logger = logging.getLogger(__name__)


def pump(shop: Workshop, *, stopping: Callable[[], bool]) -> int:
    """Draw microbatches until nothing is left to claim; how many were drawn."""
    shop.store.check()  # nothing is drawn that could not be stored
    drawn, last_key = 0, None
    while not stopping() and shop.leases.healthy():
        claimed = claim(shop, last_key)
        if not claimed or not run_microbatch(shop, claimed):
            break
        drawn, last_key = drawn + 1, claimed[0].microbatch_key
    return drawn


def run_microbatch(shop: Workshop, claimed: Sequence[Job]) -> bool:
    """One microbatch from claimed to settled. False when some of it went back to the queue."""
    fault_points.reach("after-claim")
    shop.bell.ring()  # there may be more, and other slots asleep
    shop.bell.ring_deliveries()  # somebody may want to know that they have started
    dispatch_id = claimed[0].dispatch_id
    assert dispatch_id is not None  # the CHECK running_has_dispatch
    with shop.leases.holding(dispatch_id) as hold:
        work = Work(dispatch_id, claimed, hold)
        try:
            draw(shop, work)
        except MicrobatchCrashed as error:
            logger.warning("dispatch %d crashed: %s", dispatch_id, error)
            crash(shop, work)
            return True
        except MicrobatchCanceled:
            return settle(shop, dispatch_id, work.outcomes(otherwise=HandedBack))
        except GeneratorUnavailable:
            settle(shop, dispatch_id, work.outcomes(otherwise=SentBack))
            raise
        return settle(shop, dispatch_id, work.outcomes())


def claim(shop: Workshop, last_key: str | None) -> Sequence[Job]:
    """The next microbatch in a dispatch of ours, committed; empty when nothing waits.

    While this worker draws something else there is time for a microbatch to fill.
    """
    until = time.monotonic() + max(claims.LINGER).total_seconds()
    while True:
        idle = not shop.leases.busy() or time.monotonic() > until
        claimed = _claim(shop, last_key, idle=idle)
        if claimed or idle:
            return claimed
        time.sleep(_LINGER_POLL_S)


def _claim(shop: Workshop, last_key: str | None, *, idle: bool) -> Sequence[Job]:
    limits = {model.name: model.max_microbatch for model in shop.catalogue.models.values()}
    with shop.sessions.begin() as session:
        claimed = claims.claim(
            session,
            shop.worker_id,
            max_microbatch=limits,
            lease=shop.lease,
            last_key=last_key,
            idle=idle,
        )
        if claimed:
            fault_points.reach("before-claim-commit")
    return claimed


def settle(shop: Workshop, dispatch_id: int, outcomes: Sequence[Outcome]) -> bool:
    """Commit the outcomes, unless others have the jobs. False when some went back to the queue."""
    _commit(shop, dispatch_id, outcomes, dispatches.settle)
    return not any(isinstance(outcome, SentBack) for outcome in outcomes)


def crash(shop: Workshop, work: Work) -> None:
    """Commit what was done before the crash; the others may be why."""
    close = partial(dispatches.crash, max_attempts=shop.max_attempts)
    _commit(shop, work.dispatch_id, work.outcomes(), close)


def _commit(
    shop: Workshop,
    dispatch_id: int,
    outcomes: Sequence[Outcome],
    close: Callable[[Session, int, Sequence[Outcome]], bool],
) -> None:
    """Close the dispatch in one transaction, waiting for the database if need be."""
    deadline = time.monotonic() + _SETTLE_PATIENCE_S
    while True:
        try:
            with shop.sessions.begin() as session:
                closed = close(session, dispatch_id, outcomes)
                unused = dispatches.unused_images(session, outcomes)
                fault_points.reach("before-settle-commit")
            fault_points.reach("after-settle-commit")
            break
        except (DBAPIError, PoolTimeout) as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("dispatch %d cannot be settled yet: %s", dispatch_id, error)
            time.sleep(_SETTLE_RETRY_S)
    if closed:
        shop.bell.ring_deliveries()
    else:
        logger.warning("dispatch %d was fenced out: its lease ran out, others drew it", dispatch_id)
    _remove(shop, unused)


def _remove(shop: Workshop, image_keys: Sequence[str]) -> None:
    """Images that nobody refers to: of jobs that were canceled, or that others drew."""
    for key in image_keys:
        try:
            shop.store.delete(key)
        except StorageUnavailable as error:
            logger.warning("%s stays in the store, unused: %s", key, error)
