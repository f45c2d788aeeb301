"""One Triton request for each row of a microbatch, merged into one stream of responses."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from darkroom.generation.params import GenerationParams
from workers.replica.model_host import ModelFailed, ModelHost, Tensors

TRITON_MODEL: Final = "stable_diffusion"

#: After an error of the model, its other requests end within a step. Triton 2.51 never unloads a
#: model of which a request was canceled between its error and its final response.
ERRORS_END_WITHIN_S: Final = 0.5

Response: TypeAlias = Mapping[str, npt.NDArray[Any]]  #: see the model's config.pbtxt


class RowRequests:
    """The requests of one microbatch; each can be canceled by itself. For one event loop."""

    def __init__(self, host: ModelHost, inputs: Sequence[Tensors]) -> None:
        self._host, self._inputs = host, inputs
        self._responses: asyncio.Queue[tuple[int, Response | Exception | None]] = asyncio.Queue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._open = len(inputs)
        self.canceled: set[int] = set()

    async def __aenter__(self) -> Self:
        """Submit the rows in order, but for those that are canceled already."""
        for index in range(len(self._inputs)):
            self._tasks[index] = asyncio.create_task(self._run(index))
        return self

    async def __aexit__(self, *error: object) -> None:
        """Cancel what is still open."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def cancel(self, indices: Collection[int]) -> None:
        """Cancel these rows' requests, also before they are sent."""
        for index in set(indices) - self.canceled:
            self.canceled.add(index)
            if task := self._tasks.get(index):
                task.cancel()

    async def next(self) -> tuple[int, Response | None] | None:
        """Return the next response of any row, None after a row's last one; None after all rows.

        Raises what ModelHost.infer raises for any of the rows.
        """
        if not self._open:
            return None
        index, response = await self._responses.get()
        if isinstance(response, ModelFailed):
            await asyncio.wait(self._tasks.values(), timeout=ERRORS_END_WITHIN_S)
        if isinstance(response, Exception):
            raise response
        if response is None:
            self._open -= 1
        return index, response

    async def _run(self, index: int) -> None:
        end = None
        try:
            if index in self.canceled:
                return
            async with aclosing(self._host.infer(TRITON_MODEL, self._inputs[index])) as responses:
                async for response in responses:
                    self._responses.put_nowait((index, response))
        except Exception as error:  # noqa: BLE001  # raised by `next`
            end = error
        finally:
            self._responses.put_nowait((index, end))


def row_inputs(params: GenerationParams, scheduler: str) -> Tensors:
    """Return the inputs of one row's request."""

    def text(value: str) -> npt.NDArray[np.object_]:
        return np.array([value.encode()], dtype=np.object_)

    return {
        "prompt": text(params.prompt),
        "negative_prompt": text(params.negative_prompt),
        "scheduler": text(scheduler),
        "seed": np.array([params.seed], np.int64),
        "num_inference_steps": np.array([params.num_inference_steps], np.int32),
        "guidance_scale": np.array([params.guidance_scale], np.float32),
        "width": np.array([params.width], np.int32),
        "height": np.array([params.height], np.int32),
    }
