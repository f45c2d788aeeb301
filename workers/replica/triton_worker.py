"""Generation of microbatches with one Triton and one model: a replica without Ray."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from darkroom.errors import GeneratorUnavailable, MicrobatchCrashed
from darkroom.generation.model_registry import Model
from darkroom.generation.params import GenerationParams
from darkroom.settings import HOME
from darkroom.storage import compiled_models
from workers.generation.generator import (
    Accepted,
    Canceled,
    Finished,
    GenerationEvent,
    RowFailed,
    Started,
)
from workers.replica.admission import AdmissionGate
from workers.replica.model_host import ModelFailed, TritonUnavailable
from workers.replica.open_host import open_host
from workers.replica.responses import ResponseTranslator
from workers.replica.row_requests import TRITON_MODEL, Response, RowRequests, row_inputs

REPOSITORY: Final = HOME / "model_repository"
CONCURRENT_MICROBATCHES: Final = 2  #: that are with the model at once
CHECKS_BEFORE_DEATH: Final = 3  #: failed in a row; then Ray replaces the replica, too


@dataclass(frozen=True)
class TritonWorkerOptions:
    """Options of a deployment. Nothing secret: Ray keeps and shows them."""

    model: Model
    triton_mode: Literal["auto", "inprocess", "subprocess"]
    device: Literal["cpu", "cuda"]
    runner: Literal["torch", "tensorrt"]
    compiled_models: str | None  #: their place: a folder, s3://BUCKET/PREFIX; None: plans/
    threads: int | None  #: of PyTorch on a CPU; None divides the machine's among its replicas
    replicas: int
    timeout_s: float  #: of one microbatch; shorter than the worker's
    step_timeout_s: float  #: longest time without a response; shorter than the worker's


class TritonWorker:
    """Worker with one Triton. All methods belong to one event loop."""

    def __init__(self, options: TritonWorkerOptions) -> None:
        self._options = options
        self._hung = False
        self._failed_checks = 0
        # A microbatch joins the one that is generated, as far as there is room; the next waits
        # here. When a prompt kills the model, only the microbatches with the model are suspects.
        self._gate = AdmissionGate(CONCURRENT_MICROBATCHES)
        self._calls: dict[str, RowRequests] = {}
        self._host = open_host(options.triton_mode, REPOSITORY, _engine_environment(options))

    async def start(self) -> None:
        """Start Triton and load the model.

        Raises TritonUnavailable, ModelFailed, StorageUnavailable.
        """
        source = _compiled_model(self._options)
        if self._options.runner == "tensorrt" and compiled_models.is_url(source):
            await asyncio.to_thread(
                compiled_models.pull, source, compiled_models.local_folder(source)
            )
        await self._host.start()
        await self._host.load(TRITON_MODEL)

    async def generate(
        self, call_id: str, microbatch: Sequence[GenerationParams], *, alone: bool = False
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events of the jobs as they happen.

        `alone`: no other microbatch is with the model meanwhile, so that a crash is due to these
        jobs. Raises GeneratorUnavailable when Triton was down before the start, and
        MicrobatchCrashed when it crashed or hung after it.
        """
        scheduler = self._options.model.scheduler
        rows = RowRequests(self._host, [row_inputs(params, scheduler) for params in microbatch])
        self._calls[call_id] = rows
        try:
            yield Accepted()
            async with self._gate.admitted(alone=alone):
                await self._require_triton()
                yield Started()
                async with rows, aclosing(self._events(rows, len(microbatch))) as events:
                    async for event in events:
                        yield event
        finally:
            del self._calls[call_id]

    def cancel_rows(self, call_id: str, indices: Sequence[int]) -> bool:
        """Leave these jobs out from the next step on. Return False for an unknown call."""
        rows = self._calls.get(call_id)
        if rows is not None:
            rows.cancel(indices)
        return rows is not None

    async def _events(self, rows: RowRequests, count: int) -> AsyncGenerator[GenerationEvent, None]:
        translator = ResponseTranslator()
        unfinished = set(range(count))
        deadline = time.monotonic() + self._options.timeout_s
        while row_response := await self._next(rows, deadline):
            index, response = row_response
            event = _end(rows, index) if response is None else translator.event(index, response)
            if isinstance(event, Started):
                deadline = time.monotonic() + self._options.timeout_s
            if isinstance(event, Finished):
                if event.index not in unfinished:
                    continue
                unfinished.discard(event.index)
            if event is not None:
                yield event

    async def _next(self, rows: RowRequests, deadline: float) -> tuple[int, Response | None] | None:
        """Return the next response if it comes in time. Raises MicrobatchCrashed."""
        timeout_s = min(self._options.step_timeout_s, deadline - time.monotonic())
        try:
            async with asyncio.timeout(timeout_s):
                return await rows.next()
        except TimeoutError as error:
            self._hung = True
            self._host.kill()
            raise MicrobatchCrashed("the model hung") from error
        except TritonUnavailable as error:
            raise MicrobatchCrashed(str(error)) from error
        except ModelFailed as error:
            raise MicrobatchCrashed(f"the model failed: {error}") from error

    async def _require_triton(self) -> None:
        try:
            await self.check()
        except TritonUnavailable as error:
            raise GeneratorUnavailable(str(error)) from error

    async def check(self) -> None:
        """Raise TritonUnavailable if Triton is dead or the model hung: Ray replaces the replica."""
        if self._hung:
            raise TritonUnavailable("a microbatch hung")
        try:
            await self._host.check()
        except TritonUnavailable:
            self._failed_checks += 1
            if self._failed_checks == CHECKS_BEFORE_DEATH:
                self._host.kill()  # so that neither the requests under way nor `stop` wait for it
            raise
        self._failed_checks = 0

    async def stop(self) -> None:
        """Stop Triton and remove its files. May be called twice."""
        await self._host.stop()


def _end(rows: RowRequests, index: int) -> Finished:
    """Return the result of a row whose request has ended without one."""
    if index in rows.canceled:
        return Finished(index, Canceled())
    return Finished(index, RowFailed("model_no_output", "the model returned no result"))


def _compiled_model(options: TritonWorkerOptions) -> str:
    """Return the place of the compiled model: a folder, or a prefix in S3."""
    return f"{(options.compiled_models or str(HOME / 'plans')).rstrip('/')}/{options.model.name}"


def _engine_environment(options: TritonWorkerOptions) -> dict[str, str]:
    # Always set: Ray starts its actors with OMP_NUM_THREADS=1, which the model inherits.
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.replicas)
    rows = options.model.max_unet_rows
    plans = compiled_models.local_folder(_compiled_model(options))
    return {
        "DARKROOM_ENGINE_MODEL_DIR": str(Path(options.model.folder).resolve()),
        "DARKROOM_ENGINE_DEVICE": options.device,
        "DARKROOM_ENGINE_DTYPE": options.model.precision,
        "DARKROOM_ENGINE_RUNNER": options.runner,
        "DARKROOM_ENGINE_PLANS_DIR": str(plans.resolve()),
        "DARKROOM_ENGINE_THREADS": str(threads),
        "DARKROOM_ENGINE_MAX_UNET_ROWS": "" if rows is None else str(rows),
        # PyTorch's threads wait for each other asleep: spinning, they take the core from the one
        # they wait for as soon as anything else runs here (8 small images: 22 s instead of 2).
        "OMP_WAIT_POLICY": "PASSIVE",
    }
