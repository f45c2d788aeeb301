"""Host that runs Triton as a library of this process."""

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
from workers.replica.triton_config import has_tritonserver, python_backend_config
from workers.replica.triton_runtime import (
    owned_prefix,
    remove_leftovers,
    stubs_of,
)


class InProcessHost:
    """Triton as a library of this process. Its models run in children of this process."""

    def __init__(
        self,
        repository: Path,
        env: Mapping[str, str],
        *,
        timeouts: TritonTimeouts,
        backends: Path = Path("/opt/tritonserver/backends"),
    ) -> None:
        if not has_tritonserver():
            raise SetupError(
                "tritonserver cannot be imported; use NVIDIA's Triton image, which has it"
            )
        self._repository, self._env, self._backends = repository, env, backends
        self._timeouts = timeouts
        self._models = LoadedModels()
        self._prefix = owned_prefix()
        self._server: Any = None

    async def start(self) -> None:
        """See ModelHost."""
        import tritonserver

        os.environ.update(self._env)  # the models' processes are forked from this one
        remove_leftovers()
        self._server = tritonserver.Server(
            model_repository=str(self._repository),
            model_control_mode=tritonserver.ModelControlMode.EXPLICIT,
            strict_model_config=True,
            exit_on_error=False,
            exit_timeout=self._timeouts.exit_s,
            log_warn=True,
            log_error=True,
            backend_directory=str(self._backends),
            backend_configuration={"python": python_backend_config(self._prefix)},
        )
        try:
            await asyncio.to_thread(self._server.start, wait_until_ready=True)
        except tritonserver.TritonError as error:
            raise TritonUnavailable(str(error)) from None

    async def load(self, name: str) -> None:
        """See ModelHost."""
        import tritonserver

        before = stubs_of(os.getpid())
        try:
            model = await asyncio.to_thread(self._server.load, name)
        except tritonserver.TritonError as error:
            raise ModelFailed(str(error)) from None
        self._models.add(name, model.config(), stubs_of(os.getpid()) - before)

    async def unload(self, name: str) -> None:
        """See ModelHost."""
        import tritonserver

        self._models.remove(name)
        gc.collect()  # a request that a caught error refers to would keep the model
        try:
            await asyncio.to_thread(
                self._server.unload, name, wait_until_unloaded=True, timeout=self._timeouts.unload_s
            )
        except tritonserver.TritonError as error:
            raise TritonUnavailable(f"{name} does not unload: {error}") from None

    async def infer(
        self, name: str, inputs: Tensors
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ModelHost."""
        self._models.validate(name, inputs)
        responses = self._server.model(name).async_infer(inputs=dict(inputs), raise_on_error=False)
        error, is_final = None, False
        try:
            async for response in responses:
                is_final = response.final
                error = error or self._error_of(response)  # read on to the end, as over the socket
                outputs = {key: _copy(tensor) for key, tensor in response.outputs.items()}
                del response  # a reference to it keeps the model from unloading
                if outputs and error is None:
                    yield outputs
            if error is not None:
                raise error
        finally:
            if not is_final:
                responses.cancel()
            # The raised error refers to this frame, which must not refer to it: such a cycle keeps
            # the request, and with it the model, until Python collects garbage.
            error = None

    def _error_of(self, response: Any) -> DarkroomError | None:
        """Return the response's error, detached from it.

        The two refer to each other: otherwise a caught error keeps its model from unloading.
        """
        error, response.error = response.error, None
        if error is None:
            return None
        message = str(error.args[0])
        error.args = (message,)
        return self._models.failure(message)

    async def check(self) -> None:
        """See ModelHost."""
        self._models.check(os.getpid())
        if self._server is None or not self._server.live():
            raise TritonUnavailable("Triton is not live")
        for name in self._models.configs:
            if not self._server.model(name).ready():
                raise TritonUnavailable(f"{name} is not ready")

    def kill(self) -> None:
        """See ModelHost."""
        self._models.kill(os.getpid())

    async def stop(self) -> None:
        """See ModelHost."""
        import tritonserver

        server, self._server = self._server, None
        if server is None:
            return
        gc.collect()
        try:
            await asyncio.to_thread(server.stop)
        except tritonserver.TritonError:  # a model is still in use after the exit timeout
            self.kill()
        remove_leftovers(self._prefix)


def _copy(tensor: Any) -> NDArray[Any]:
    """Copy an in-process output: a view would keep its model from unloading."""
    if tensor.data_type.name == "BYTES":
        return np.asarray(tensor.to_bytes_array())
    return np.array(np.from_dlpack(tensor))
