"""Triton's side of the engine: requests in, a stream of events out. See config.pbtxt.

Read once, at load: DARKROOM_ENGINE_MODEL_DIR (a diffusers folder), DARKROOM_ENGINE_DEVICE (cpu or
cuda), DARKROOM_ENGINE_DTYPE, DARKROOM_ENGINE_THREADS (optional; PyTorch's own choice without it),
DARKROOM_ENGINE_FLAGS_DIR (optional; where the files are that `flags` names),
DARKROOM_ENGINE_MAX_UNET_ROWS, DARKROOM_ENGINE_RUNNER and DARKROOM_ENGINE_PLANS_DIR (optional;
instead of the parameters in config.pbtxt).
"""

import json
import os
import re
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
from engine.requests import Event, Image, Row, RowFailed, Step
from engine.runner import NetworkRunner
from engine.torch_runner import TorchRunner

TEXTS = ("prompt", "negative_prompt", "scheduler")
NUMBERS = ("seed", "num_inference_steps", "guidance_scale", "width", "height")


class TritonPythonModel:
    """The name and the methods are the python backend's."""

    def initialize(self, args: dict[str, str]) -> None:
        logging.disable_progress_bar()  # it would land in the middle of the server's log
        parameters = json.loads(args["model_config"])["parameters"]
        max_unet_rows = int(_said("MAX_UNET_ROWS", parameters))
        self._flags_dir = os.environ.get("DARKROOM_ENGINE_FLAGS_DIR")
        self._thread = ThreadPoolExecutor(1)  # a runner's calls all come from one
        runner = self._thread.submit(_ready_runner, parameters, max_unet_rows).result()
        self._loop = InferenceLoop(runner, max_unet_rows=max_unet_rows)
        self._thread.submit(self._loop.run)

    def execute(self, requests: list[Any]) -> None:
        """Only hands them to the loop: the next may come while these are drawn, and join them."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                rows = _rows(request)
                reply = _Reply(sender, flags=self._flags(request), rows=len(rows))
            except Exception as failure:  # noqa: BLE001  # this request's; the next may be fine
                _end(sender, failure)
            else:
                self._loop.ask(rows, reply)

    def finalize(self) -> None:
        self._loop.stop()
        self._thread.shutdown()

    def _flags(self, request: Any) -> int:
        """The file of this request's flags: one byte a row, not zero once it is withdrawn."""
        named = pb.get_input_tensor_by_name(request, "flags")
        path = Path(os.devnull)
        if named is not None:
            [name] = named.as_numpy().tolist()
            path = _file_in(self._flags_dir, name.decode())
        return os.open(path, os.O_RDONLY)


class _Reply:
    """Triton's way back to who asked, as the drawing loop has it."""

    def __init__(self, sender: Any, *, flags: int, rows: int) -> None:
        """`flags` is an open file, see `withdrawn`; it is closed at the end."""
        self._sender = sender
        self._flags = flags
        self._rows = rows
        self._lost: Exception | None = None  # why it cannot be told; it is drawn no further then

    def withdrawn(self) -> Collection[int]:
        """See Asker."""
        if self._lost is not None or self._sender.is_cancelled():
            return range(self._rows)
        return [at for at, flag in enumerate(os.pread(self._flags, self._rows, 0)) if flag]

    def tell(self, event: Event) -> None:
        """See Asker."""
        if self._lost is not None:
            return
        tensors = [pb.Tensor(name, value) for name, value in _outputs(event).items()]
        try:
            self._sender.send(pb.InferenceResponse(output_tensors=tensors))
        except Exception as failure:  # noqa: BLE001  # no shared memory for a picture, say
            self._lost = failure

    def end(self, failure: Exception | None) -> None:
        """See Asker."""
        os.close(self._flags)
        _end(self._sender, failure or self._lost)


def _end(sender: Any, failure: Exception | None) -> None:
    """The last that this request hears."""
    try:
        if failure is not None:
            pb.Logger.log_error("".join(traceback.format_exception(failure)))
            reason = pb.TritonError(f"{type(failure).__name__}: {failure}")
            sender.send(pb.InferenceResponse(error=reason))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception:  # noqa: BLE001  # nobody is there to be told
        pb.Logger.log_error(traceback.format_exc())


def _ready_runner(parameters: dict[str, dict[str, str]], max_unet_rows: int) -> NetworkRunner:
    """Weights that cannot draw fail at load, and the first job does not pay for a cold start."""
    runner = _runner(parameters, max_unet_rows)
    width, height = min(runner.sizes or {(64, 64)})
    trial = Row("", "", 0, num_inference_steps=1, guidance_scale=2, width=width, height=height)
    *_, end = generate(runner, [trial], max_unet_rows=max_unet_rows)
    if isinstance(end, RowFailed):
        raise RuntimeError(f"the model cannot draw: {end.message}")  # noqa: TRY004  # no type error
    if isinstance(runner, TorchRunner) and runner.device.type == "cuda":
        runner.warm(max_unet_rows)  # nor any other job for a first of its kind
    return runner


def _runner(parameters: dict[str, dict[str, str]], max_unet_rows: int) -> NetworkRunner:
    """What the configuration asks for. Raises what the runners raise when they cannot load."""
    model_dir = Path(os.environ["DARKROOM_ENGINE_MODEL_DIR"])
    device = os.environ.get("DARKROOM_ENGINE_DEVICE", "cpu")
    kind = _said("RUNNER", parameters)
    if kind == "tensorrt":
        from engine.tensorrt.runner import load_tensorrt_runner

        return load_tensorrt_runner(
            model_dir,
            Path(_said("PLANS_DIR", parameters)),
            device=device,
            max_unet_rows=max_unet_rows,
        )
    if kind != "torch":
        raise ValueError(f"the parameter runner is {kind!r}; it is torch or tensorrt")
    threads = os.environ.get("DARKROOM_ENGINE_THREADS")
    return TorchRunner.load(
        model_dir,
        device=device,
        dtype=os.environ.get("DARKROOM_ENGINE_DTYPE", "float32"),
        threads=int(threads) if threads else None,
    )


def _said(name: str, parameters: dict[str, dict[str, str]]) -> str:
    """By the environment, or else by config.pbtxt."""
    said = os.environ.get(f"DARKROOM_ENGINE_{name}")
    return said or parameters[name.lower()]["string_value"]


def _file_in(folder: str | None, name: str) -> Path:
    if folder is None or not re.fullmatch("[0-9a-f]{32}", name):
        raise ValueError("flags must name a file in DARKROOM_ENGINE_FLAGS_DIR by 32 hex digits")
    return Path(folder, name)


def _rows(request: Any) -> list[Row]:
    """One row for each entry. Raises ValueError when the inputs are not of one length."""

    def column(name: str) -> list[Any]:
        return list(pb.get_input_tensor_by_name(request, name).as_numpy().tolist())

    texts = [[text.decode("utf-8", "replace") for text in column(name)] for name in TEXTS]
    entries = zip(*texts, *(column(name) for name in NUMBERS), strict=True)
    return [Row(**dict(zip((*TEXTS, *NUMBERS), entry, strict=True))) for entry in entries]


def _outputs(event: Event) -> dict[str, np.ndarray[Any, Any]]:
    index = {"index": np.array([event.index], np.int32)}
    match event:
        case Step():
            return index | {"step": np.array([event.step, event.steps], np.int32)}
        case Image():
            return index | {"image": event.pixels}
        case RowFailed():
            words = [event.code.encode(), event.message.encode()]
            return index | {"error": np.array(words, np.object_)}
