"""Configuration of Ray Serve for each model: options, scale, and all of it as one config file."""

from typing import Any, Final

from darkroom.generation.model_registry import Model, ModelRegistry
from darkroom.settings import Settings
from workers.replica.triton_worker import TritonWorkerOptions

POLICY: Final = "workers.deploy.autoscaling:BacklogAutoscaler"
APPLICATION: Final = "workers.replica.deployment:application"
DEPLOYMENT: Final = "Replica"


def worker_options(settings: Settings, model: Model) -> TritonWorkerOptions:
    """Return the options of the model's replicas. Nothing secret: Ray stores and shows them."""
    return TritonWorkerOptions(
        model=model,
        triton_mode=settings.triton_mode,
        device=settings.device,
        runner=settings.runner,
        compiled_models=settings.compiled_models,
        threads=settings.torch_threads,
        replicas=max_replicas(settings, model),
        timeout_s=settings.microbatch_timeout_s,
        step_timeout_s=settings.step_timeout_s,
    )


def scale(settings: Settings, model: Model) -> dict[str, Any]:
    """Return the number of replicas and their resources, for `Deployment.options`."""
    least, most = min_replicas(settings, model), max_replicas(settings, model)
    options: dict[str, Any] = {"ray_actor_options": _node_resources(settings, model)}
    if least == most:
        return options | {"num_replicas": least}
    return options | {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "upscale_delay_s": 2.0,
            "downscale_delay_s": settings.replica_idle_timeout_s,
            "policy": {
                "policy_function": POLICY,
                "policy_kwargs": {
                    "model": model.name,
                    "per_replica": settings.target_microbatches_per_replica,
                },
            },
        }
    }


def min_replicas(settings: Settings, model: Model) -> int:
    """Return 0 for a model on demand, else the setting."""
    return 0 if model.on_demand else settings.min_replicas


def max_replicas(settings: Settings, model: Model) -> int:
    """Return the setting; unset, it is 1 for a model on demand, else the minimum."""
    if model.on_demand:
        return settings.max_replicas or 1
    return max(settings.min_replicas, settings.max_replicas or 0)


def _node_resources(settings: Settings, model: Model) -> dict[str, Any]:
    """Return a replica's share of its node. On a CPU, a model on demand reserves no core."""
    on_gpu = settings.device == "cuda"
    return {"num_cpus": 0 if model.on_demand and not on_gpu else 1, "num_gpus": int(on_gpu)}


def config_file(settings: Settings, registry: ModelRegistry) -> dict[str, Any]:
    """Return all models as `serve deploy` and KubeRay's `serveConfigV2` take them."""
    return {
        "proxy_location": "Disabled",
        "applications": [_application(settings, model) for model in registry.models.values()],
    }


def _application(settings: Settings, model: Model) -> dict[str, Any]:
    options = worker_options(settings, model)
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
    "triton_mode",
    "device",
    "runner",
    "compiled_models",
    "threads",
    "replicas",
    "timeout_s",
    "step_timeout_s",
)
