"""What a Triton leaves on the machine when its process or its owner dies."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom.errors import SetupError
from tests.support.sleeping_model import write_sleeping_model
from tests.support.triton_hosts import becomes_true, is_alive
from workers.replica.model_host import TritonUnavailable
from workers.replica.open_host import open_host
from workers.replica.subprocess_host import SubprocessHost
from workers.replica.triton_config import has_tritonserver
from workers.replica.triton_runtime import SHARED_MEMORY, remove_leftovers

ROOT = Path(__file__).parents[2]

OWNER = """
import asyncio, pathlib, sys
from workers.replica.open_host import open_host
from workers.replica.triton_runtime import stubs_of

async def main():
    host = open_host("subprocess", pathlib.Path(sys.argv[1]), {})
    await host.start()
    await host.load("sleep")
    print(host._pid, *stubs_of(host._pid), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def own_temporary_folder(monkeypatch) -> Iterator[str]:
    """Use a folder of the test's own: other hosts that start meanwhile tidy the usual one."""
    with tempfile.TemporaryDirectory() as folder:  # short: sockets lie in it
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def test_triton_dies_with_the_process_that_started_it(tmp_path, own_temporary_folder):
    repository = write_sleeping_model(tmp_path / "repository")
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
    assert list(Path(own_temporary_folder).glob(left))  # SIGKILL leaves everything behind
    remove_leftovers()
    assert not list(Path(own_temporary_folder).glob(left))
    assert not list(SHARED_MEMORY.glob(left))


def test_a_triton_that_cannot_start_raises_triton_unavailable(run, tmp_path):
    host = open_host("subprocess", tmp_path / "nowhere", {})
    with pytest.raises(TritonUnavailable, match="exited"):
        run(host.start())


def test_leftovers_of_living_processes_and_other_namespaces_stay():
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    own = SHARED_MEMORY / f"darkroom-{namespace}-{os.getpid()}-test"
    foreign = SHARED_MEMORY / "darkroom-1-999999999-test"
    dead = SHARED_MEMORY / f"darkroom-{namespace}-999999999-test"
    try:
        for region in (own, foreign, dead):
            region.touch()
        remove_leftovers()
        assert [region.exists() for region in (own, foreign, dead)] == [True, True, False]
    finally:
        for region in (own, foreign, dead):
            region.unlink(missing_ok=True)


@pytest.mark.skipif(has_tritonserver(), reason="tritonserver can be imported here")
def test_triton_in_process_without_tritonserver_names_the_remedy(tmp_path):
    with pytest.raises(SetupError, match="image"):
        open_host("inprocess", tmp_path, {})
    assert isinstance(open_host("auto", tmp_path, {}), SubprocessHost)
