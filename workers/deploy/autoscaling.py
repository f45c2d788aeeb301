"""Autoscaling: a model has as many replicas as its backlog needs.

The backlog is in the database, and the policy runs in Ray Serve's controller, which must not hold
a secret. So the workers, which have both, write the backlog to the cluster's key-value store every
second, and the policy reads it there.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any, Final

from ray.serve.config import AutoscalingContext

from workers.ray_cluster import kv

_STALE_S: Final = 15.0  #: older backlogs are ignored


def publish(backlog: Mapping[str, int]) -> None:
    """Write how many microbatches each model has. Needs a connection to the cluster."""
    for model, microbatches in backlog.items():
        value = json.dumps({"at": time.time(), "microbatches": microbatches})
        kv.write(f"demand:{model}", value)


def published(model: str) -> int | None:
    """Return the model's microbatches as last written; None if that is too old or missing."""
    value = kv.read(f"demand:{model}")
    if value is None:
        return None
    content = json.loads(value)
    if time.time() - content["at"] > _STALE_S:
        return None
    return int(content["microbatches"])


class BacklogAutoscaler:
    """Policy of Ray Serve: one replica for each `per_replica` microbatches, at least one for any.

    Serve keeps the result within the deployment's bounds and applies its delays. Without a recent
    backlog the number of replicas stays.
    """

    def __init__(self, model: str, per_replica: float) -> None:
        self._model, self._per_replica = model, per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the replicas wanted, and no state."""
        microbatches = published(self._model)
        if microbatches is None:
            return float(context.target_num_replicas), {}
        return float(math.ceil(microbatches / self._per_replica)), {}
