"""A claimed microbatch on its way: drawn in calls as wide as memory allows, stored as it comes."""

import hashlib
import logging
import time
from collections.abc import Sequence
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
from darkroom.queue.outcomes import Failed, Outcome, Requeued, RequeueReason, Succeeded
from darkroom.storage.images import image_key
from workers.generation.context import WorkerContext
from workers.generation.generator import (
    Canceled,
    Finished,
    GenerateCall,
    Image,
    OutOfMemory,
    Progress,
    RowFailed,
    RowResult,
)
from workers.generation.in_flight import InFlightDispatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicrobatchRun:
    """A dispatch, and what has become of its jobs so far."""

    dispatch_id: int
    jobs: Sequence[Job]
    hold: InFlightDispatch
    done: dict[str, Future[Outcome]] = field(default_factory=dict)  #: by job id
    settled: set[str] = field(default_factory=set)  #: of those, committed already

    def unsettled(self) -> list[Outcome]:
        """Of the jobs that are done with and stored, but not committed."""
        ready = [future for id_, future in self.done.items() if id_ not in self.settled]
        return [future.result() for future in ready if future.done()]

    def outcomes(self, otherwise: RequeueReason | None = None) -> list[Outcome]:
        """Return the outcomes of stored jobs; the others are requeued for reason `otherwise`."""
        outcomes = [future.result() for future in self.done.values()]
        if otherwise is not None:
            outcomes += [
                Requeued(job.id, otherwise) for job in self.jobs if job.id not in self.done
            ]
        return outcomes


def generate(ctx: WorkerContext, work: MicrobatchRun) -> None:
    """Have all jobs drawn. Whatever is raised, `work` says what was done before.

    Raises GeneratorUnavailable, MicrobatchCrashed and MicrobatchCanceled.
    """
    waiting = list(work.jobs)
    while waiting:
        seats = ctx.seats.of(waiting[0].microbatch_key, len(waiting))
        company, waiting = waiting[:seats], waiting[seats:]
        waiting = _generate_together(ctx, work, company) + waiting


def _generate_together(
    ctx: WorkerContext, work: MicrobatchRun, company: Sequence[Job]
) -> list[Job]:
    """One call of the replica. Those for which it had no memory, to be drawn with fewer others."""
    model = ctx.registry.model_for(company[0].model, company[0].microbatch_key)
    asked = [_params(job).model_copy(update={"model": model.name}) for job in company]
    # After a crash every job of those that were drawn is in isolation: see `dispatches.crash`.
    call = ctx.generator.begin(asked, alone=any(job.isolation_group for job in company))
    fault_points.fault_point("in-generate")
    with work.hold.drawing(call, [job.id for job in company]):
        crowded = _consume_events(ctx, work, company, call)
    if crowded:
        ctx.seats.halve(company[0].microbatch_key, len(company))
        logger.warning("%d jobs together found too little memory", len(company))
    return crowded


def _consume_events(
    ctx: WorkerContext, work: MicrobatchRun, company: Sequence[Job], call: GenerateCall
) -> list[Job]:
    left = dict(enumerate(company))
    crowded = []
    for happening in call.happenings(
        timeout_s=ctx.microbatch_timeout_s, step_timeout_s=ctx.step_timeout_s
    ):
        match happening:
            case Progress(steps):
                by_id = {company[place].id: done for place, done in steps.items()}
                ctx.board.note(work.dispatch_id, by_id)
                settle_early(ctx, work)
            case Finished(place) if place not in left:
                raise MicrobatchCrashed(f"place {place} of {len(company)} was finished twice")
            case Finished(place, OutOfMemory()) if len(company) > 1:
                crowded.append(left.pop(place))
            case Finished(place, drawing):
                job = left.pop(place)
                work.hold.finished(job.id)
                work.done[job.id] = ctx.encoders.submit(_outcome_of, ctx, work, job, drawing)
    if left:
        raise MicrobatchCrashed(f"nothing was said of {len(left)} of {len(company)} jobs")
    return crowded


def settle_early(ctx: WorkerContext, work: MicrobatchRun) -> None:
    """Commit what is done with while others are still drawn: nobody waits for a longer company."""
    outcomes = work.unsettled()
    if not outcomes:
        return
    try:
        with ctx.sessions.begin() as session:
            still_ours = dispatches.settle_early(session, work.dispatch_id, outcomes)
    except (DBAPIError, PoolTimeout) as error:
        logger.warning("dispatch %d will be settled in one: %s", work.dispatch_id, error)
        return
    work.settled.update(outcome.job_id for outcome in outcomes)
    if not still_ours:
        work.hold.give_up()


def _outcome_of(ctx: WorkerContext, work: MicrobatchRun, job: Job, drawing: RowResult) -> Outcome:
    """What becomes of the job; its picture is in the store."""
    if not work.hold.wants(job.id):
        return Requeued(job.id, RequeueReason.RELEASED)  # settling ends it, whatever it is handed
    match drawing:
        case Canceled():
            return Requeued(job.id, RequeueReason.UNAVAILABLE)  # nobody asked for that
        case OutOfMemory():
            message = "the replica's memory does not even hold this picture alone"
            return Failed(job.id, "out_of_memory", message, retryable=True)
        case RowFailed(code, message):
            return Failed(job.id, code, message)
        case Image(pixels) if pixels.shape != (job.height, job.width, 3):
            return Failed(
                job.id, "invalid_output", "the model returned a picture of the wrong size"
            )
        case Image():
            return _store_result(ctx, job, drawing)


def _store_result(ctx: WorkerContext, job: Job, picture: Image) -> Outcome:
    params = _params(job)
    revision = ctx.registry.model_for(job.model, job.microbatch_key).revision
    image = image_codec.encode(picture.pixels, params, job_id=job.id, revision=revision)
    key = image_key(job.tenant_id, job.id, job.dispatch_id or 0, params.output_format)
    begun = time.monotonic()
    try:
        ctx.store.put(key, image, image_codec.CONTENT_TYPES[params.output_format])
    except StorageUnavailable as error:
        logger.warning("job %s goes back to the queue: %s", job.id, error)
        return Requeued(job.id, RequeueReason.UNAVAILABLE)
    return Succeeded(
        job_id=job.id,
        image_key=key,
        image_sha256=hashlib.sha256(image).hexdigest(),
        image_bytes=len(image),
        inference_ms=picture.inference_ms,
        upload_ms=round((time.monotonic() - begun) * 1000),
    )


def _params(job: Job) -> GenerationParams:
    return GenerationParams.model_validate(job)
