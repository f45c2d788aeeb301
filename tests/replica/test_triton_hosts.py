"""Real Tritons: one suite for every way to host one."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.errors import SetupError
from workers.replica.model_host import (
    BadRequest,
    ModelFailed,
    ModelHost,
    TritonTimeouts,
    TritonUnavailable,
)
from workers.replica.open_host import open_host
from workers.replica.subprocess_host import SubprocessHost
from workers.replica.triton_config import has_tritonserver
from workers.replica.triton_runtime import SHARED_MEMORY, stubs_of, sweep_leftovers

ROOT = Path(__file__).parents[2]
FLAGS = uuid.uuid4().hex
ENV = {
    "DARKROOM_ENGINE_MODEL_DIR": str(ROOT / "models/darkroom-demo"),
    "DARKROOM_ENGINE_THREADS": "2",
}
IMPATIENT = TritonTimeouts(check_s=2, exit_s=2, tidy_s=3)
DEADLINE_S = 100  # a model on a GPU is warmed when it is loaded

NAP_CONFIG = """
name: "nap"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "seconds" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "slept" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
NAP_MODEL = """
import os, pathlib, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for seconds in pb.get_input_tensor_by_name(request, "seconds").as_numpy():
                if seconds < 0:
                    raise ValueError("nobody sleeps backwards")
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    time.sleep(0.01)
                    if sender.is_cancelled():
                        pathlib.Path(os.environ["NAP_CANCELED"]).touch()
                        break
                slept = pb.Tensor("slept", np.array([seconds], np.float32))
                sender.send(pb.InferenceResponse(output_tensors=[slept]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

Run = Callable[[Any], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Await something on the one event loop of this module, with a deadline."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, DEADLINE_S))


@pytest.fixture(scope="module", params=["inprocess", "subprocess"])
def kind(request) -> Any:
    if request.param == "inprocess" and not has_tritonserver():
        pytest.skip("tritonserver cannot be imported here: it needs NVIDIA's image")
    return request.param


@pytest.fixture(scope="module")
def flags_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def painter(kind, run, flags_dir) -> Iterator[ModelHost]:
    """A host with the real model."""
    env = ENV | {"DARKROOM_ENGINE_FLAGS_DIR": str(flags_dir)}
    host = open_host(kind, ROOT / "model_repository", env, patience=TritonTimeouts(exit_s=25))
    run(host.start())
    run(host.load("stable_diffusion"))
    yield host
    started = time.monotonic()
    run(host.stop())
    assert (
        time.monotonic() - started < 25
    )  # nothing that the tests did keeps the model from leaving


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "repository" / "nap"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(NAP_CONFIG)
    (folder / "1" / "model.py").write_text(NAP_MODEL)
    return folder.parent


@pytest.fixture
def napper(kind, run, repository, tmp_path) -> Iterator[ModelHost]:
    """A host of its own, with a model that sleeps: for tests that break things."""
    env = {"NAP_CANCELED": str(tmp_path / "canceled")}
    host = open_host(kind, repository, env, patience=IMPATIENT)
    run(host.start())
    run(host.load("nap"))
    yield host
    run(host.stop())


@pytest.fixture
def child(napper) -> SubprocessHost:
    if not isinstance(napper, SubprocessHost):
        pytest.skip("the server is this process")
    return napper


def texts(*words: str) -> np.ndarray:
    return np.array([word.encode() for word in words], np.object_)


def asked(count: int, **changed: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "prompt": texts(*["a lighthouse"] * count),
        "negative_prompt": texts(*[""] * count),
        "seed": np.arange(count, dtype=np.int64),
        "num_inference_steps": np.full(count, 2, np.int32),
        "guidance_scale": np.full(count, 5, np.float32),
        "width": np.full(count, 64, np.int32),
        "height": np.full(count, 64, np.int32),
        "scheduler": texts(*["ddim"] * count),
    } | changed


def nap(*seconds: float) -> dict[str, np.ndarray]:
    return {"seconds": np.array(seconds, np.float32)}


async def responses(host: ModelHost, name: str, inputs: dict[str, np.ndarray]) -> list[Any]:
    return [response async for response in host.infer(name, inputs)]


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
    """SIGSTOP, and wait for it: a thread that is on a core may still answer a request."""
    os.kill(pid, signal.SIGSTOP)
    assert becomes_true(lambda: all(map(is_stopped, Path(f"/proc/{pid}/task").iterdir())))


def is_stopped(thread: Path) -> bool:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_pictures_leave_as_they_are_drawn(painter, run):
    inputs = asked(2, num_inference_steps=np.array([3, 1], np.int32))
    answers = run(responses(painter, "stable_diffusion", inputs))

    steps = [(int(a["index"][0]), *a["step"].tolist()) for a in answers if "step" in a]
    assert steps == [(0, 1, 3), (1, 1, 1), (0, 2, 3), (0, 3, 3)]
    images = [(int(a["index"][0]), a["image"]) for a in answers if "image" in a]
    assert [index for index, _ in images] == [1, 0]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for _, image in images)
    assert all(image.flags.owndata and image.flags.writeable for _, image in images)


def test_one_bad_row_does_not_fail_its_company(painter, run):
    inputs = asked(2, scheduler=texts("plms", "ddim"))
    answers = run(responses(painter, "stable_diffusion", inputs))

    (error,) = [answer for answer in answers if "error" in answer]
    assert error["index"].tolist() == [0]
    assert error["error"][0] == b"invalid_params"
    assert b"plms" in error["error"][1]
    assert [a["index"].tolist() for a in answers if "image" in a] == [[1]]


def test_text_that_is_not_english_reaches_the_model(painter, run):
    inputs = asked(
        1, prompt=np.array(["ein Leuchtturm im Nebel \u706f\u53f0".encode()], np.object_)
    )
    assert "image" in run(responses(painter, "stable_diffusion", inputs))[-1]


def test_inputs_of_two_lengths_fail_the_request_and_not_the_host(painter, run):
    with pytest.raises(ModelFailed, match="shorter"):
        run(responses(painter, "stable_diffusion", asked(2, seed=np.zeros(1, np.int64))))

    assert len(run(responses(painter, "stable_diffusion", asked(1)))) == 3
    run(painter.check())


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in asked(1).items() if key != name}


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (without("seed"), "also wants seed"),
        (asked(1, steps=np.zeros(1, np.int32)), "no input steps"),
        (asked(1, seed=np.zeros(1, np.int32)), "seed is int32, not int64"),
        (asked(1, prompt=np.array(["text"])), "not object"),
        (asked(1, width=np.full((1, 1), 64, np.int32)), "shape"),
    ],
)
def test_a_bad_request_is_refused_before_triton_sees_it(painter, run, inputs, complaint):
    with pytest.raises(BadRequest, match=complaint):
        run(responses(painter, "stable_diffusion", inputs))
    run(painter.check())


def test_a_model_that_is_not_loaded_is_a_bad_request(painter, run):
    with pytest.raises(BadRequest, match="not loaded"):
        run(responses(painter, "unet", {}))


def test_a_model_that_is_not_there_does_not_load(painter, run):
    with pytest.raises(ModelFailed):
        run(painter.load("no_such_model"))
    run(painter.check())


def test_drawing_stops_soon_after_its_request_is_cancelled(painter, run):
    long = asked(2, num_inference_steps=np.full(2, 900, np.int32))

    async def first_answer_only() -> None:
        async with contextlib.aclosing(painter.infer("stable_diffusion", long)) as answers:
            await anext(answers)

    started = time.monotonic()
    run(first_answer_only())
    run(responses(painter, "stable_diffusion", asked(1)))  # waits for its turn
    assert time.monotonic() - started < 10  # 900 steps would take some 30 s


def test_a_row_whose_flag_is_raised_leaves_and_its_company_stays(painter, run, flags_dir):
    flags = flags_dir / FLAGS
    flags.write_bytes(bytes(2))
    steps = np.array([900, 4], np.int32)
    inputs = asked(2, num_inference_steps=steps, flags=texts(FLAGS))

    async def first_row_withdrawn() -> list[Any]:
        seen = []
        async for answer in painter.infer("stable_diffusion", inputs):
            seen.append(answer)
            flags.write_bytes(b"\1\0")
        return seen

    answers = run(first_row_withdrawn())
    (error,) = [answer for answer in answers if "error" in answer]
    assert (error["index"].tolist(), error["error"][0]) == ([0], b"canceled")
    assert [0, 900, 900] not in [[*a["index"], *a["step"]] for a in answers if "step" in a]
    assert [a["index"].tolist() for a in answers if "image" in a] == [[1]]


def steps_of(answers: list[Any]) -> list[list[int]]:
    return [[*a["index"].tolist(), *a["step"].tolist()] for a in answers if "step" in a]


async def beside_a_long_one(host: ModelHost, wanted: dict[str, np.ndarray]) -> list[Any]:
    """What is answered to `wanted`, which comes while a request of many steps is drawn."""
    long = host.infer("stable_diffusion", asked(1, num_inference_steps=np.full(1, 900, np.int32)))
    async with contextlib.aclosing(long):
        for _ in range(3):
            await anext(long)
        answers = await responses(host, "stable_diffusion", wanted)
        reached = await anext(long)
        assert reached["step"][0] < 900
        return answers


def test_a_request_joins_the_one_that_is_drawn_and_its_picture_is_the_same(painter, run):
    wanted = asked(2, num_inference_steps=np.array([4, 3], np.int32))
    joined = run(beside_a_long_one(painter, wanted))
    alone = run(responses(painter, "stable_diffusion", wanted))

    assert steps_of(joined) == steps_of(alone)
    for one, other in zip(joined, alone, strict=True):
        if "image" in other:
            assert np.abs(one["image"].astype(int) - other["image"]).max() <= 1


def test_a_request_that_waits_for_seats_says_so_and_can_be_withdrawn(painter, run, flags_dir):
    flags = flags_dir / FLAGS
    flags.write_bytes(bytes(2))
    wanted = asked(2, width=np.full(2, 128, np.int32), flags=texts(FLAGS))

    async def withdrawn_in_line() -> list[Any]:
        async with contextlib.AsyncExitStack() as drawn_first:
            for width in (64, 96):  # one after the other: a GPU is through with one in two seconds
                long = asked(
                    1,
                    num_inference_steps=np.full(1, 900, np.int32),
                    width=np.full(1, width, np.int32),
                )
                request = contextlib.aclosing(painter.infer("stable_diffusion", long))
                await anext(await drawn_first.enter_async_context(request))
            seen = []
            async for answer in painter.infer("stable_diffusion", wanted):
                seen.append(answer)
                flags.write_bytes(b"\1\1")
            return seen

    *waiting, first, second = run(withdrawn_in_line())
    assert waiting
    assert all(step == [0, 0, 2] for step in steps_of(waiting))
    for at, error in enumerate((first, second)):
        assert (error["index"].tolist(), error["error"][0]) == ([at], b"canceled")
    run(painter.check())


def test_a_crowd_of_requests_is_drawn_each_its_own(painter, run):
    def each(seed: int) -> dict[str, np.ndarray]:
        steps, width = 1 + seed % 4, 64 if seed % 5 else 128
        return asked(
            1,
            seed=np.array([seed], np.int64),
            num_inference_steps=np.array([steps], np.int32),
            width=np.array([width], np.int32),
        )

    async def crowd() -> list[list[Any]]:
        calls = [responses(painter, "stable_diffusion", each(seed)) for seed in range(24)]
        return await asyncio.gather(*calls)

    for seed, answers in enumerate(run(crowd())):
        drawn = [step for step in steps_of(answers) if step[1]]
        assert drawn == [[0, step, 1 + seed % 4] for step in range(1, 2 + seed % 4)]
        [image] = [a["image"] for a in answers if "image" in a]
        assert image.shape == (64, 64 if seed % 5 else 128, 3)
        if seed % 6 == 0:
            [again] = run(responses(painter, "stable_diffusion", each(seed)))[-1:]
            assert np.abs(image.astype(int) - again["image"]).max() <= 1


def test_flags_are_read_from_their_folder_only(painter, run):
    with pytest.raises(ModelFailed, match="hex digits"):
        run(responses(painter, "stable_diffusion", asked(1, flags=texts("../secret"))))
    assert len(run(responses(painter, "stable_diffusion", asked(1)))) == 3


def test_the_loop_is_free_while_the_model_works(napper, run):
    async def ticks_during_a_nap() -> int:
        asleep = asyncio.create_task(responses(napper, "nap", nap(0.5)))
        ticks = 0
        while not asleep.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert run(ticks_during_a_nap()) > 20


def test_an_exception_in_the_model_is_the_requests_own(napper, run):
    with pytest.raises(ModelFailed, match="nobody sleeps backwards"):
        run(responses(napper, "nap", nap(-1)))
    run(napper.check())


def test_a_deadline_ends_a_request_and_tells_the_model(napper, run, tmp_path):
    async def impatiently() -> None:
        async with asyncio.timeout(0.3):
            await responses(napper, "nap", nap(20))

    with pytest.raises(TimeoutError):
        run(impatiently())
    assert becomes_true((tmp_path / "canceled").exists)


def test_a_model_can_be_unloaded_and_loaded_again(napper, run):
    before = stubs_of(server_pid(napper))
    run(napper.unload("nap"))
    assert stubs_of(server_pid(napper)) < before  # in process, other hosts' are there too
    with pytest.raises(BadRequest):
        run(responses(napper, "nap", nap(0)))

    run(napper.load("nap"))
    assert len(run(responses(napper, "nap", nap(0, 0)))) == 2
    run(napper.check())


def test_a_killed_model_process_is_noticed_without_a_request(napper, run):
    run(napper.check())
    for stub in stubs_of(server_pid(napper)):
        os.kill(stub, signal.SIGKILL)
    assert becomes_true(lambda: not any(map(is_alive, stubs_of(server_pid(napper)))))

    with pytest.raises(TritonUnavailable):
        run(napper.check())


def test_a_request_to_a_killed_model_process_says_that_the_host_is_down(napper, run):
    for stub in stubs_of(server_pid(napper)):
        os.kill(stub, signal.SIGKILL)

    with pytest.raises(TritonUnavailable, match="not healthy"):
        run(responses(napper, "nap", nap(0)))


def test_a_frozen_model_process_ends_by_deadline_and_is_noticed(napper, run):
    async def impatiently() -> None:
        async with asyncio.timeout(0.3):
            await responses(napper, "nap", nap(0))

    for stub in stubs_of(server_pid(napper)):
        freeze(stub)

    with pytest.raises(TimeoutError):
        run(impatiently())
    with pytest.raises(TritonUnavailable, match="dead or stopped"):
        run(napper.check())


def test_a_killed_server_is_noticed_and_breaks_its_streams(child, run):
    async def killed_in_the_middle() -> None:
        asleep = asyncio.create_task(responses(child, "nap", nap(0, 20)))
        await asyncio.sleep(0.2)
        os.kill(child._pid, signal.SIGKILL)
        await asleep

    stubs = stubs_of(child._pid)
    with pytest.raises(TritonUnavailable):
        run(killed_in_the_middle())
    with pytest.raises(TritonUnavailable):
        run(child.check())

    run(child.stop())
    assert becomes_true(lambda: not any(map(is_alive, stubs)))


def test_a_frozen_server_is_noticed_by_deadline_and_can_be_stopped(child, run):
    server, stubs = child._pid, stubs_of(child._pid)
    freeze(server)

    with pytest.raises(TritonUnavailable, match="has not answered"):
        run(child.check())
    run(child.stop())

    assert becomes_true(lambda: not any(map(is_alive, [server, *stubs])))


def test_a_clean_stop_leaves_no_process_no_shared_memory_and_no_folder(child, run):
    server, stubs, folder = child._pid, stubs_of(child._pid), child._folder
    assert stubs
    assert list(SHARED_MEMORY.glob(f"{child._prefix}*"))

    started = time.monotonic()
    run(child.stop())

    assert time.monotonic() - started < IMPATIENT.exit_s + IMPATIENT.tidy_s
    assert becomes_true(lambda: not any(map(is_alive, [server, *stubs])))
    assert not list(SHARED_MEMORY.glob(f"{child._prefix}*"))
    assert not folder.exists()
    run(child.stop())


def test_a_stop_in_the_middle_of_a_request_is_in_time(child, run):
    async def stopped_in_the_middle() -> None:
        asleep = asyncio.create_task(responses(child, "nap", nap(20)))
        await asyncio.sleep(0.2)
        await child.stop()
        with contextlib.suppress(TritonUnavailable, asyncio.CancelledError):
            await asleep

    stubs = stubs_of(child._pid)
    started = time.monotonic()
    run(stopped_in_the_middle())
    assert time.monotonic() - started < IMPATIENT.exit_s + IMPATIENT.tidy_s + 1
    assert becomes_true(lambda: not any(map(is_alive, stubs)))


OWNER = """
import asyncio, pathlib, sys
from workers.replica.open_host import open_host
from workers.replica.triton_runtime import stubs_of

async def main():
    host = open_host("subprocess", pathlib.Path(sys.argv[1]), {})
    await host.start()
    await host.load("nap")
    print(host._pid, *stubs_of(host._pid), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def own_temporary_folder(monkeypatch) -> Iterator[str]:
    """Of this test and its children: hosts that others start meanwhile sweep the usual one."""
    with tempfile.TemporaryDirectory() as folder:  # short: sockets lie in it
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def test_triton_dies_with_the_process_that_started_it(repository, own_temporary_folder):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(repository)], stdout=subprocess.PIPE, cwd=ROOT
    )
    with owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        owner.kill()
    assert len(pids) == 2
    assert becomes_true(lambda: not any(map(is_alive, pids)))

    left = f"darkroom-*-{owner.pid}-*"
    assert list(Path(own_temporary_folder).glob(left))  # SIGKILL tidies nothing
    sweep_leftovers()
    assert not list(Path(own_temporary_folder).glob(left))
    assert not list(SHARED_MEMORY.glob(left))


def test_a_triton_that_cannot_start_is_a_host_that_is_down(run, tmp_path):
    host = open_host("subprocess", tmp_path / "nowhere", {}, patience=IMPATIENT)
    with pytest.raises(TritonUnavailable, match="exited"):
        run(host.start())


def test_the_sweep_leaves_what_belongs_to_the_living_and_to_others():
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    living = SHARED_MEMORY / f"darkroom-{namespace}-{os.getpid()}-test"
    foreign = SHARED_MEMORY / "darkroom-1-999999999-test"
    dead = SHARED_MEMORY / f"darkroom-{namespace}-999999999-test"
    try:
        for region in (living, foreign, dead):
            region.touch()
        sweep_leftovers()
        assert [region.exists() for region in (living, foreign, dead)] == [True, True, False]
    finally:
        for region in (living, foreign, dead):
            region.unlink(missing_ok=True)


@pytest.mark.skipif(has_tritonserver(), reason="tritonserver can be imported here")
def test_asking_for_triton_in_process_where_it_is_not_says_what_to_do(tmp_path):
    with pytest.raises(SetupError, match="image"):
        open_host("inprocess", tmp_path, {})
    assert isinstance(open_host("auto", tmp_path, {}), SubprocessHost)
