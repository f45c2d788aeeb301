"""What a host of models is, whichever way it runs Triton, and what every host checks."""

import os
import signal
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from darkroom.errors import DarkroomError
from workers.replica.triton_runtime import is_alive, is_running

Tensors = Mapping[str, NDArray[Any]]

#: Triton's names for what the models here exchange. BYTES travel as arrays of `bytes` objects.
DTYPES: Final[Mapping[str, type[np.generic]]] = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
}


@dataclass(frozen=True)
class TritonTimeouts:
    """How long a host waits, in seconds, before it takes Triton for broken."""

    start_s: float = 30  # 0.1 s measured; a cold disk may take seconds
    check_s: float = 5  # a frozen server answers nothing
    unload_s: int = 30  # 1 to 3 s measured, after the last request
    exit_s: int = 30  # what Triton gives requests in flight once it is told to stop
    tidy_s: float = 5  # on top of that, before it is killed


class TritonUnavailable(DarkroomError):
    """Triton, or the process that runs a model for it, is dead or frozen: start another host."""


class BadRequest(DarkroomError):
    """The inputs are not what the model's configuration asks for; nothing was submitted."""


class ModelFailed(DarkroomError):
    """The model raised, or could not be loaded. The host lives on."""


class ModelHost(Protocol):
    """One Triton. No method blocks the event loop; all belong to one loop."""

    async def start(self) -> None:
        """Bring Triton up, with no model. Raises TritonUnavailable."""
        ...

    async def load(self, name: str) -> None:
        """Load a model of the repository. Raises ModelFailed, TritonUnavailable."""
        ...

    async def unload(self, name: str) -> None:
        """Unload it, and wait until it is gone. Raises TritonUnavailable when it does not go."""
        ...

    def infer(self, name: str, inputs: Tensors) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """The model's responses as they come, copied: each holds the outputs the model set.

        Cancelling the task, or closing the iterator (`contextlib.aclosing`), cancels the request.
        There is no deadline inside, because only the caller knows the work: put `asyncio.timeout`
        around each response, and take its end for a frozen model.
        Raises BadRequest, ModelFailed, TritonUnavailable.
        """
        ...

    async def check(self) -> None:
        """Raises TritonUnavailable unless Triton answers and every model's process is alive.

        It asks the processes and not the model, so it says the same while the model is busy.
        """
        ...

    def kill(self) -> None:
        """End what runs the models, now: requests under way fail, and `stop` need not wait."""
        ...

    async def stop(self) -> None:
        """Stop Triton and all its processes, by force if need be. May be called twice."""
        ...


def validate(name: str, config: Mapping[str, Any], inputs: Tensors) -> None:
    """Raises BadRequest unless `inputs` fit the model's configuration (max_batch_size 0).

    Triton would refuse them too, but in process it then leaks the request, and the model can never
    be unloaded again.
    """
    wanted = {entry["name"]: entry for entry in config["input"]}
    if unknown := inputs.keys() - wanted.keys():
        raise BadRequest(f"{name} has no input {', '.join(sorted(unknown))}")
    optional = {key for key, entry in wanted.items() if entry.get("optional")}
    if missing := wanted.keys() - optional - inputs.keys():
        raise BadRequest(f"{name} also wants {', '.join(sorted(missing))}")
    for key, array in inputs.items():
        dtype, dims = DTYPES[wanted[key]["data_type"]], [int(d) for d in wanted[key]["dims"]]
        if array.dtype.type is not dtype:
            raise BadRequest(f"{name}.{key} is {array.dtype}, not {np.dtype(dtype)}")
        fits = len(dims) == array.ndim and all(
            dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True)
        )
        if not fits:
            raise BadRequest(f"{name}.{key} has the shape {list(array.shape)}, not {dims}")


class LoadedModels:
    """What is loaded: its configuration, and the processes that run it."""

    def __init__(self) -> None:
        self.configs: dict[str, Mapping[str, Any]] = {}
        self._stubs: dict[str, frozenset[int]] = {}
        self._unhealthy: str | None = None

    def loaded(self, name: str, config: Mapping[str, Any], stubs: frozenset[int]) -> None:
        self.configs[name], self._stubs[name] = config, stubs

    def unloaded(self, name: str) -> None:
        self.configs.pop(name, None)
        self._stubs.pop(name, None)

    def validate(self, name: str, inputs: Tensors) -> None:
        if name not in self.configs:
            raise BadRequest(f"{name} is not loaded")
        validate(name, self.configs[name], inputs)

    def failure(self, message: str) -> DarkroomError:
        """The error for what Triton said. 2.51 keeps a model "ready" whose process has died."""
        if "is not healthy" in message:
            self._unhealthy = message
            return TritonUnavailable(message)
        return ModelFailed(message)

    def kill(self, parent: int) -> None:
        for stubs in self._stubs.values():
            for pid in stubs:
                if is_alive(pid, parent):
                    os.kill(pid, signal.SIGKILL)

    def check(self, parent: int) -> None:
        if self._unhealthy:
            raise TritonUnavailable(self._unhealthy)
        for name, stubs in self._stubs.items():
            for pid in stubs:
                if not is_running(pid, parent):
                    raise TritonUnavailable(f"the process {pid} of {name} is dead or stopped")
