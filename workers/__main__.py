"""`python -m workers`: a Celery worker that has microbatches drawn."""

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from darkroom.generation.model_registry import load_registry
from darkroom.health import print_checks
from darkroom.settings import load_settings

#: Bytes of the largest reply of a replica: one picture, and 2048 x 2048 take 12 MiB. Ray reads it
#: once, when ray.serve is imported; its own default is 4 MiB.
REPLY_LIMIT: Final = ("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(64 * 2**20))


def main() -> int:  # noqa: RET503  # Celery's worker_main does not return
    """Run until SIGTERM, which lets microbatches finish that soon do, and hands over the others."""
    parser = argparse.ArgumentParser(
        prog="python -m workers",
        description="A Celery worker: claims microbatches, has Ray Serve draw them, stores them.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument("--check", action="store_true", help="only check what it would connect to")
    arguments = parser.parse_args()
    settings = load_settings()
    os.environ.setdefault(*REPLY_LIMIT)
    from workers.app import celery_arguments, open_worker_process, worker_app
    from workers.deploy.autoscaling import publish
    from workers.generation.ray_generator import RayGenerator
    from workers.ray_cluster.connection import check_ray

    if arguments.check:
        return print_checks(settings, {"ray": lambda: check_ray(settings.ray_address)})
    ready_file = os.environ.get("DARKROOM_READY_FILE")
    models = load_registry(settings.models_dir, settings.default_model).models.values()
    generator = RayGenerator(
        settings.ray_address, on_demand=[model.name for model in models if model.on_demand]
    )
    crew = open_worker_process(settings, generator, publish_demand=publish)
    app = worker_app(settings, crew, ready_file=Path(ready_file) if ready_file else None)
    app.worker_main(list(celery_arguments(settings)))  # ends the process itself


if __name__ == "__main__":
    sys.exit(main())
