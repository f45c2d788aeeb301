"""Host that runs Triton as a child process, over gRPC."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.replica.model_host import (
    LoadedModels,
    Tensors,
    TritonTimeouts,
    TritonUnavailable,
)
from workers.replica.triton_config import python_backend_config
from workers.replica.triton_runtime import (
    LAUNCHER,
    bundle_environment,
    end_process,
    find_bundle,
    has_exited,
    lay_out_backends,
    owned_prefix,
    remove_leftovers,
    stubs_of,
)


class SubprocessHost:
    """The Triton in nvidia-pytriton, as a child of this process, reached by gRPC.

    Its socket is in a folder that only this user can enter: the bundled release is old, and each
    of its clients can run code in it. The child dies with the *thread* that calls `start`, which
    must live as long as the host, as an event loop's thread does.
    """

    def __init__(
        self, repository: Path, env: Mapping[str, str], *, timeouts: TritonTimeouts
    ) -> None:
        self._bundle = find_bundle()
        self._repository, self._env, self._timeouts = repository, env, timeouts
        self._models = LoadedModels()
        self._prefix = owned_prefix()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._client: Any = None

    async def start(self) -> None:
        """See ModelHost."""
        import tritonclient.grpc.aio as triton_grpc

        await asyncio.to_thread(remove_leftovers)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._prefix}-"))
        self._process = self._spawn(self._folder)
        self._client = triton_grpc.InferenceServerClient(
            f"unix:{self._folder}/socket:1",
            channel_args=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # by default it waits a second or more before it tries the socket again
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )
        try:
            async with asyncio.timeout(self._timeouts.start_s):
                while not await self._is_ready():  # noqa: ASYNC110  # Triton sends no notification
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await self.stop()
            raise TritonUnavailable(
                f"Triton did not start within {self._timeouts.start_s} s"
            ) from None
        except TritonUnavailable:
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
                for key, value in python_backend_config(self._prefix).items()
            ),
            f"--grpc-address=unix:{folder}/socket",
            "--grpc-port=1",  # Triton appends it to the socket's name
            "--allow-http=false",
            "--allow-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--log-info=false",
            f"--exit-timeout-secs={self._timeouts.exit_s}",
        ]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command],
            env=bundle_environment(self._bundle, self._env),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _is_ready(self) -> bool:
        """Return whether Triton is ready. Raises TritonUnavailable if its process has exited."""
        import grpc
        from tritonclient.utils import InferenceServerException

        if self._has_exited():
            raise TritonUnavailable("Triton has exited; the log has its last message")
        try:
            return bool(await self._client.is_server_ready())
        except (InferenceServerException, grpc.RpcError):
            return False

    async def load(self, name: str) -> None:
        """See ModelHost."""
        before = stubs_of(self._pid)
        await self._call(self._client.load_model(name))
        reply = await self._call(self._client.get_model_config(name, as_json=True))
        self._models.add(name, reply["config"], stubs_of(self._pid) - before)

    async def unload(self, name: str) -> None:
        """See ModelHost."""
        self._models.remove(name)
        await self._call(self._client.unload_model(name))
        try:
            async with asyncio.timeout(self._timeouts.unload_s):
                while name in await self._present():  # noqa: ASYNC110  # Triton sends no notification
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TritonUnavailable(f"{name} does not unload") from None

    async def _present(self) -> set[str]:
        """Return the models that are loaded, loading or unloading."""
        reply = await self._call(self._client.get_model_repository_index(as_json=True))
        return {
            entry["name"]
            for entry in reply.get("models", [])
            if entry.get("state", "UNAVAILABLE") != "UNAVAILABLE"
        }

    async def infer(
        self, name: str, inputs: Tensors
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ModelHost."""
        import grpc

        self._models.validate(name, inputs)
        names = [output["name"] for output in self._models.configs[name]["output"]]
        responses = self._client.stream_infer(_one_request(name, inputs))
        error = None
        try:
            async for response, failure in responses:
                # To the end also after an error: 2.51 never unloads a model whose stream is
                # canceled between its error and its final response.
                error = error or failure
                if error is None and (outputs := _copied(response, names)):
                    yield outputs
            if error is not None:
                raise self._models.failure(error.message())
        except grpc.RpcError as disconnect:
            raise TritonUnavailable(f"the stream broke: {disconnect.details()}") from None
        finally:
            responses.cancel()

    async def check(self) -> None:
        """See ModelHost."""
        if self._process is None or self._has_exited():
            raise TritonUnavailable("Triton is not running")
        self._models.check(self._pid)
        try:
            async with asyncio.timeout(self._timeouts.check_s):
                live = await self._call(self._client.is_server_live())
        except TimeoutError:
            raise TritonUnavailable(
                f"Triton has not answered for {self._timeouts.check_s} s"
            ) from None
        if not live:
            raise TritonUnavailable("Triton is not live")

    def kill(self) -> None:
        """See ModelHost."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """See ModelHost."""
        self._models = LoadedModels()
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
        if self._process is not None:
            timeouts = self._timeouts
            await end_process(self._process, grace_s=timeouts.exit_s + timeouts.kill_s)
            self._process = None
        remove_leftovers(self._prefix)

    @property
    def _pid(self) -> int:
        if self._process is None:
            raise TritonUnavailable("Triton is not running")
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
                raise TritonUnavailable(failure.message()) from None
            raise self._models.failure(failure.message()) from None


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
    """Copy the outputs of a response: a view is read-only and keeps the message."""
    arrays = {name: response.as_numpy(name) for name in names}
    return {name: np.array(array) for name, array in arrays.items() if array is not None}
