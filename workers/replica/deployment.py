"""The replica: a Ray Serve deployment around a painter."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from ray import serve
from ray.serve import Application

from darkroom.generation.model_registry import load_model
from darkroom.generation.params import GenerationParams
from workers.generation.generator import GenerationEvent
from workers.replica.triton_worker import TritonWorker, TritonWorkerOptions

#: Serve waits this long for requests in flight; longer than any microbatch plus Triton's own exit
GRACEFUL_SHUTDOWN_S: Final = 60


@serve.deployment(
    # Two dispatches of one worker, and room: for others, and to be told what to leave out.
    max_ongoing_requests=16,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
)
class Replica:
    """One Triton with one model. It knows nothing of jobs, tenants or storage."""

    async def __init__(self, options: TritonWorkerOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        self._painter = TritonWorker(options)
        await self._painter.start()

    async def generate(
        self, call_id: str, microbatch: Sequence[GenerationParams], *, alone: bool = False
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See Painter.draw."""
        drawing = self._painter.draw(call_id, microbatch, alone=alone)
        async with aclosing(drawing) as happenings:
            async for happening in happenings:
                yield happening

    async def withdraw(self, call_id: str, indices: Sequence[int]) -> bool:
        """See Painter.withdraw."""
        return self._painter.withdraw(call_id, indices)

    async def check_health(self) -> None:
        """Ray replaces a replica whose painter is down. Raises TritonUnavailable."""
        await self._painter.check()

    async def __del__(self) -> None:
        """Serve calls this once, when the replica has drained."""
        await self._painter.stop()


def application(arguments: dict[str, Any]) -> Application:
    """What a config file names: the model in `folder` on the node, and the painter's options."""
    model = load_model(Path(arguments.pop("folder")))
    options = {"threads": None, **arguments}
    return Replica.bind(TritonWorkerOptions(model=model, **options))  # type: ignore[attr-defined]
