"""A claimed microbatch on its way: drawn in calls as wide as memory allows, stored as it comes."""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom import fault_points
from darkroom.db.tables import Job
from darkroom.errors import MicrobatchCrashed, StorageUnavailable
from darkroom.generation import image_codec
from darkroom.generation.params import GenerationParams
from darkroom.queue import dispatches
from darkroom.queue.outcomes import Drawn, Failed, HandedBack, Outcome, SentBack
from darkroom.storage.images import image_key
from workers.generation.context import Workshop
from workers.generation.generator import (
    Drawing,
    Finished,
    GenerateCall,
    Mishap,
    OutOfMemory,
    Picture,
    Progress,
    Withdrawn,
)
from workers.generation.in_flight import Hold

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A dispatch, and what has become of its jobs so far."""

    dispatch_id: int
    jobs: Sequence[Job]
    hold: Hold
    done: dict[str, Future[Outcome]] = field(default_factory=dict)  #: by job id
    settled: set[str] = field(default_factory=set)  #: of those, committed already

    def unsettled(self) -> list[Outcome]:
        """Of the jobs that are done with and stored, but not committed."""
        ready = [future for id_, future in self.done.items() if id_ not in self.settled]
        return [future.result() for future in ready if future.done()]

    def outcomes(self, otherwise: Callable[[str], Outcome] | None = None) -> list[Outcome]:
        """Of the jobs that are done with, once they are stored, and `otherwise` of the others."""
        outcomes = [future.result() for future in self.done.values()]
        if otherwise is not None:
            outcomes += [otherwise(job.id) for job in self.jobs if job.id not in self.done]
        return outcomes


def draw(shop: Workshop, work: Work) -> None:
    """Have all jobs drawn. Whatever is raised, `work` says what was done before.

    Raises GeneratorUnavailable, MicrobatchCrashed and MicrobatchCanceled.
    """
    waiting = list(work.jobs)
    while waiting:
        seats = shop.seats.of(waiting[0].microbatch_key, len(waiting))
        company, waiting = waiting[:seats], waiting[seats:]
        waiting = _draw_together(shop, work, company) + waiting


def _draw_together(shop: Workshop, work: Work, company: Sequence[Job]) -> list[Job]:
    """One call of the replica. Those for which it had no memory, to be drawn with fewer others."""
    model = shop.catalogue.painter_of(company[0].model, company[0].microbatch_key)
    asked = [_params(job).model_copy(update={"model": model.name}) for job in company]
    # After a crash every job of those that were drawn is in isolation: see `dispatches.crash`.
    call = shop.generator.begin(asked, alone=any(job.isolation for job in company))
    fault_points.reach("in-generate")
    with work.hold.drawing(call, [job.id for job in company]):
        crowded = _followed(shop, work, company, call)
    if crowded:
        shop.seats.halve(company[0].microbatch_key, len(company))
        logger.warning("%d jobs together found too little memory", len(company))
    return crowded


def _followed(shop: Workshop, work: Work, company: Sequence[Job], call: GenerateCall) -> list[Job]:
    left = dict(enumerate(company))
    crowded = []
    for happening in call.happenings(
        timeout_s=shop.generate_timeout_s, silence_s=shop.silence_timeout_s
    ):
        match happening:
            case Progress(steps):
                by_id = {company[place].id: done for place, done in steps.items()}
                shop.board.note(work.dispatch_id, by_id)
                settle_early(shop, work)
            case Finished(place) if place not in left:
                raise MicrobatchCrashed(f"place {place} of {len(company)} was finished twice")
            case Finished(place, OutOfMemory()) if len(company) > 1:
                crowded.append(left.pop(place))
            case Finished(place, drawing):
                job = left.pop(place)
                work.hold.finished(job.id)
                work.done[job.id] = shop.encoders.submit(_kept, shop, work, job, drawing)
    if left:
        raise MicrobatchCrashed(f"nothing was said of {len(left)} of {len(company)} jobs")
    return crowded


def settle_early(shop: Workshop, work: Work) -> None:
    """Commit what is done with while others are still drawn: nobody waits for a longer company."""
    outcomes = work.unsettled()
    if not outcomes:
        return
    try:
        with shop.sessions.begin() as session:
            still_ours = dispatches.settle_early(session, work.dispatch_id, outcomes)
    except (DBAPIError, PoolTimeout) as error:
        logger.warning("dispatch %d will be settled in one: %s", work.dispatch_id, error)
        return
    work.settled.update(outcome.job_id for outcome in outcomes)
    if not still_ours:
        work.hold.give_up()


def _kept(shop: Workshop, work: Work, job: Job, drawing: Drawing) -> Outcome:
    """What becomes of the job; its picture is in the store."""
    if not work.hold.wants(job.id):
        return HandedBack(job.id)  # settling ends it, whatever it is handed
    match drawing:
        case Withdrawn():
            return SentBack(job.id)  # nobody asked for that
        case OutOfMemory():
            message = "the replica's memory does not even hold this picture alone"
            return Failed(job.id, "out_of_memory", message, retryable=True)
        case Mishap(code, message):
            return Failed(job.id, code, message)
        case Picture(pixels) if pixels.shape != (job.height, job.width, 3):
            return Failed(job.id, "bad_output", "the model returned a picture of the wrong size")
        case Picture():
            return _stored(shop, job, drawing)


def _stored(shop: Workshop, job: Job, picture: Picture) -> Outcome:
    params = _params(job)
    revision = shop.catalogue.painter_of(job.model, job.microbatch_key).revision
    image = image_codec.encode(picture.pixels, params, job_id=job.id, revision=revision)
    key = image_key(job.tenant_id, job.id, job.dispatch_id or 0, params.output_format)
    begun = time.monotonic()
    try:
        shop.store.put(key, image, image_codec.CONTENT_TYPES[params.output_format])
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


def _params(job: Job) -> GenerationParams:
    return GenerationParams.model_validate(job)
