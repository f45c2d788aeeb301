"""The engine as a Triton model: requests in, a stream of events out. See config.pbtxt.

Read once, at load: DARKROOM_ENGINE_MODEL_DIR (a diffusers folder), DARKROOM_ENGINE_DEVICE (cpu or
cuda), DARKROOM_ENGINE_DTYPE, DARKROOM_ENGINE_THREADS (optional; default: PyTorch's),
DARKROOM_ENGINE_MAX_UNET_ROWS, DARKROOM_ENGINE_RUNNER and DARKROOM_ENGINE_PLANS_DIR (optional;
they override the parameters in config.pbtxt).
"""

import json
import os
import threading
import traceback
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # type: ignore[import-not-found]  # lives in the backend
from transformers.utils import logging

from engine.generate import generate
from engine.loop import InferenceLoop
from engine.requests import Canceled, Image, Row, RowEvent, RowFailed, Started, Step
from engine.runner import NetworkRunner
from engine.torch_runner import TorchRunner

TEXTS = ("prompt", "negative_prompt", "scheduler")
NUMBERS = ("seed", "num_inference_steps", "guidance_scale", "width", "height")
CANCELLATION_POLL_S = 0.25


class TritonPythonModel:
    """The class that Triton's python backend loads; it sets the names of the methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the networks and start the inference loop."""
        logging.disable_progress_bar()  # it would break up the server's log
        parameters = json.loads(args["model_config"])["parameters"]
        max_unet_rows = int(_option("MAX_UNET_ROWS", parameters))
        self._thread = ThreadPoolExecutor(1)  # a runner belongs to one thread
        runner = self._thread.submit(_ready_runner, parameters, max_unet_rows).result()
        self._loop = InferenceLoop(runner, max_unet_rows=max_unet_rows)
        self._thread.submit(self._loop.run)
        self._poller = CancellationPoller()

    def execute(self, requests: list[Any]) -> None:
        """Submit the requests to the loop and return: later requests join the running batch."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                row = _row(request)
            except Exception as error:  # noqa: BLE001  # this request's; the next may be fine
                _finish(sender, error)
            else:
                self._loop.submit([row], _TritonSink(sender, self._poller))

    def finalize(self) -> None:
        """Stop after the current step."""
        self._loop.stop()
        self._thread.shutdown()
        self._poller.stop()


class _TritonSink:
    """The ResponseSink of one Triton request."""

    def __init__(self, sender: Any, poller: "CancellationPoller") -> None:
        self._sender = sender
        self._poller = poller
        self._lock = threading.Lock()  # Triton must not be asked about a finished request
        self._is_closed = False
        self._is_canceled = False
        self._send_error: Exception | None = None  # no response can be sent: its rows are left out
        poller.open_sinks.add(self)

    def canceled(self) -> Collection[int]:
        """See ResponseSink."""
        return range(1) if self._send_error or self._is_canceled else ()

    def send(self, event: RowEvent) -> None:
        """See ResponseSink."""
        if self._send_error is not None:
            return
        tensors = [pb.Tensor(name, value) for name, value in _outputs(event).items()]
        try:
            self._sender.send(pb.InferenceResponse(output_tensors=tensors))
        except Exception as error:  # noqa: BLE001  # such as no shared memory for an image
            self._send_error = error

    def close(self, error: Exception | None) -> None:
        """See ResponseSink."""
        with self._lock:
            self._is_closed = True
        self._poller.open_sinks.discard(self)
        _finish(self._sender, error or self._send_error)

    def poll(self) -> None:
        """Ask Triton whether the request is canceled."""
        with self._lock:
            if not self._is_closed:
                self._is_canceled = self._sender.is_cancelled()


class CancellationPoller:
    """Thread that asks Triton which requests are canceled.

    One answer took 0.8 ms on a busy machine: too long to ask for each row before each step.
    """

    def __init__(self) -> None:
        self.open_sinks: set[_TritonSink] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancellations", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop asking."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(CANCELLATION_POLL_S):
            for sink in tuple(self.open_sinks):
                try:
                    sink.poll()
                except Exception:  # noqa: BLE001  # this request's; it is asked about again
                    pb.Logger.log_error(traceback.format_exc())


def _finish(sender: Any, error: Exception | None) -> None:
    """Send the final response, after the error if there is one."""
    try:
        if error is not None:
            pb.Logger.log_error("".join(traceback.format_exception(error)))
            reason = pb.TritonError(f"{type(error).__name__}: {error}")
            sender.send(pb.InferenceResponse(error=reason))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception:  # noqa: BLE001  # the client is gone
        pb.Logger.log_error(traceback.format_exc())


def _ready_runner(parameters: dict[str, dict[str, str]], max_unet_rows: int) -> NetworkRunner:
    """Generate once: broken weights fail at load, and the first job finds a warm model."""
    runner = _runner(parameters, max_unet_rows)
    width, height = min(runner.sizes or {(64, 64)})
    row = Row("", "", 0, num_inference_steps=1, guidance_scale=2, width=width, height=height)
    *_, last = generate(runner, [row], max_unet_rows=max_unet_rows)
    if isinstance(last, RowFailed):
        raise RuntimeError(f"the model cannot generate: {last.message}")  # noqa: TRY004  # no type error
    if isinstance(runner, TorchRunner) and runner.device.type == "cuda":
        runner.warm(max_unet_rows)  # nor does a later job pay for a new batch size
    return runner


def _runner(parameters: dict[str, dict[str, str]], max_unet_rows: int) -> NetworkRunner:
    """Load the configured runner. Raises what the runners raise when they cannot load."""
    model_dir = Path(os.environ["DARKROOM_ENGINE_MODEL_DIR"])
    device = os.environ.get("DARKROOM_ENGINE_DEVICE", "cpu")
    kind = _option("RUNNER", parameters)
    if kind == "tensorrt":
        from engine.tensorrt.runner import load_tensorrt_runner

        return load_tensorrt_runner(
            model_dir,
            Path(_option("PLANS_DIR", parameters)),
            device=device,
            max_unet_rows=max_unet_rows,
        )
    if kind != "torch":
        raise ValueError(f"the parameter runner is {kind!r}; it must be torch or tensorrt")
    threads = os.environ.get("DARKROOM_ENGINE_THREADS")
    return TorchRunner.load(
        model_dir,
        device=device,
        dtype=os.environ.get("DARKROOM_ENGINE_DTYPE", "float32"),
        threads=int(threads) if threads else None,
    )


def _option(name: str, parameters: dict[str, dict[str, str]]) -> str:
    """Return the environment's value, or else that of config.pbtxt."""
    value = os.environ.get(f"DARKROOM_ENGINE_{name}")
    return value or parameters[name.lower()]["string_value"]


def _row(request: Any) -> Row:
    def value(name: str) -> Any:
        return pb.get_input_tensor_by_name(request, name).as_numpy().item()

    texts = {name: value(name).decode("utf-8", "replace") for name in TEXTS}
    return Row(**texts, **{name: value(name) for name in NUMBERS})


def _outputs(event: RowEvent) -> dict[str, np.ndarray[Any, Any]]:
    match event:
        case Started():
            return {"started": np.array([1], np.uint8)}
        case Step():
            return {"step": np.array([event.step, event.steps], np.int32)}
        case Image():
            return {"image": event.pixels}
        case RowFailed():
            return {"error": np.array([event.code.encode(), event.message.encode()], np.object_)}
        case Canceled():
            return {"canceled": np.array([1], np.uint8)}
