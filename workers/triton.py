"""Hosts Triton behind one small interface: inside this process, or as a child over a socket."""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darkroom.errors import DarkroomError, SetupError
from workers.model_host import (
    BadRequest,
    HostDown,
    LoadedModels,
    ModelFailed,
    ModelHost,
    Patience,
    Tensors,
)
from workers.triton_runtime import (
    LAUNCHER,
    SHARED_MEMORY_BYTES,
    bundle_environment,
    end_process,
    find_bundle,
    has_exited,
    lay_out_backends,
    owned_prefix,
    stubs_of,
    sweep_leftovers,
)

__all__ = [
    "BadRequest",
    "HostDown",
    "InProcessHost",
    "ModelFailed",
    "ModelHost",
    "Patience",
    "SubprocessHost",
    "Tensors",
    "open_host",
]


def open_host(
    kind: Literal["auto", "inprocess", "subprocess"],
    repository: Path,
    env: Mapping[str, str],
    *,
    patience: Patience = Patience(),  # noqa: B008  # frozen
) -> ModelHost:
    """A host that is not started yet. `env` is added to the environment of the models.

    "auto" is in process where `import tritonserver` works. Raises SetupError, saying what to
    install.
    """
    if kind == "inprocess" or (kind == "auto" and has_tritonserver()):
        return InProcessHost(repository, env, patience=patience)
    return SubprocessHost(repository, env, patience=patience)


def has_tritonserver() -> bool:
    """Whether Triton's in-process API works here. Finding it is not enough: it links C++."""
    try:
        import tritonserver  # noqa: F401  # NVIDIA's image has it
    except ImportError:
        return False
    return True


class InProcessHost:
    """Triton as a library of this process. Its models run in children of this process."""

    def __init__(
        self,
        repository: Path,
        env: Mapping[str, str],
        *,
        patience: Patience,
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
            raise HostDown(str(failure)) from None

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
            raise HostDown(f"{name} does not unload: {failure}") from None

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
            raise HostDown("Triton is not live")
        for name in self._models.configs:
            if not self._server.model(name).ready():
                raise HostDown(f"{name} is not ready")

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


class SubprocessHost:
    """The Triton that nvidia-pytriton carries, as a child of this process, reached by gRPC.

    Its socket lies in a folder that only this user can enter: the bundled release is old, and
    whoever can talk to it can run code in it. The child dies with the *thread* that calls `start`,
    so that must be one that lives as long as the host, as an event loop's thread does.
    """

    def __init__(self, repository: Path, env: Mapping[str, str], *, patience: Patience) -> None:
        self._bundle = find_bundle()
        self._repository, self._env, self._patience = repository, env, patience
        self._models = LoadedModels()
        self._prefix = owned_prefix()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._client: Any = None

    async def start(self) -> None:
        import tritonclient.grpc.aio as triton_grpc

        await asyncio.to_thread(sweep_leftovers)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._prefix}-"))
        self._process = self._spawn(self._folder)
        self._client = triton_grpc.InferenceServerClient(
            f"unix:{self._folder}/socket:1",
            channel_args=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # the default waits a second and more before it looks for the socket again
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )
        try:
            async with asyncio.timeout(self._patience.start_s):
                while not await self._answers():  # noqa: ASYNC110  # Triton rings no bell
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await self.stop()
            raise HostDown(f"Triton did not come up in {self._patience.start_s} s") from None
        except HostDown:
            await self.stop()
            raise

    def _spawn(self, folder: Path) -> subprocess.Popen[bytes]:
        """Start Triton in a process group of its own. Its output goes where this process's goes."""
        command = [
            str(self._bundle.server),
            f"--model-repository={self._repository}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            f"--backend-directory={lay_out_backends(self._bundle, folder)}",
            f"--cache-directory={self._bundle.caches}",
            *(
                f"--backend-config=python,{key}={value}"
                for key, value in _python_backend(self._prefix).items()
            ),
            f"--grpc-address=unix:{folder}/socket",
            "--grpc-port=1",  # Triton appends it to the socket's name
            "--allow-http=false",
            "--allow-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--log-info=false",
            f"--exit-timeout-secs={self._patience.exit_s}",
        ]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command],
            env=bundle_environment(self._bundle, self._env),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _answers(self) -> bool:
        """Whether Triton is up. Raises HostDown when its process is not."""
        import grpc
        from tritonclient.utils import InferenceServerException

        if self._has_exited():
            raise HostDown("Triton has exited; its last words are in the log")
        try:
            return bool(await self._client.is_server_ready())
        except (InferenceServerException, grpc.RpcError):
            return False

    async def load(self, name: str) -> None:
        before = stubs_of(self._pid)
        await self._call(self._client.load_model(name))
        reply = await self._call(self._client.get_model_config(name, as_json=True))
        self._models.loaded(name, reply["config"], stubs_of(self._pid) - before)

    async def unload(self, name: str) -> None:
        self._models.unloaded(name)
        await self._call(self._client.unload_model(name))
        try:
            async with asyncio.timeout(self._patience.unload_s):
                while name in await self._standing():  # noqa: ASYNC110  # Triton rings no bell
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise HostDown(f"{name} does not unload") from None

    async def _standing(self) -> set[str]:
        """The models that are loaded, or on their way in or out."""
        reply = await self._call(self._client.get_model_repository_index(as_json=True))
        return {
            entry["name"]
            for entry in reply.get("models", [])
            if entry.get("state", "UNAVAILABLE") != "UNAVAILABLE"
        }

    async def infer(
        self, name: str, inputs: Tensors
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        import grpc

        self._models.validate(name, inputs)
        wanted = [output["name"] for output in self._models.configs[name]["output"]]
        responses = self._client.stream_infer(_one_request(name, inputs))
        error = None
        try:
            async for response, failure in responses:
                # To the end also after an error: 2.51 never lets go of a model whose stream is
                # cancelled between its error and its final response.
                error = error or failure
                if error is None and (outputs := _copied(response, wanted)):
                    yield outputs
            if error is not None:
                raise self._models.failure(error.message())
        except grpc.RpcError as broken:
            raise HostDown(f"the stream broke: {broken.details()}") from None
        finally:
            responses.cancel()

    async def check(self) -> None:
        if self._process is None or self._has_exited():
            raise HostDown("Triton is not running")
        self._models.check(self._pid)
        try:
            async with asyncio.timeout(self._patience.check_s):
                live = await self._call(self._client.is_server_live())
        except TimeoutError:
            raise HostDown(f"Triton has not answered for {self._patience.check_s} s") from None
        if not live:
            raise HostDown("Triton is not live")

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        self._models = LoadedModels()
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
        if self._process is not None:
            patience = self._patience
            await end_process(self._process, grace_s=patience.exit_s + patience.tidy_s)
            self._process = None
        sweep_leftovers(self._prefix)

    @property
    def _pid(self) -> int:
        if self._process is None:
            raise HostDown("Triton is not running")
        return self._process.pid

    def _has_exited(self) -> bool:
        return self._process is None or has_exited(self._process)

    async def _call(self, reply: Awaitable[Any]) -> Any:
        """Await one gRPC call and translate its errors."""
        from tritonclient.utils import InferenceServerException

        try:
            return await reply
        except InferenceServerException as failure:
            if failure.status() == "StatusCode.UNAVAILABLE":
                raise HostDown(failure.message()) from None
            raise self._models.failure(failure.message()) from None


def _taken_out(tensor: Any) -> NDArray[Any]:
    """A copy of an in-process output: a view would keep its model from unloading."""
    if tensor.data_type.name == "BYTES":
        return np.asarray(tensor.to_bytes_array())
    return np.array(np.from_dlpack(tensor))


async def _one_request(name: str, inputs: Tensors) -> AsyncIterator[dict[str, Any]]:
    import tritonclient.grpc as triton_grpc
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for key, array in inputs.items():
        tensor = triton_grpc.InferInput(key, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    yield {"model_name": name, "inputs": tensors, "enable_empty_final_response": True}


def _copied(response: Any, names: list[str]) -> dict[str, NDArray[Any]]:
    """The outputs that this response carries. Copied: a view is read-only and keeps the message."""
    arrays = {name: response.as_numpy(name) for name in names}
    return {name: np.array(array) for name, array in arrays.items() if array is not None}


def _python_backend(prefix: str) -> dict[str, str]:
    return {
        "shm-region-prefix-name": prefix,
        "shm-default-byte-size": str(SHARED_MEMORY_BYTES),
        "shm-growth-byte-size": str(SHARED_MEMORY_BYTES),
    }
