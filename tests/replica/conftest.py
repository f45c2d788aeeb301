"""Tritons that the tests of a replica share."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from darkroom.generation.model_registry import ModelRegistry
from tests.support.triton_hosts import Run
from workers.replica import triton_worker
from workers.replica.model_host import ModelHost
from workers.replica.open_host import open_host
from workers.replica.row_requests import TRITON_MODEL
from workers.replica.triton_config import has_tritonserver
from workers.replica.triton_worker import REPOSITORY, TritonWorker, TritonWorkerOptions

ROOT = Path(__file__).parents[2]
DEADLINE_S = 100  # a model on a GPU is warmed when it is loaded
STOPPED_WITHIN_S = 25

STEPPING_MODEL = """
import threading, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            steps = pb.get_input_tensor_by_name(request, "num_inference_steps").as_numpy().item()
            sender = request.get_response_sender()
            threading.Thread(target=self.generate, args=(sender, steps), daemon=True).start()

    def generate(self, sender, steps):
        for step in range(1, steps + 1):
            if sender.is_cancelled():
                break
            time.sleep(0.02)
            outputs = [pb.Tensor("step", np.array([step, steps], np.int32))]
            sender.send(pb.InferenceResponse(output_tensors=outputs))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Await something on the one event loop of these tests, with a deadline."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, DEADLINE_S))


@pytest.fixture(scope="session")
def options(registry: ModelRegistry) -> TritonWorkerOptions:
    return TritonWorkerOptions(
        model=registry.models[registry.default],
        triton_mode="auto",
        device="cpu",
        runner="torch",
        compiled_models=None,
        threads=1,
        replicas=1,
        timeout_s=60,
        step_timeout_s=60,
    )


@contextmanager
def started(run: Run, options: TritonWorkerOptions) -> Iterator[TritonWorker]:
    worker = TritonWorker(options)
    run(worker.start())
    try:
        yield worker
    finally:
        begun = time.monotonic()
        run(worker.stop())
        assert time.monotonic() - begun < STOPPED_WITHIN_S  # no request kept the model


@pytest.fixture(scope="session")
def worker(run: Run, options: TritonWorkerOptions) -> Iterator[TritonWorker]:
    """Return a worker with the real model, for tests that do not break it."""
    with started(run, options) as worker:
        yield worker


@pytest.fixture(scope="module")
def low_memory_worker(run: Run, options: TritonWorkerOptions) -> Iterator[TritonWorker]:
    """Return a worker with memory for four rows of the UNet, and a model with a bug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_FAULT_MAX_ROWS", "4")
        patch.setenv("DARKROOM_FAULT_RAISE", "cyanide")
        with started(run, options) as worker:
            yield worker


@pytest.fixture
def one_row_worker(
    run: Run, options: TritonWorkerOptions, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TritonWorker]:
    """Return a worker with memory for one row of the UNet: no guided row fits."""
    monkeypatch.setenv("DARKROOM_FAULT_MAX_ROWS", "1")
    with started(run, options) as worker:
        yield worker


@pytest.fixture
def hanging_worker(
    run: Run, options: TritonWorkerOptions, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TritonWorker]:
    """Return a worker of the test's own, whose model hangs at a word."""
    monkeypatch.setenv("DARKROOM_FAULT_HANG", "cyanide")
    with started(run, replace(options, step_timeout_s=5)) as worker:
        yield worker


@pytest.fixture
def crashing_worker(
    run: Run, options: TritonWorkerOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[TritonWorker]:
    """Return a worker of the test's own, to be broken: its model only counts steps.

    It loads no networks, which takes most of the time of a start.
    """
    repository = shutil.copytree(REPOSITORY, tmp_path / "repository")
    (repository / TRITON_MODEL / "1/model.py").write_text(STEPPING_MODEL)
    monkeypatch.setattr(triton_worker, "REPOSITORY", repository)
    with started(run, replace(options, step_timeout_s=5)) as worker:
        yield worker


@pytest.fixture(scope="session", params=["inprocess", "subprocess"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "inprocess" and not has_tritonserver():
        pytest.skip("tritonserver cannot be imported here: it needs NVIDIA's image")
    return str(request.param)


@pytest.fixture(scope="session")
def host(kind: str, run: Run, request: pytest.FixtureRequest) -> Iterator[ModelHost]:
    """Return a host with the real model: the worker's own, if it is of this kind."""
    if kind == ("inprocess" if has_tritonserver() else "subprocess"):
        yield request.getfixturevalue("worker")._host
        return
    environment = {
        "DARKROOM_ENGINE_MODEL_DIR": str(ROOT / "models/darkroom-demo"),
        "DARKROOM_ENGINE_THREADS": "1",
    }
    opened = open_host(kind, REPOSITORY, environment)
    run(opened.start())
    run(opened.load(TRITON_MODEL))
    yield opened
    run(opened.stop())
