"""Two steps of a microbatch: generate its images, in calls as large as memory allows, and store."""

import hashlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.tables import Job
from darkroom.errors import MicrobatchCrashed, StorageUnavailable
from darkroom.fault_points import fault_point
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
    """Dispatch with the outcomes of its jobs so far."""

    dispatch_id: int
    jobs: Sequence[Job]
    in_flight: InFlightDispatch
    stored: dict[str, Future[Outcome]] = field(default_factory=dict)  #: by job id
    settled: set[str] = field(default_factory=set)  #: jobs whose outcome is committed

    def unsettled(self) -> list[Outcome]:
        """Return the outcomes that are known and not committed yet. Does not wait."""
        pending = [future for job_id, future in self.stored.items() if job_id not in self.settled]
        return [future.result() for future in pending if future.done()]

    def outcomes(self, otherwise: RequeueReason | None = None) -> list[Outcome]:
        """Wait for all images to be stored; requeue unfinished jobs for the reason `otherwise`."""
        outcomes = [future.result() for future in self.stored.values()]
        if otherwise is not None:
            unfinished = [job.id for job in self.jobs if job.id not in self.stored]
            outcomes += [Requeued(job_id, otherwise) for job_id in unfinished]
        return outcomes


def generate(ctx: WorkerContext, run: MicrobatchRun) -> None:
    """Generate all jobs and store their images; after an error, `run` has those finished before.

    Raises GeneratorUnavailable, MicrobatchCrashed and MicrobatchCanceled.
    """
    left = list(run.jobs)
    while left:
        rows = ctx.memory_limits.rows(left[0].microbatch_key, len(left))
        call_jobs, left = left[:rows], left[rows:]
        left = _generate_call(ctx, run, call_jobs) + left


def _generate_call(ctx: WorkerContext, run: MicrobatchRun, jobs: Sequence[Job]) -> list[Job]:
    """Generate jobs in one call; return those that lacked memory, to be generated with fewer."""
    model = ctx.registry.model_for(jobs[0].model, jobs[0].microbatch_key)
    params = [_params(job).model_copy(update={"model": model.name}) for job in jobs]
    # After a crash each job of the microbatch is in an isolation group: see `dispatches.crash`.
    call = ctx.generator.start(params, alone=any(job.isolation_group for job in jobs))
    fault_point("in-generate")
    with run.in_flight.generating(call, [job.id for job in jobs]):
        out_of_memory = _consume_events(ctx, run, jobs, call)
    if out_of_memory:
        ctx.memory_limits.halve(jobs[0].microbatch_key, len(jobs))
        logger.warning(
            "dispatch %d: too little memory for %d jobs together; generating fewer at a time",
            run.dispatch_id,
            len(jobs),
        )
    return out_of_memory


def _consume_events(
    ctx: WorkerContext, run: MicrobatchRun, jobs: Sequence[Job], call: GenerateCall
) -> list[Job]:
    """Publish progress and store images as they come; return the jobs that lacked memory."""
    left = dict(enumerate(jobs))
    out_of_memory = []
    for event in call.events(timeout_s=ctx.microbatch_timeout_s, step_timeout_s=ctx.step_timeout_s):
        match event:
            case Progress(steps):
                ctx.progress.note(
                    run.dispatch_id, {jobs[at].id: done for at, done in steps.items()}
                )
                settle_early(ctx, run)
            case Finished(index) if index not in left:
                raise MicrobatchCrashed(f"row {index} of {len(jobs)} was finished twice")
            case Finished(index, OutOfMemory()) if len(jobs) > 1:
                out_of_memory.append(left.pop(index))
            case Finished(index, result):
                job = left.pop(index)
                run.in_flight.finish(job.id)
                run.stored[job.id] = ctx.encoders.submit(_outcome, ctx, run, job, result)
    if left:
        raise MicrobatchCrashed(f"{len(left)} of {len(jobs)} rows got no result")
    return out_of_memory


def settle_early(ctx: WorkerContext, run: MicrobatchRun) -> None:
    """Commit the known outcomes, so that finished jobs do not wait for the rest."""
    outcomes = run.unsettled()
    if not outcomes:
        return
    try:
        with ctx.sessions.begin() as session:
            open_still = dispatches.settle_early(session, run.dispatch_id, outcomes)
    except (DBAPIError, PoolTimeout) as error:
        logger.warning(
            "dispatch %d: could not settle early: %s; its jobs are settled together at the end",
            run.dispatch_id,
            error,
        )
        return
    run.settled.update(outcome.job_id for outcome in outcomes)
    if not open_still:
        run.in_flight.stop()


def _outcome(ctx: WorkerContext, run: MicrobatchRun, job: Job, result: RowResult) -> Outcome:
    """Store the image, if there is one, and return the job's outcome."""
    if run.in_flight.is_canceled(job.id):
        return Requeued(job.id, RequeueReason.RELEASED)  # settling cancels it instead
    match result:
        case Canceled():
            return Requeued(job.id, RequeueReason.UNAVAILABLE)  # canceled without our request
        case OutOfMemory():
            message = "the replica has too little memory for this image alone"
            return Failed(job.id, "out_of_memory", message, retryable=True)
        case RowFailed(code, message):
            return Failed(job.id, code, message)
        case Image(pixels) if pixels.shape != (job.height, job.width, 3):
            return Failed(job.id, "invalid_output", "the model returned an image of the wrong size")
        case Image():
            return _store(ctx, job, result)


def _store(ctx: WorkerContext, job: Job, image: Image) -> Outcome:
    params = _params(job)
    revision = ctx.registry.model_for(job.model, job.microbatch_key).revision
    encoded = image_codec.encode(image.pixels, params, job_id=job.id, revision=revision)
    key = image_key(job.tenant_id, job.id, job.dispatch_id or 0, params.output_format)
    started = time.monotonic()
    try:
        ctx.store.put(key, encoded, image_codec.CONTENT_TYPES[params.output_format])
    except StorageUnavailable as error:
        logger.warning("could not store the image of job %s: %s; requeueing it", job.id, error)
        return Requeued(job.id, RequeueReason.UNAVAILABLE)
    return Succeeded(
        job_id=job.id,
        image_key=key,
        image_sha256=hashlib.sha256(encoded).hexdigest(),
        image_bytes=len(encoded),
        inference_ms=image.inference_ms,
        upload_ms=round((time.monotonic() - started) * 1000),
    )


def _params(job: Job) -> GenerationParams:
    return GenerationParams.model_validate(job)
