"""The number of replicas that a backlog asks for, read from a real control store of Ray.

tests/stack/test_end_to_end.py starts and stops replicas on a whole stack.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.experimental import internal_kv
from ray.serve.config import AutoscalingContext

from darkroom.local.ports import LOOPBACK, accepts, free_port
from workers.deploy.autoscaling import BacklogAutoscaler, publish, published
from workers.ray_cluster import routing

STORE = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run Ray's control store alone: it holds the cluster's key-value store."""
    port = free_port()
    log = tmp_path_factory.mktemp("gcs")
    with (log / "out").open("wb") as out:
        process = subprocess.Popen(
            [
                *(STORE, f"--gcs_server_port={port}", f"--node-ip-address={LOOPBACK}"),
                *(f"--log_dir={log}", "--config_list=e30=", "--session-name=test"),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 60
    while not accepts(port)():
        assert process.poll() is None, (log / "out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    internal_kv._initialize_internal_kv(GcsClient(address=f"{LOOPBACK}:{port}"))
    yield
    internal_kv._internal_kv_reset()
    process.terminate()
    process.wait(20)


def wanted(model: str, *, per_replica: float, now: int) -> float:
    context = AutoscalingContext(
        deployment_id=None, deployment_name="Replica", app_name="any", current_num_replicas=now,
        target_num_replicas=now, running_replicas=[], total_num_requests=0,
        total_queued_requests=0, aggregated_metrics=None, raw_metrics=None,
        capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=9, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=None, config=None,
    )  # fmt: skip
    return BacklogAutoscaler(model, per_replica)(context)[0]


@pytest.mark.parametrize(("waiting", "replicas"), [(0, 0), (1, 1), (4, 1), (5, 2), (41, 11)])
def test_there_is_one_replica_for_each_per_replica_microbatches_and_none_for_none(
    waiting, replicas
):
    publish({"demo": waiting, "another": 100})
    assert wanted("demo", per_replica=4, now=3) == replicas


def test_without_a_recent_backlog_the_number_stays(monkeypatch):
    assert wanted("unknown", per_replica=4, now=3) == 3
    publish({"demo": 0})
    assert published("demo") == 0
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert published("demo") is None
    assert wanted("demo", per_replica=4, now=3) == 3


def test_a_model_runs_as_the_application_of_its_name_until_it_is_replaced():
    cache = routing.RoutingCache()
    assert cache("demo") == routing.application_for("demo") == "demo"
    routing.route("demo", "demo~green")
    assert routing.RoutingCache()("demo") == "demo~green"
    deadline = time.monotonic() + 10
    while cache("demo") != "demo~green":  # what it read is used for a second
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_if_the_cluster_does_not_answer_the_last_known_application_is_used():
    reads: list[str] = []

    def read(model: str) -> str:
        reads.append(model)
        if len(reads) > 1:
            raise RuntimeError("no cluster")
        return "demo~green"

    cache = routing.RoutingCache(read)
    deadline = time.monotonic() + 10
    while len(reads) < 2:
        assert cache("demo") == "demo~green"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cache("demo") == "demo~green"
