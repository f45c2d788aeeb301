"""Subprocess host."""

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
from workers.replica.triton_config import _python_backend
from workers.replica.triton_runtime import (
    LAUNCHER,
    bundle_environment,
    end_process,
    find_bundle,
    has_exited,
    lay_out_backends,
    owned_prefix,
    stubs_of,
    sweep_leftovers,
)


class SubprocessHost:
    """The Triton that nvidia-pytriton carries, as a child of this process, reached by gRPC.

    Its socket lies in a folder that only this user can enter: the bundled release is old, and
    whoever can talk to it can run code in it. The child dies with the *thread* that calls `start`,
    so that must be one that lives as long as the host, as an event loop's thread does.
    """

    def __init__(
        self, repository: Path, env: Mapping[str, str], *, patience: TritonTimeouts
    ) -> None:
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
                while not await self._answers():  # noqa: ASYNC110  # Triton rings no notifier
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await self.stop()
            raise TritonUnavailable(
                f"Triton did not come up in {self._patience.start_s} s"
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
        """Whether Triton is up. Raises TritonUnavailable when its process is not."""
        import grpc
        from tritonclient.utils import InferenceServerException

        if self._has_exited():
            raise TritonUnavailable("Triton has exited; its last words are in the log")
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
                while name in await self._standing():  # noqa: ASYNC110  # Triton rings no notifier
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TritonUnavailable(f"{name} does not unload") from None

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
            raise TritonUnavailable(f"the stream broke: {broken.details()}") from None
        finally:
            responses.cancel()

    async def check(self) -> None:
        if self._process is None or self._has_exited():
            raise TritonUnavailable("Triton is not running")
        self._models.check(self._pid)
        try:
            async with asyncio.timeout(self._patience.check_s):
                live = await self._call(self._client.is_server_live())
        except TimeoutError:
            raise TritonUnavailable(
                f"Triton has not answered for {self._patience.check_s} s"
            ) from None
        if not live:
            raise TritonUnavailable("Triton is not live")

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
    """The outputs that this response carries. Copied: a view is read-only and keeps the message."""
    arrays = {name: response.as_numpy(name) for name in names}
    return {name: np.array(array) for name, array in arrays.items() if array is not None}
