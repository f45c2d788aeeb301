"""Microbatches sent to a TritonWorker, with a record of their events."""

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import aclosing

from darkroom.generation.params import GenerationParams
from workers.generation.generator import Finished, GenerationEvent, Progress, RowResult
from workers.replica.triton_worker import CONCURRENT_MICROBATCHES, TritonWorker

LONG = 900  #: steps: far more than any test waits for


def params(prompt: str = "a lighthouse", **changed: object) -> GenerationParams:
    plain = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
    fields = {"negative_prompt": "", "model": "darkroom-demo", "output_format": "png"}
    return GenerationParams.model_validate({"prompt": prompt, **fields, **plain, **changed})


class GenerationRun:
    """A microbatch being generated, and its events so far."""

    def __init__(
        self, worker: TritonWorker, *microbatch: GenerationParams, alone: bool = False
    ) -> None:
        self.events: list[GenerationEvent] = []
        self._worker, self._call_id = worker, uuid.uuid4().hex
        self._generation = worker.generate(self._call_id, microbatch, alone=alone)
        self._changed = asyncio.Condition()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with aclosing(self._generation) as events:
            async for event in events:
                async with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()

    async def has(self, kind: type[GenerationEvent], times: int = 1) -> None:
        """Wait for events of this kind."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.count(kind) >= times)

    def count(self, kind: type[GenerationEvent]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def cancel_rows(self, *indices: int) -> bool:
        return self._worker.cancel_rows(self._call_id, indices)

    async def results(self) -> dict[int, RowResult]:
        await self.task
        results = {}
        for event in self.events:
            match event:
                case Finished(index, result):
                    results[index] = result
        return results


async def generated(worker: TritonWorker, *microbatch: GenerationParams) -> dict[int, RowResult]:
    return await GenerationRun(worker, *microbatch).results()


async def occupied(worker: TritonWorker, **changed: object) -> list[GenerationRun]:
    """Start as many long microbatches as are with the model at once."""
    long = params(num_inference_steps=LONG, **changed)
    runs = [GenerationRun(worker, long) for _ in range(CONCURRENT_MICROBATCHES)]
    for run in runs:
        await run.has(Progress)
    return runs


def kinds(results: Mapping[int, RowResult]) -> dict[int, type[RowResult]]:
    return {index: type(result) for index, result in results.items()}
