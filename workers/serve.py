"""`python -m workers.serve`: deploys one Ray Serve application for each model, and watches them."""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Final

import ray
from ray import serve

from darkroom.catalogue import Model, load_catalogue
from darkroom.settings import Settings, load_settings
from workers.deployment import Replica
from workers.painter import PainterOptions
from workers.ray_generator import check_ray, connect_to_ray

_WATCH_S: Final = 5.0

logger = logging.getLogger(__name__)


def deploy(settings: Settings, model: Model) -> None:
    """Start the model's application, or bring it up to date; returns once it can draw."""
    application = Replica.options(  # type: ignore[attr-defined]  # the decorator's class
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.device == "cuda" else 0},
    ).bind(
        PainterOptions(
            model=model,
            model_host=settings.model_host,
            device=settings.device,
            threads=settings.torch_threads,
            replicas=settings.replicas,
            timeout_s=settings.generate_timeout_s,
            silence_s=settings.silence_timeout_s,
        )
    )
    serve.run(application, name=model.name, route_prefix=None)
    logger.info("%s can draw", model.name)


def run(settings: Settings, *, ready_file: Path | None) -> int:
    """Deploy every model, stay until SIGTERM, then end what was deployed."""
    stop = threading.Event()
    connect_to_ray(settings.ray_address)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which installs its own
        signal.signal(number, lambda *_: stop.set())
    serve.start(proxy_location="Disabled")  # handles only: no HTTP port is opened
    models = load_catalogue(settings.models_dir, settings.default_model).models
    for model in models.values():
        deploy(settings, model)
    if ready_file is not None:
        ready_file.touch()
    while not stop.wait(_WATCH_S):
        check_ray(settings.ray_address)  # raises when the cluster went: the supervisor restarts us
    for name in models:
        serve.delete(name)
    ray.shutdown()
    return 0


def main() -> int:
    """Command line of `python -m workers.serve`."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.serve",
        description="Deploys the models on the Ray cluster and ends them on SIGTERM.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument("--check", action="store_true", help="only check models and cluster")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = load_settings()
    if arguments.check:
        print(*load_catalogue(settings.models_dir, settings.default_model).models, sep="\n")
        check_ray(settings.ray_address)
        return 0
    ready_file = os.environ.get("DARKROOM_READY_FILE")
    return run(settings, ready_file=Path(ready_file) if ready_file else None)


if __name__ == "__main__":
    sys.exit(main())
