"""The rows that need Ray Serve and Triton: `make chaos`."""

import signal

import pytest

from tests.chaos import stack_rows
from tests.chaos.stack_under_test import StackUnderTest
from tests.support.stack import running_stack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def stack_under_test(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    with running_stack(folder / "data", workers=2) as stack:
        yield StackUnderTest(stack, folder)


def test_f07_a_replica_is_killed(row, stack_under_test):
    with row("F07", "Ray Serve replica killed, twice", on=stack_under_test) as run:
        stack_rows.broken(run, "ray::ServeReplica", jobs=24, times=2)


def test_f08_rays_own_processes_are_killed(row, stack_under_test):
    with row("F08", "Serve controller, GCS, raylet killed", on=stack_under_test) as run:
        for words in ("ray::ServeController", "gcs_server", "raylet/raylet"):
            stack_rows.broken(run, words, jobs=16)


def test_f09_triton_dies_or_hangs(row, stack_under_test):
    fault = "tritonserver killed, its backend killed, it stopped"
    with row("F09", fault, on=stack_under_test) as run:
        stack_rows.broken(run, "tritonserver", jobs=16)
        stack_rows.broken(run, "triton_python_backend_stub", jobs=16)
        stack_rows.broken(run, "tritonserver", jobs=16, sent=signal.SIGSTOP)
