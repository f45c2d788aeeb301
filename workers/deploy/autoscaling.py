"""How many replicas a model has: as many as its queued work asks for.

What waits is in the database, and what decides runs in Ray Serve's controller, which must not hold
a secret. So the workers, which have both, say every second how much there is to draw, and the
controller reads it from the cluster's own key-value store.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any, Final

from ray.serve.config import AutoscalingContext

from workers.ray_cluster import kv

_STALE_S: Final = 15.0  #: so old, it says nothing any more


def publish(found: Mapping[str, int]) -> None:
    """Tell the controller. Needs a connection to the cluster."""
    for model, microbatches in found.items():
        told = json.dumps({"at": time.time(), "microbatches": microbatches})
        kv.write(f"demand:{model}", told)


def published(model: str) -> int | None:
    """What was last told of the model; None when that was long ago, or never."""
    told = kv.read(f"demand:{model}")
    if told is None:
        return None
    content = json.loads(told)
    if time.time() - content["at"] > _STALE_S:
        return None
    return int(content["microbatches"])


class BacklogAutoscaler:
    """A policy of Ray Serve: a replica for each `per_replica` microbatches, at least one for any.

    Serve keeps the result within the deployment's bounds, and waits its delays. While nobody says
    what is queued, the number stays what it is.
    """

    def __init__(self, model: str, per_replica: float) -> None:
        self._model, self._per_replica = model, per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """(replicas wanted, what to remember: nothing)."""
        found = published(self._model)
        if found is None:
            return float(context.target_num_replicas), {}
        return float(math.ceil(found / self._per_replica)), {}
