"""Draws microbatches with one Triton and one model: what a replica does, without Ray."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from darkroom.errors import GeneratorUnavailable, MicrobatchCrashed
from darkroom.generation.model_registry import Model
from darkroom.generation.params import GenerationParams
from darkroom.jobs.progress import Steps
from darkroom.settings import HOME
from darkroom.storage import compiled_models
from workers.generation.generator import (
    Accepted,
    Canceled,
    Finished,
    GenerationEvent,
    Image,
    OutOfMemory,
    Progress,
    RowFailed,
    RowResult,
    Started,
)
from workers.replica.admission import AdmissionGate
from workers.replica.cancel_flags import CancelFlags
from workers.replica.model_host import ModelFailed, Tensors, TritonUnavailable
from workers.replica.open_host import open_host

TRITON_MODEL: Final = "stable_diffusion"
REPOSITORY: Final = HOME / "model_repository"
TOGETHER: Final = 2  #: microbatches that are with the model at once
CHECKS_BEFORE_DEATH: Final = 3  #: in a row; then Ray, too, gives a replica up
REPORT_EVERY_S: Final = 0.25  #: at most so often, and after the first step of a call at once

Response: TypeAlias = Mapping[str, npt.NDArray[Any]]  #: see the model's config.pbtxt

#: the model's codes that do not fail the job
_ERROR_CODES: Final[Mapping[str, RowResult]] = {
    "out_of_memory": OutOfMemory(),
}


@dataclass(frozen=True)
class TritonWorkerOptions:
    """What it is told when it is deployed. Nothing secret: Ray keeps and shows it."""

    model: Model
    triton_mode: Literal["auto", "inprocess", "subprocess"]
    device: Literal["cpu", "cuda"]
    runner: Literal["torch", "tensorrt"]
    compiled_models: (
        str | None
    )  #: where compiled models are: a folder, s3://BUCKET/PREFIX, None: plans/
    threads: int | None  #: of PyTorch on a CPU; None shares the machine's among its replicas
    replicas: int
    timeout_s: float  #: of one microbatch; shorter than the worker's
    step_timeout_s: float  #: longest that the model may say nothing; shorter than the worker's


class TritonWorker:
    """All methods belong to one event loop."""

    def __init__(self, options: TritonWorkerOptions) -> None:
        self._options = options
        self._frozen = False
        self._failed_checks = 0
        # A microbatch joins the one that is drawn, as far as there are seats; the next waits here.
        # When a prompt kills the model, all that are with it are suspects, and who waited is not.
        self._turns = AdmissionGate(TOGETHER)
        self._flags = CancelFlags()
        environment = _engine_environment(options, self._flags.folder)
        self._host = open_host(options.triton_mode, REPOSITORY, environment)

    async def start(self) -> None:
        """Start Triton and load the model.

        Raises TritonUnavailable, ModelFailed, StorageUnavailable.
        """
        source = _plans(self._options)
        if self._options.runner == "tensorrt" and compiled_models.is_url(source):
            await asyncio.to_thread(
                compiled_models.pull, source, compiled_models.local_folder(source)
            )
        await self._host.start()
        await self._host.load(TRITON_MODEL)

    async def draw(
        self, call_id: str, microbatch: Sequence[GenerationParams], *, alone: bool = False
    ) -> AsyncGenerator[GenerationEvent, None]:
        """What becomes of the jobs, as it happens; one call of the model for all.

        `alone`: nobody else is with the model meanwhile, so that a crash is these jobs' doing.
        Raises GeneratorUnavailable when Triton was down before it began, and MicrobatchCrashed
        when it went down, or hung, in the course.
        """
        with self._flags.kept(call_id, rows=len(microbatch)):
            yield Accepted()
            async with self._turns.taken(alone=alone):
                await self._refuse_when_down()
                yield Started()
                async with aclosing(self._drawn(call_id, microbatch)) as happenings:
                    async for happening in happenings:
                        yield happening

    def withdraw(self, call_id: str, indices: Sequence[int]) -> bool:
        """Leave these jobs out from the next step on; False when there is no such call here."""
        return self._flags.withdraw(call_id, indices)

    async def _drawn(
        self, call_id: str, microbatch: Sequence[GenerationParams]
    ) -> AsyncGenerator[GenerationEvent, None]:
        reporter = ResponseTranslator()
        unanswered = set(range(len(microbatch)))
        inputs = _inputs(call_id, microbatch, self._options.model.scheduler)
        async with (
            aclosing(self._host.infer(TRITON_MODEL, inputs)) as responses,
            aclosing(self._timely(responses)) as timely,
        ):
            async for response in timely:
                happening = reporter.happening(response)
                if isinstance(happening, Finished):
                    unanswered.discard(happening.index)
                if happening is not None:
                    yield happening
        for index in unanswered:
            yield Finished(index, RowFailed("model_no_output", "the model said nothing of it"))

    async def _timely(self, responses: AsyncIterator[Response]) -> AsyncGenerator[Response, None]:
        """The responses, as long as they keep coming. Raises MicrobatchCrashed."""
        deadline = time.monotonic() + self._options.timeout_s
        while True:
            patience_s = min(self._options.step_timeout_s, deadline - time.monotonic())
            try:
                async with asyncio.timeout(patience_s):
                    response = await anext(responses, None)
            except TimeoutError as error:
                self._frozen = True
                self._host.kill()
                raise MicrobatchCrashed("the model hung") from error
            except TritonUnavailable as error:
                raise MicrobatchCrashed(str(error)) from error
            except ModelFailed as error:
                raise MicrobatchCrashed(f"the model failed: {error}") from error
            if response is None:
                return
            if _waits(response):
                deadline = time.monotonic() + self._options.timeout_s
            yield response

    async def _refuse_when_down(self) -> None:
        try:
            await self.check()
        except TritonUnavailable as error:
            raise GeneratorUnavailable(str(error)) from error

    async def check(self) -> None:
        """Raise TritonUnavailable if Triton is dead or the model hung: Ray replaces the replica."""
        if self._frozen:
            raise TritonUnavailable("a microbatch hung")
        try:
            await self._host.check()
        except TritonUnavailable:
            self._failed_checks += 1
            if self._failed_checks == CHECKS_BEFORE_DEATH:
                self._host.kill()  # so that nobody waits for it: neither who draws now, nor `stop`
            raise
        self._failed_checks = 0

    async def stop(self) -> None:
        """Leave nothing behind. May be called twice."""
        await self._host.stop()
        self._flags.remove()


class ResponseTranslator:
    """Puts the model's responses into a worker's words, and its many steps into few."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._reported = 0.0
        self._steps: dict[int, Steps] = {}

    def happening(self, response: Response) -> GenerationEvent | None:
        """None when it is too small to be told now."""
        index = int(response["index"][0])
        if _waits(response):
            self._begun = time.monotonic()
            return Started()
        if "step" in response:
            step, steps = response["step"].tolist()
            return self._step(index, (step, steps))
        if "image" in response:
            elapsed_ms = round((time.monotonic() - self._begun) * 1000)
            return Finished(index, Image(response["image"], elapsed_ms))
        if "canceled" in response:
            return Finished(index, Canceled())
        code, message = (text.decode() for text in response["error"])
        return Finished(index, _ERROR_CODES.get(code) or RowFailed(code, message))

    def _step(self, index: int, steps: Steps) -> Progress | None:
        self._steps[index] = steps
        if time.monotonic() - self._reported < REPORT_EVERY_S:
            return None
        self._reported = time.monotonic()
        told, self._steps = self._steps, {}
        return Progress(told)


def _waits(response: Response) -> bool:
    """Whether it says no more than that the microbatch is not forgotten while it has no seat."""
    return "started" in response


def _plans(options: TritonWorkerOptions) -> str:
    """The compiled model: a folder, or in S3."""
    return f"{(options.compiled_models or str(HOME / 'plans')).rstrip('/')}/{options.model.name}"


def _engine_environment(options: TritonWorkerOptions, flags: Path) -> dict[str, str]:
    # Said in any case: Ray starts its actors with OMP_NUM_THREADS=1, and the model inherits that.
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.replicas)
    rows = options.model.max_unet_rows
    return {
        "DARKROOM_ENGINE_MODEL_DIR": str(Path(options.model.folder).resolve()),
        "DARKROOM_ENGINE_DEVICE": options.device,
        "DARKROOM_ENGINE_DTYPE": options.model.precision,
        "DARKROOM_ENGINE_RUNNER": options.runner,
        "DARKROOM_ENGINE_PLANS_DIR": str(compiled_models.local_folder(_plans(options)).resolve()),
        "DARKROOM_ENGINE_THREADS": str(threads),
        "DARKROOM_ENGINE_MAX_UNET_ROWS": "" if rows is None else str(rows),
        "DARKROOM_ENGINE_FLAGS_DIR": str(flags),
        # PyTorch's threads wait for each other asleep: spinning, they take the core from the one
        # they wait for as soon as anything else runs here (8 small pictures: 22 s instead of 2).
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _inputs(call_id: str, microbatch: Sequence[GenerationParams], scheduler: str) -> Tensors:
    def texts(values: Sequence[str]) -> npt.NDArray[np.object_]:
        return np.array([value.encode() for value in values], dtype=np.object_)

    return {
        "flags": texts([call_id]),
        "prompt": texts([params.prompt for params in microbatch]),
        "negative_prompt": texts([params.negative_prompt for params in microbatch]),
        "scheduler": texts([scheduler] * len(microbatch)),
        "seed": np.array([params.seed for params in microbatch], np.int64),
        "num_inference_steps": np.array([p.num_inference_steps for p in microbatch], np.int32),
        "guidance_scale": np.array([params.guidance_scale for params in microbatch], np.float32),
        "width": np.array([params.width for params in microbatch], np.int32),
        "height": np.array([params.height for params in microbatch], np.int32),
    }
