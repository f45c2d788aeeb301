"""Hosts whose model or server fails, hangs or dies, for every way to run Triton."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.sleeping_model import write_sleeping_model
from tests.support.triton_hosts import (
    Run,
    becomes_true,
    freeze,
    is_alive,
    responses,
    server_pid,
)
from workers.replica.model_host import (
    BadRequest,
    ModelFailed,
    ModelHost,
    TritonTimeouts,
    TritonUnavailable,
)
from workers.replica.open_host import open_host
from workers.replica.subprocess_host import SubprocessHost
from workers.replica.triton_runtime import SHARED_MEMORY, stubs_of

SHORT_TIMEOUTS = TritonTimeouts(check_s=2, exit_s=2, kill_s=3)


@pytest.fixture
def sleeping_host(kind: str, run: Run, tmp_path: Path) -> Iterator[ModelHost]:
    """Return a host of the test's own, with a model that sleeps: for tests that break things."""
    repository = write_sleeping_model(tmp_path / "repository")
    env = {"CANCELED_FILE": str(tmp_path / "canceled")}
    host = open_host(kind, repository, env, timeouts=SHORT_TIMEOUTS)
    run(host.start())
    run(host.load("sleep"))
    yield host
    run(host.stop())


@pytest.fixture
def child(sleeping_host: ModelHost) -> SubprocessHost:
    if not isinstance(sleeping_host, SubprocessHost):
        pytest.skip("the server is this process")
    return sleeping_host


async def sleep(host: ModelHost, *seconds: float) -> list[dict[str, Any]]:
    return await responses(host, {"seconds": np.array(seconds, np.float32)}, "sleep")


async def asleep(host: ModelHost, seconds: float) -> asyncio.Task[Any]:
    """Start a request that sleeps, and wait for its first response."""
    started = asyncio.Event()

    async def request() -> None:
        inputs = {"seconds": np.array([0, seconds], np.float32)}
        async with contextlib.aclosing(host.infer("sleep", inputs)) as answers:
            async for _ in answers:
                started.set()

    task = asyncio.create_task(request())
    await started.wait()
    return task


def test_the_event_loop_is_free_while_the_model_works(sleeping_host, run):
    async def ticks_during_a_request() -> int:
        request = asyncio.create_task(sleep(sleeping_host, 0.5))
        ticks = 0
        while not request.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert run(ticks_during_a_request()) > 20


def test_an_exception_in_the_model_fails_only_its_request(sleeping_host, run):
    with pytest.raises(ModelFailed, match="seconds must not be negative"):
        run(sleep(sleeping_host, -1))
    run(sleeping_host.check())


def test_a_deadline_cancels_the_request_in_the_model(sleeping_host, run, tmp_path):
    async def with_deadline() -> None:
        async with asyncio.timeout(0.3):
            await sleep(sleeping_host, 20)

    with pytest.raises(TimeoutError):
        run(with_deadline())
    assert becomes_true((tmp_path / "canceled").exists)


def test_a_model_can_be_unloaded_and_loaded_again(sleeping_host, run):
    before = stubs_of(server_pid(sleeping_host))
    run(sleeping_host.unload("sleep"))
    assert (
        stubs_of(server_pid(sleeping_host)) < before
    )  # in process, there are those of other hosts, too
    with pytest.raises(BadRequest):
        run(sleep(sleeping_host, 0))

    run(sleeping_host.load("sleep"))
    assert len(run(sleep(sleeping_host, 0, 0))) == 2
    run(sleeping_host.check())


def test_a_killed_model_process_is_noticed_without_a_request(sleeping_host, run):
    run(sleeping_host.check())
    for stub in stubs_of(server_pid(sleeping_host)):
        os.kill(stub, signal.SIGKILL)
    assert becomes_true(lambda: not any(map(is_alive, stubs_of(server_pid(sleeping_host)))))

    with pytest.raises(TritonUnavailable):
        run(sleeping_host.check())


def test_a_request_to_a_killed_model_process_raises_triton_unavailable(sleeping_host, run):
    for stub in stubs_of(server_pid(sleeping_host)):
        os.kill(stub, signal.SIGKILL)

    with pytest.raises(TritonUnavailable, match="not healthy"):
        run(sleep(sleeping_host, 0))


def test_a_frozen_model_process_is_noticed_and_the_request_times_out(sleeping_host, run):
    async def with_deadline() -> None:
        async with asyncio.timeout(0.3):
            await sleep(sleeping_host, 0)

    for stub in stubs_of(server_pid(sleeping_host)):
        freeze(stub)

    with pytest.raises(TimeoutError):
        run(with_deadline())
    with pytest.raises(TritonUnavailable, match="dead or stopped"):
        run(sleeping_host.check())


def test_a_killed_server_is_noticed_and_breaks_its_streams(child, run):
    async def killed_in_the_middle() -> None:
        request = await asleep(child, 20)
        os.kill(child._pid, signal.SIGKILL)
        await request

    stubs = stubs_of(child._pid)
    with pytest.raises(TritonUnavailable):
        run(killed_in_the_middle())
    with pytest.raises(TritonUnavailable):
        run(child.check())

    run(child.stop())
    assert becomes_true(lambda: not any(map(is_alive, stubs)))


def test_a_frozen_server_is_noticed_and_can_be_stopped(child, run):
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

    assert time.monotonic() - started < SHORT_TIMEOUTS.exit_s + SHORT_TIMEOUTS.kill_s
    assert becomes_true(lambda: not any(map(is_alive, [server, *stubs])))
    assert not list(SHARED_MEMORY.glob(f"{child._prefix}*"))
    assert not folder.exists()
    run(child.stop())


def test_a_stop_in_the_middle_of_a_request_takes_no_longer_than_its_timeouts(child, run):
    async def stopped_in_the_middle() -> None:
        request = await asleep(child, 20)
        await child.stop()
        with contextlib.suppress(TritonUnavailable, asyncio.CancelledError):
            await request

    stubs = stubs_of(child._pid)
    started = time.monotonic()
    run(stopped_in_the_middle())
    assert time.monotonic() - started < SHORT_TIMEOUTS.exit_s + SHORT_TIMEOUTS.kill_s + 1
    assert becomes_true(lambda: not any(map(is_alive, stubs)))
