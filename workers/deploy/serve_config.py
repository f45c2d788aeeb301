"""What Ray Serve is told of each model: its options, its size, and all of it as one config file."""

from typing import Any, Final

from darkroom.generation.model_registry import Catalogue, Model
from darkroom.settings import Settings
from workers.replica.triton_worker import PainterOptions

POLICY: Final = "workers.deploy.autoscaling:ByQueuedWork"
APPLICATION: Final = "workers.replica.deployment:application"
DEPLOYMENT: Final = "Replica"


def painter_options(settings: Settings, model: Model) -> PainterOptions:
    """Nothing secret: Ray keeps and shows it."""
    return PainterOptions(
        model=model,
        model_host=settings.model_host,
        device=settings.device,
        runner=settings.runner,
        plans=settings.plans,
        threads=settings.torch_threads,
        replicas=most_replicas(settings, model),
        timeout_s=settings.generate_timeout_s,
        silence_s=settings.silence_timeout_s,
    )


def scale(settings: Settings, model: Model) -> dict[str, Any]:
    """How many replicas, and what each takes of its node; as `Deployment.options` has them."""
    least, most = least_replicas(settings, model), most_replicas(settings, model)
    options: dict[str, Any] = {"ray_actor_options": _share_of_a_node(settings, model)}
    if least == most:
        return options | {"num_replicas": least}
    return options | {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "upscale_delay_s": 2.0,
            "downscale_delay_s": settings.idle_replica_s,
            "policy": {
                "policy_function": POLICY,
                "policy_kwargs": {
                    "model": model.name,
                    "per_replica": settings.microbatches_per_replica,
                },
            },
        }
    }


def least_replicas(settings: Settings, model: Model) -> int:
    """None of a model that is drawn with on demand."""
    return 0 if model.on_demand else settings.replicas


def most_replicas(settings: Settings, model: Model) -> int:
    """One of a model that is drawn with on demand, unless the settings allow more of each."""
    if model.on_demand:
        return settings.max_replicas or 1
    return max(settings.replicas, settings.max_replicas or 0)


def _share_of_a_node(settings: Settings, model: Model) -> dict[str, Any]:
    """On a CPU, a model on demand takes turns with the others instead of waiting for a core."""
    on_gpu = settings.device == "cuda"
    return {"num_cpus": 0 if model.on_demand and not on_gpu else 1, "num_gpus": int(on_gpu)}


def config_file(settings: Settings, catalogue: Catalogue) -> dict[str, Any]:
    """All models as `serve deploy` and KubeRay's `serveConfigV2` take them."""
    return {
        "proxy_location": "Disabled",
        "applications": [_application(settings, model) for model in catalogue.models.values()],
    }


def _application(settings: Settings, model: Model) -> dict[str, Any]:
    options = painter_options(settings, model)
    arguments = {
        "folder": str(model.folder),
        **{name: getattr(options, name) for name in _PLAIN if getattr(options, name) is not None},
    }
    return {
        "name": model.name,
        "route_prefix": None,  # handles only: no HTTP
        "import_path": APPLICATION,
        "args": arguments,
        "deployments": [{"name": DEPLOYMENT, **scale(settings, model)}],
    }


_PLAIN: Final = (
    "model_host",
    "device",
    "runner",
    "plans",
    "threads",
    "replicas",
    "timeout_s",
    "silence_s",
)
