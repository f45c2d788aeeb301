"""The heart: claim a microbatch, have it drawn, store the images, settle it."""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from darkroom import claims, dispatches, faults, pictures
from darkroom.catalogue import Catalogue
from darkroom.database import Sessions
from darkroom.errors import GeneratorUnavailable, MicrobatchCrashed, StorageUnavailable
from darkroom.outcomes import Drawn, Failed, Outcome, SentBack
from darkroom.params import GenerationParams
from darkroom.queue import Bell
from darkroom.storage import ImageStore, image_key
from darkroom.tables import Job
from workers.generator import Drawing, ImageGenerator, Mishap, Picture
from workers.leases import Hold, Leases

_LINGER_POLL_S: Final = 0.04
_SETTLE_RETRY_S: Final = 1.0
_SETTLE_PATIENCE_S: Final = 300.0  # drawn and stored: worth waiting for a database restart

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """What a worker process works with."""

    worker_id: str
    sessions: Sessions
    catalogue: Catalogue
    generator: ImageGenerator
    store: ImageStore
    leases: Leases
    bell: Bell
    encoders: ThreadPoolExecutor
    lease: timedelta
    generate_timeout_s: float
    max_attempts: int


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
    faults.reach("after-claim")
    shop.bell.ring()  # there may be more, and other slots asleep
    shop.bell.ring_deliveries()  # somebody may want to know that they have started
    dispatch_id = claimed[0].dispatch_id
    assert dispatch_id is not None  # the CHECK running_has_dispatch
    with shop.leases.holding(dispatch_id) as hold:
        try:
            outcomes = draw(shop, claimed, hold)
        except MicrobatchCrashed as error:
            logger.warning("dispatch %d crashed: %s", dispatch_id, error)
            _commit(shop, dispatch_id, partial(dispatches.crash, max_attempts=shop.max_attempts))
            return True
        except GeneratorUnavailable:
            settle(shop, dispatch_id, [SentBack(job.id) for job in claimed])
            raise
        settle(shop, dispatch_id, outcomes)
    return not any(isinstance(outcome, SentBack) for outcome in outcomes)


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
            faults.reach("before-claim-commit")
    return claimed


def draw(shop: Workshop, claimed: Sequence[Job], hold: Hold) -> list[Outcome]:
    """One call of the replica, then every image into the store, side by side."""
    call = shop.generator.begin([_params(job) for job in claimed])
    hold.on_lost = call.cancel
    faults.reach("in-generate")
    drawings = call.result(timeout_s=shop.generate_timeout_s)
    if len(drawings) != len(claimed):
        raise MicrobatchCrashed(f"{len(drawings)} drawings for {len(claimed)} jobs")
    pairs = zip(claimed, drawings, strict=True)
    return list(shop.encoders.map(lambda pair: _stored(shop, *pair), pairs))


def _stored(shop: Workshop, job: Job, drawing: Drawing) -> Outcome:
    match drawing:
        case Mishap(code, message):
            return Failed(job.id, code, message)
        case Picture(pixels) if pixels.shape != (job.height, job.width, 3):
            return Failed(job.id, "bad_output", "the model returned a picture of the wrong size")
        case Picture():
            return _store(shop, job, drawing)


def _store(shop: Workshop, job: Job, picture: Picture) -> Outcome:
    params = _params(job)
    revision = shop.catalogue.models[job.model].revision
    image = pictures.encode(picture.pixels, params, job_id=job.id, revision=revision)
    key = image_key(job.tenant_id, job.id, job.dispatch_id or 0, params.output_format)
    begun = time.monotonic()
    try:
        shop.store.put(key, image, pictures.CONTENT_TYPES[params.output_format])
    except StorageUnavailable as error:
        logger.warning("job %s goes back to the queue: %s", job.id, error)
        return SentBack(job.id)
    return Drawn(
        job_id=job.id,
        image_key=key,
        image_sha256=hashlib.sha256(image).hexdigest(),
        image_bytes=len(image),
        inference_ms=picture.inference_ms,
        upload_ms=round((time.monotonic() - begun) * 1000),
    )


def settle(shop: Workshop, dispatch_id: int, outcomes: Sequence[Outcome]) -> None:
    """Commit the outcomes, unless others have the jobs."""
    _commit(shop, dispatch_id, partial(dispatches.settle, outcomes=outcomes))


def _commit(shop: Workshop, dispatch_id: int, close: Callable[[Session, int], bool]) -> None:
    """Close the dispatch in one transaction, waiting for the database if need be."""
    deadline = time.monotonic() + _SETTLE_PATIENCE_S
    while True:
        try:
            with shop.sessions.begin() as session:
                closed = close(session, dispatch_id)
                faults.reach("before-settle-commit")
            faults.reach("after-settle-commit")
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


def _params(job: Job) -> GenerationParams:
    return GenerationParams.model_validate(job)
