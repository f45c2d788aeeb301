"""Interface of the hosts that run Triton, and the checks that all of them make."""

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

#: Triton's names for the types that the models here use. BYTES are arrays of `bytes` objects.
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
    """Seconds that a host waits before it considers Triton broken."""

    start_s: float = 30  # 0.1 s measured; a cold disk may take seconds
    check_s: float = 5  # a frozen server answers nothing
    unload_s: int = 30  # 1 to 3 s measured, after the last request
    exit_s: int = 30  # Triton's limit for requests in flight when it stops
    kill_s: float = 5  # after that, until it is killed


class TritonUnavailable(DarkroomError):
    """Triton, or its process that runs a model, is dead or frozen: start another host."""


class BadRequest(DarkroomError):
    """The inputs do not fit the model's configuration; nothing was submitted."""


class ModelFailed(DarkroomError):
    """The model raised, or could not be loaded. The host keeps running."""


class ModelHost(Protocol):
    """One Triton. No method blocks the event loop; all belong to one loop."""

    async def start(self) -> None:
        """Start Triton without a model. Raises TritonUnavailable."""
        ...

    async def load(self, name: str) -> None:
        """Load a model of the repository. Raises ModelFailed, TritonUnavailable."""
        ...

    async def unload(self, name: str) -> None:
        """Unload a model and wait for it. Raises TritonUnavailable if it does not unload."""
        ...

    def infer(self, name: str, inputs: Tensors) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """Yield the model's responses as they come, copied: each holds the outputs the model set.

        Canceling the task, or closing the iterator (`contextlib.aclosing`), cancels the request.
        There is no deadline inside, because only the caller knows the work: put `asyncio.timeout`
        around each response, and treat its expiry as a frozen model.
        Raises BadRequest, ModelFailed, TritonUnavailable.
        """
        ...

    async def check(self) -> None:
        """Raise TritonUnavailable unless Triton answers and every model's process is alive.

        It checks the processes and not the model, so a busy model does not matter.
        """
        ...

    def kill(self) -> None:
        """Kill the processes that run the models: their requests fail, and `stop` need not wait."""
        ...

    async def stop(self) -> None:
        """Stop Triton and all its processes, by force if necessary. May be called twice."""
        ...


def validate(name: str, config: Mapping[str, Any], inputs: Tensors) -> None:
    """Raise BadRequest unless `inputs` fit the model's configuration (max_batch_size 0).

    Triton would reject them too, but in process it then leaks the request, and the model can never
    be unloaded again.
    """
    expected = {entry["name"]: entry for entry in config["input"]}
    if unknown := inputs.keys() - expected.keys():
        raise BadRequest(f"{name} has no input {', '.join(sorted(unknown))}")
    optional = {key for key, entry in expected.items() if entry.get("optional")}
    if missing := expected.keys() - optional - inputs.keys():
        raise BadRequest(f"{name} needs {', '.join(sorted(missing))}")
    for key, array in inputs.items():
        dtype, dims = DTYPES[expected[key]["data_type"]], [int(d) for d in expected[key]["dims"]]
        if array.dtype.type is not dtype:
            raise BadRequest(f"{name}.{key} is {array.dtype}, not {np.dtype(dtype)}")
        fits = len(dims) == array.ndim and all(
            dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True)
        )
        if not fits:
            raise BadRequest(f"{name}.{key} has the shape {list(array.shape)}, not {dims}")


class LoadedModels:
    """Configurations of the loaded models, and the processes that run them."""

    def __init__(self) -> None:
        self.configs: dict[str, Mapping[str, Any]] = {}
        self._stubs: dict[str, frozenset[int]] = {}
        self._unhealthy: str | None = None

    def add(self, name: str, config: Mapping[str, Any], stubs: frozenset[int]) -> None:
        """Record a loaded model; `stubs` are its process ids."""
        self.configs[name], self._stubs[name] = config, stubs

    def remove(self, name: str) -> None:
        """Forget an unloaded model."""
        self.configs.pop(name, None)
        self._stubs.pop(name, None)

    def validate(self, name: str, inputs: Tensors) -> None:
        """Raise BadRequest unless the model is loaded and takes these inputs."""
        if name not in self.configs:
            raise BadRequest(f"{name} is not loaded")
        validate(name, self.configs[name], inputs)

    def failure(self, message: str) -> DarkroomError:
        """Return the error for a message. Triton 2.51 keeps a dead model process "ready"."""
        if "is not healthy" in message:
            self._unhealthy = message
            return TritonUnavailable(message)
        return ModelFailed(message)

    def kill(self, parent: int) -> None:
        """Kill the models' processes, children of `parent`."""
        for stubs in self._stubs.values():
            for pid in stubs:
                if is_alive(pid, parent):
                    os.kill(pid, signal.SIGKILL)

    def check(self, parent: int) -> None:
        """Raise TritonUnavailable if a model's process is dead, stopped or unhealthy."""
        if self._unhealthy:
            raise TritonUnavailable(self._unhealthy)
        for name, stubs in self._stubs.items():
            for pid in stubs:
                if not is_running(pid, parent):
                    raise TritonUnavailable(f"the process {pid} of {name} is dead or stopped")
