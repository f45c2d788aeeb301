"""Requests to a model host, and processes to watch."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from workers.replica.model_host import ModelHost, Tensors
from workers.replica.row_requests import TRITON_MODEL
from workers.replica.subprocess_host import SubprocessHost

Run = Callable[[Any], Any]  #: awaits something on the tests' event loop


def texts(*words: str) -> np.ndarray:
    return np.array([word.encode() for word in words], np.object_)


def row(*, steps: int = 2, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of one row."""
    return {
        "prompt": texts("a lighthouse"),
        "negative_prompt": texts(""),
        "seed": np.array([1], np.int64),
        "num_inference_steps": np.array([steps], np.int32),
        "guidance_scale": np.array([5], np.float32),
        "width": np.array([64], np.int32),
        "height": np.array([64], np.int32),
        "scheduler": texts("ddim"),
    } | changed


async def responses(
    host: ModelHost, inputs: Tensors, model: str = TRITON_MODEL
) -> list[dict[str, Any]]:
    return [response async for response in host.infer(model, inputs)]


def server_pid(host: ModelHost) -> int:
    return host._pid if isinstance(host, SubprocessHost) else os.getpid()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def becomes_true(claim: Callable[[], bool], within_s: float = 5) -> bool:
    deadline = time.monotonic() + within_s
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.02)
    return claim()


def freeze(pid: int) -> None:
    """Send SIGSTOP and wait for it: a thread that is on a core may still answer a request."""
    os.kill(pid, signal.SIGSTOP)
    assert becomes_true(lambda: all(map(_is_stopped, Path(f"/proc/{pid}/task").iterdir())))


def _is_stopped(thread: Path) -> bool:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"
