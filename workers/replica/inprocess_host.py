"""Inprocess host."""

import asyncio
import gc
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darkroom.errors import DarkroomError, SetupError
from workers.replica.model_host import (
    LoadedModels,
    ModelFailed,
    Tensors,
    TritonTimeouts,
    TritonUnavailable,
)
from workers.replica.triton_config import _python_backend, has_tritonserver
from workers.replica.triton_runtime import (
    owned_prefix,
    stubs_of,
    sweep_leftovers,
)


class InProcessHost:
    """Triton as a library of this process. Its models run in children of this process."""

    def __init__(
        self,
        repository: Path,
        env: Mapping[str, str],
        *,
        patience: TritonTimeouts,
        backends: Path = Path("/opt/tritonserver/backends"),
    ) -> None:
        if not has_tritonserver():
            raise SetupError("tritonserver cannot be imported; it comes with NVIDIA's Triton image")
        self._repository, self._env, self._backends = repository, env, backends
        self._patience = patience
        self._models = LoadedModels()
        self._prefix = owned_prefix()
        self._server: Any = None

    async def start(self) -> None:
        import tritonserver

        os.environ.update(self._env)  # the models' processes are forked from this one
        sweep_leftovers()
        self._server = tritonserver.Server(
            model_repository=str(self._repository),
            model_control_mode=tritonserver.ModelControlMode.EXPLICIT,
            strict_model_config=True,
            exit_on_error=False,
            exit_timeout=self._patience.exit_s,
            log_warn=True,
            log_error=True,
            backend_directory=str(self._backends),
            backend_configuration={"python": _python_backend(self._prefix)},
        )
        try:
            await asyncio.to_thread(self._server.start, wait_until_ready=True)
        except tritonserver.TritonError as failure:
            raise TritonUnavailable(str(failure)) from None

    async def load(self, name: str) -> None:
        import tritonserver

        before = stubs_of(os.getpid())
        try:
            model = await asyncio.to_thread(self._server.load, name)
        except tritonserver.TritonError as failure:
            raise ModelFailed(str(failure)) from None
        self._models.loaded(name, model.config(), stubs_of(os.getpid()) - before)

    async def unload(self, name: str) -> None:
        import tritonserver

        self._models.unloaded(name)
        gc.collect()  # requests that somebody's caught error holds would keep the model
        try:
            await asyncio.to_thread(
                self._server.unload, name, wait_until_unloaded=True, timeout=self._patience.unload_s
            )
        except tritonserver.TritonError as failure:
            raise TritonUnavailable(f"{name} does not unload: {failure}") from None

    async def infer(
        self, name: str, inputs: Tensors
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        self._models.validate(name, inputs)
        responses = self._server.model(name).async_infer(inputs=dict(inputs), raise_on_error=False)
        error, over = None, False
        try:
            async for response in responses:
                over = response.final
                error = error or self._error_of(response)  # then on to the end, as over the socket
                outputs = {key: _taken_out(tensor) for key, tensor in response.outputs.items()}
                del response  # while it is held, the model cannot be unloaded
                if outputs and error is None:
                    yield outputs
            if error is not None:
                raise error
        finally:
            if not over:
                responses.cancel()
            # What is raised holds this frame: it must not be held by it in turn. In such a circle
            # the request stays, and with it the model, until Python looks for circles.
            error = None

    def _error_of(self, response: Any) -> DarkroomError | None:
        """What the response says went wrong, taken apart from it.

        The two hold each other: left so, a caught error keeps its model from unloading.
        """
        error, response.error = response.error, None
        if error is None:
            return None
        message = str(error.args[0])
        error.args = (message,)
        return self._models.failure(message)

    async def check(self) -> None:
        self._models.check(os.getpid())
        if self._server is None or not self._server.live():
            raise TritonUnavailable("Triton is not live")
        for name in self._models.configs:
            if not self._server.model(name).ready():
                raise TritonUnavailable(f"{name} is not ready")

    def kill(self) -> None:
        self._models.kill(os.getpid())

    async def stop(self) -> None:
        import tritonserver

        server, self._server = self._server, None
        if server is None:
            return
        gc.collect()
        try:
            await asyncio.to_thread(server.stop)
        except tritonserver.TritonError:  # a model that does not let go, after its exit timeout
            self.kill()
        sweep_leftovers(self._prefix)


def _taken_out(tensor: Any) -> NDArray[Any]:
    """A copy of an in-process output: a view would keep its model from unloading."""
    if tensor.data_type.name == "BYTES":
        return np.asarray(tensor.to_bytes_array())
    return np.array(np.from_dlpack(tensor))
