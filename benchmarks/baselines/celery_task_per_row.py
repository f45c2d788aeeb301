"""Baseline for `benchmarks/file_import.py`: one Celery task per row, the usual way.

`python -m benchmarks.baselines.celery_task_per_row COUNT < rows.csv`: validates the first COUNT
rows, `send_task` for each, and prints the seconds that took.
"""

import csv
import io
import json
import sys
import time
from itertools import islice

from darkroom.generation.model_registry import load_registry
from darkroom.generation.params import JobInput
from darkroom.ids import new_id
from darkroom.queue.celery_app import GENERATE_QUEUE, celery_app
from darkroom.settings import load_settings


def main() -> None:
    """Send the tasks from one process by one connection."""
    settings = load_settings()
    registry = load_registry(settings.models_dir, settings.default_model)
    celery = celery_app(settings, socket_timeout_s=5)
    table = csv.DictReader(io.TextIOWrapper(sys.stdin.buffer, newline=""))
    began = time.perf_counter()
    for row in islice(table, int(sys.argv[1])):
        asked = JobInput(
            prompt=row["prompt"], seed=int(row["seed"]), num_inference_steps=int(row["steps"])
        )
        job = registry.resolve(asked).model_dump() | {"id": new_id("job")}
        celery.send_task("draw", args=[job], queue=GENERATE_QUEUE)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
