"""`python -m workers serve`: deployment of one Ray Serve application per model."""

import argparse
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import ray
import yaml
from ray import serve

from darkroom.generation.model_registry import Model, load_registry
from darkroom.settings import Settings, load_settings
from workers.deploy.serve_config import config_file, scale, worker_options
from workers.ray_cluster import routing
from workers.ray_cluster.connection import check_ray, connect_to_ray
from workers.replica.deployment import Replica

_WATCH_S: Final = 5.0

logger = logging.getLogger(__name__)


def deploy(settings: Settings, model: Model, *, application: str | None = None) -> None:
    """Start or update the model's application; return once it is ready.

    A model on demand starts when there is work for it. `application`: its name, if it is not the
    model's.
    """
    options = scale(settings, model)
    bound = Replica.options(**options).bind(  # type: ignore[attr-defined]  # the decorator's class
        worker_options(settings, model)
    )
    serve.run(bound, name=application or model.name, route_prefix=None)
    logger.info("deployment %s is ready", application or model.name)


def run(settings: Settings, *, ready_file: Path | None) -> int:
    """Deploy all models, wait for SIGTERM, then delete their applications."""
    stop = threading.Event()
    connect_to_ray(settings.ray_address)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which installs its own
        signal.signal(number, lambda *_: stop.set())
    serve.start(proxy_location="Disabled")  # handles only: no HTTP port is opened
    models = load_registry(settings.models_dir, settings.default_model).models
    for model in models.values():
        if (
            routing.application_for(model.name) == model.name
        ):  # else `replace` deployed another engine
            deploy(settings, model)
    if ready_file is not None:
        ready_file.touch()
    while not stop.wait(_WATCH_S):
        check_ray(settings.ray_address)  # raises if the cluster is gone: the supervisor restarts us
    for name in models:
        serve.delete(routing.application_for(name))
    ray.shutdown()
    return 0


def main(arguments: Sequence[str]) -> int:
    """Deploy the models, or only print or check what would be deployed."""
    parser = argparse.ArgumentParser(
        prog="python -m workers serve",
        description="Deploys the models on the Ray cluster and deletes them on SIGTERM.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument(
        "--config", action="store_true", help="only print the config file of Ray Serve"
    )
    parser.add_argument(
        "--check", action="store_true", help="only check the models and the cluster"
    )
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = load_settings()
    if asked.config:
        registry = load_registry(settings.models_dir, settings.default_model)
        print(yaml.safe_dump(config_file(settings, registry), sort_keys=False), end="")
        return 0
    if asked.check:
        print(*load_registry(settings.models_dir, settings.default_model).models, sep="\n")
        check_ray(settings.ray_address)
        return 0
    ready_file = os.environ.get("DARKROOM_READY_FILE")
    return run(settings, ready_file=Path(ready_file) if ready_file else None)
