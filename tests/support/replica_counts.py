"""A driver of Ray's, for tests: says how many replicas there are for how much that waits.

A model of its own on a running stack, with replicas that do nothing.
"""

import sys
import time

import ray
from ray import serve

from darkroom.generation.model_registry import load_registry
from darkroom.settings import Settings
from workers.deploy.autoscaling import publish
from workers.deploy.serve_config import scale
from workers.ray_cluster.connection import connect_to_ray

MODEL = "idle"
CHANGED_WITHIN_S = 60
SETTINGS = Settings(max_replicas=2, replica_idle_timeout_s=0.5, target_microbatches_per_replica=4)


@serve.deployment
class Idle:
    """A replica that is only there."""


def running_replicas() -> int:
    """Those that are up; one that still starts or ends is none."""
    [deployment] = serve.status().applications[MODEL].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def settled(wanted: int, *, waiting: int) -> int:
    """How many there are once there are so many, or when that did not come about."""
    deadline = time.monotonic() + CHANGED_WITHIN_S
    while time.monotonic() < deadline and running_replicas() != wanted:
        publish({MODEL: waiting})
        time.sleep(0.3)
    return running_replicas()


def main(address: str, *steps: str) -> None:
    """Each step is WAITING:WANTED."""
    connect_to_ray(address)
    models = load_registry(SETTINGS.models_dir, SETTINGS.default_model).models
    on_demand = models["darkroom-demo-v1"].model_copy(update={"name": MODEL})
    options = scale(SETTINGS, on_demand)
    serve.run(Idle.options(**options).bind(), name=MODEL, route_prefix=None)
    for step in steps:
        waiting, wanted = map(int, step.split(":"))
        sys.stdout.write(f"{waiting}:{settled(wanted, waiting=waiting)}\n")
        sys.stdout.flush()
    serve.delete(MODEL)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
