"""Triton's side of the engine: requests in, a stream of events out. See config.pbtxt.

Read once, at load: DARKROOM_ENGINE_MODEL_DIR (a diffusers folder), DARKROOM_ENGINE_DEVICE (cpu or
cuda), DARKROOM_ENGINE_DTYPE, DARKROOM_ENGINE_THREADS (optional; PyTorch's own choice without it),
DARKROOM_ENGINE_FLAGS_DIR (optional; where the files are that `flags` names), DARKROOM_ENGINE_RUNNER
and DARKROOM_ENGINE_PLANS_DIR (optional; instead of the parameters in config.pbtxt).
"""

import contextlib
import json
import os
import re
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # type: ignore[import-not-found]  # lives in the backend
from transformers.utils import logging

from engine import faults
from engine.draw import draw
from engine.rows import Event, Mishap, Picture, Row, Step
from engine.runner import NetworkRunner
from engine.torch_runner import TorchRunner

TEXTS = ("prompt", "negative_prompt", "scheduler")
NUMBERS = ("seed", "num_inference_steps", "guidance_scale", "width", "height")


class TritonPythonModel:
    """The name and the methods are the python backend's."""

    def initialize(self, args: dict[str, str]) -> None:
        logging.disable_progress_bar()  # it would land in the middle of the server's log
        parameters = json.loads(args["model_config"])["parameters"]
        self._max_unet_rows = int(parameters["max_unet_rows"]["string_value"])
        self._runner = _runner(parameters, self._max_unet_rows)
        self._flags_dir = os.environ.get("DARKROOM_ENGINE_FLAGS_DIR")
        # Weights that cannot draw fail at load, and the first job does not pay for a cold start.
        width, height = min(self._runner.sizes or {(64, 64)})
        trial = Row("", "", 0, num_inference_steps=1, guidance_scale=2, width=width, height=height)
        *_, end = draw(self._runner, [trial], max_unet_rows=self._max_unet_rows)
        if isinstance(end, Mishap):
            raise RuntimeError(f"the model cannot draw: {end.message}")  # noqa: TRY004  # no type error
        if isinstance(self._runner, TorchRunner) and self._runner.device.type == "cuda":
            self._runner.warm(self._max_unet_rows)  # nor any other for a first of its kind

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Exception as failure:  # noqa: BLE001  # this request's; the next may be fine
                pb.Logger.log_error(traceback.format_exc())
                reason = pb.TritonError(f"{type(failure).__name__}: {failure}")
                sender.send(pb.InferenceResponse(error=reason))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        rows = _rows(request)
        faults.befall(rows)
        with self._flags(request) as flags:

            def withdrawn() -> Collection[int]:
                if sender.is_cancelled():
                    return range(len(rows))
                return [at for at, flag in enumerate(os.pread(flags, len(rows), 0)) if flag]

            events = draw(
                faults.cramped(self._runner),
                rows,
                max_unet_rows=self._max_unet_rows,
                withdrawn=withdrawn,
            )
            for event in events:
                tensors = [pb.Tensor(name, value) for name, value in _outputs(event).items()]
                sender.send(pb.InferenceResponse(output_tensors=tensors))

    @contextlib.contextmanager
    def _flags(self, request: Any) -> Iterator[int]:
        """The file of this request's flags: one byte a row, not zero once it is withdrawn."""
        named = pb.get_input_tensor_by_name(request, "flags")
        path = Path(os.devnull)
        if named is not None:
            [name] = named.as_numpy().tolist()
            path = _file_in(self._flags_dir, name.decode())
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _runner(parameters: dict[str, dict[str, str]], max_unet_rows: int) -> NetworkRunner:
    """What the configuration asks for. Raises what the runners raise when they cannot load."""
    model_dir = Path(os.environ["DARKROOM_ENGINE_MODEL_DIR"])
    device = os.environ.get("DARKROOM_ENGINE_DEVICE", "cpu")
    kind = os.environ.get("DARKROOM_ENGINE_RUNNER") or parameters["runner"]["string_value"]
    if kind == "tensorrt":
        from engine.tensorrt_runner import load_tensorrt_runner

        plans = os.environ.get("DARKROOM_ENGINE_PLANS_DIR")
        return load_tensorrt_runner(
            model_dir,
            Path(plans or parameters["plans_dir"]["string_value"]),
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
        case Picture():
            return index | {"image": event.pixels}
        case Mishap():
            words = [event.code.encode(), event.message.encode()]
            return index | {"error": np.array(words, np.object_)}
