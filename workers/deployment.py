"""The replica: a Ray Serve deployment that draws microbatches with the Triton it embeds."""

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from ray import serve

from darkroom.catalogue import Model
from darkroom.errors import GeneratorUnavailable, MicrobatchCrashed
from darkroom.params import GenerationParams
from darkroom.settings import HOME
from workers.generator import Drawing, Mishap, Picture
from workers.triton import HostDown, ModelFailed, Tensors, open_host

TRITON_MODEL: Final = "stable_diffusion"
REPOSITORY: Final = HOME / "model_repository"
#: Serve waits this long for requests in flight; longer than any microbatch plus Triton's own exit
GRACEFUL_SHUTDOWN_S: Final = 60


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is told when it is deployed. Nothing secret: Ray keeps and shows it."""

    model: Model
    model_host: Literal["auto", "inprocess", "subprocess"]
    device: Literal["cpu", "cuda"]
    threads: int | None  #: of PyTorch on a CPU; None shares the machine's among its replicas
    replicas: int
    timeout_s: float  #: of one microbatch; shorter than the worker's


@serve.deployment(
    max_ongoing_requests=4,  # two dispatches of one worker, and room while workers are replaced
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
)
class Replica:
    """One Triton with one model. It knows nothing of jobs, tenants or storage."""

    async def __init__(self, options: ReplicaOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        self._options = options
        self._frozen = False
        # One microbatch is with Triton at a time; the next waits here. When a prompt kills the
        # model, only those that were being drawn are suspects, and who waited lost nothing.
        self._turn = asyncio.Lock()
        self._host = open_host(options.model_host, REPOSITORY, _engine_environment(options))
        await self._host.start()
        await self._host.load(TRITON_MODEL)

    async def generate(self, microbatch: Sequence[GenerationParams]) -> list[Drawing]:
        """One drawing for each job, in order; one call of the model for all.

        Raises GeneratorUnavailable when Triton was down before it began, and MicrobatchCrashed
        when it went down, or hung, in the course.
        """
        async with self._turn:
            await self._refuse_when_down()
            return await self._drawn(microbatch)

    async def _drawn(self, microbatch: Sequence[GenerationParams]) -> list[Drawing]:
        try:
            async with asyncio.timeout(self._options.timeout_s):
                return await self._draw(microbatch)
        except TimeoutError as error:
            self._frozen = True
            raise MicrobatchCrashed("the model hung") from error
        except HostDown as error:
            raise MicrobatchCrashed(str(error)) from error
        except ModelFailed as error:
            raise MicrobatchCrashed(f"the model failed: {error}") from error

    async def _draw(self, microbatch: Sequence[GenerationParams]) -> list[Drawing]:
        unanswered = Mishap("no_answer", "the model said nothing of it")
        drawings: list[Drawing] = [unanswered] * len(microbatch)
        begun = time.monotonic()
        inputs = _inputs(microbatch, self._options.model.scheduler)
        async with aclosing(self._host.infer(TRITON_MODEL, inputs)) as events:
            async for event in events:
                index = int(event["index"][0])
                if "image" in event:
                    elapsed_ms = round((time.monotonic() - begun) * 1000)
                    drawings[index] = Picture(event["image"], elapsed_ms)
                elif "error" in event:
                    code, message = (text.decode() for text in event["error"])
                    drawings[index] = Mishap(code, message)
        return drawings

    async def _refuse_when_down(self) -> None:
        try:
            await self.check_health()
        except HostDown as error:
            raise GeneratorUnavailable(str(error)) from error

    async def check_health(self) -> None:
        """Ray replaces a replica whose Triton is dead, or whose model hung. Raises HostDown."""
        if self._frozen:
            raise HostDown("a microbatch hung")
        await self._host.check()

    async def __del__(self) -> None:
        """Serve calls this once, when the replica has drained."""
        await self._host.stop()


def _engine_environment(options: ReplicaOptions) -> dict[str, str]:
    # Said in any case: Ray starts its actors with OMP_NUM_THREADS=1, and the model inherits that.
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.replicas)
    return {
        "DARKROOM_ENGINE_MODEL_DIR": str(Path(options.model.folder).resolve()),
        "DARKROOM_ENGINE_DEVICE": options.device,
        "DARKROOM_ENGINE_DTYPE": options.model.precision,
        "DARKROOM_ENGINE_THREADS": str(threads),
        # PyTorch's threads wait for each other asleep: spinning, they take the core from the one
        # they wait for as soon as anything else runs here (8 small pictures: 22 s instead of 2).
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _inputs(microbatch: Sequence[GenerationParams], scheduler: str) -> Tensors:
    def texts(values: Sequence[str]) -> npt.NDArray[np.object_]:
        return np.array([value.encode() for value in values], dtype=np.object_)

    return {
        "prompt": texts([params.prompt for params in microbatch]),
        "negative_prompt": texts([params.negative_prompt for params in microbatch]),
        "scheduler": texts([scheduler] * len(microbatch)),
        "seed": np.array([params.seed for params in microbatch], np.int64),
        "num_inference_steps": np.array([p.num_inference_steps for p in microbatch], np.int32),
        "guidance_scale": np.array([params.guidance_scale for params in microbatch], np.float32),
        "width": np.array([params.width for params in microbatch], np.int32),
        "height": np.array([params.height for params in microbatch], np.int32),
    }
