"""Ray Serve deployment of a TritonWorker."""

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
    # Two dispatches of one worker, and room for other workers' and for cancellations.
    max_ongoing_requests=16,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
)
class Replica:
    """Replica of one model. It has no access to jobs, tenants or storage."""

    async def __init__(self, options: TritonWorkerOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        self._worker = TritonWorker(options)
        await self._worker.start()

    async def generate(
        self, call_id: str, microbatch: Sequence[GenerationParams], *, alone: bool = False
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See TritonWorker.generate."""
        generation = self._worker.generate(call_id, microbatch, alone=alone)
        async with aclosing(generation) as events:
            async for event in events:
                yield event

    async def cancel_rows(self, call_id: str, indices: Sequence[int]) -> bool:
        """See TritonWorker.cancel_rows."""
        return self._worker.cancel_rows(call_id, indices)

    async def check_health(self) -> None:
        """Raise TritonUnavailable if Triton is down: Ray then replaces the replica."""
        await self._worker.check()

    async def __del__(self) -> None:
        """Stop Triton. Serve calls this once, when the replica has drained."""
        await self._worker.stop()


def application(arguments: dict[str, Any]) -> Application:
    """Build the application of a config file: the model in `folder` on the node, and options."""
    model = load_model(Path(arguments.pop("folder")))
    options = {"threads": None, **arguments}
    return Replica.bind(TritonWorkerOptions(model=model, **options))  # type: ignore[attr-defined]
