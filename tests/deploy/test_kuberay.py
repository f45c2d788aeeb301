"""deploy/kuberay and Serve's config file: what can be checked without a cluster."""

import re
from collections.abc import Iterator

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from darkroom.generation.model_registry import load_registry
from darkroom.settings import HOME, Settings
from workers.deploy.serve_config import config_file, scale

MANIFEST = HOME / "deploy" / "kuberay" / "darkroom.yaml"
MODELS_IN_CONTAINERS = "/app/models"


@pytest.fixture(scope="module")
def service() -> dict:
    [document] = yaml.safe_load_all(MANIFEST.read_text())
    return document


def pods(service: dict) -> Iterator[dict]:
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def containers(service: dict) -> list[dict]:
    return [container for pod in pods(service) for container in pod["containers"]]


@pytest.mark.parametrize(
    "changed",
    [{}, {"replicas": 3}, {"max_replicas": 4}, {"device": "cuda", "torch_threads": 2}],
    ids=str,
)
def test_rays_own_schema_accepts_the_config_file(registry, changed):
    config = config_file(Settings(**changed), registry)
    checked = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(config)))

    assert [one.name for one in checked.applications] == list(registry.models)
    for one in config["applications"]:
        [deployment] = one["deployments"]
        if "autoscaling_config" in deployment:
            AutoscalingConfig.model_validate(deployment["autoscaling_config"])


def test_two_applications_of_one_name_are_rejected(registry):
    config = config_file(Settings(), registry)
    config["applications"] *= 2
    with pytest.raises(ValueError, match="multiple configs"):
        ServeDeploySchema.model_validate(config)


def test_only_a_model_on_demand_may_have_no_replica(registry):
    old, new = registry.models["darkroom-demo-v1"], registry.models["darkroom-demo"]
    plain = Settings()
    assert scale(plain, new)["num_replicas"] == 1
    assert scale(plain, old)["autoscaling_config"]["min_replicas"] == 0
    assert scale(plain, old)["autoscaling_config"]["max_replicas"] == 1
    more = scale(Settings(min_replicas=2, max_replicas=5), new)["autoscaling_config"]
    assert (more["min_replicas"], more["max_replicas"]) == (2, 5)


def test_the_manifest_has_the_config_that_the_command_prints(service):
    settings = Settings(device="cuda", max_replicas=4, triton_mode="inprocess")
    registry = load_registry(settings.models_dir, settings.default_model)
    printed = yaml.safe_dump(config_file(settings, registry))
    wanted = yaml.safe_load(printed.replace(str(settings.models_dir), MODELS_IN_CONTAINERS))

    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == wanted
    ServeDeploySchema.model_validate(wanted)


def test_the_manifest_runs_the_images_that_compose_builds_on_the_ray_that_is_locked(service):
    compose = yaml.safe_load((HOME / "docker-compose.yml").read_text())
    built = {s["image"].partition(":")[0] for s in compose["services"].values() if s.get("build")}
    images = {container["image"].partition(":")[0] for container in containers(service)}

    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert images == {"darkroom-serve", "darkroom-worker"} <= built
    locked = re.search(r"^ray==(\S+)$", (HOME / "requirements.lock").read_text(), re.MULTILINE)
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == locked[1]


def test_the_manifest_holds_no_secret_and_replicas_see_none(service):
    for container in containers(service):
        for variable in container.get("env", []):
            assert not re.search(r"PASSWORD|_KEY|_URL$|TOKEN$", variable["name"]), variable
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert ("secrets" in mounts) == (container["name"] == "worker")
        user = container["securityContext"]["runAsUser"]
        assert user == (10002 if container["name"] == "worker" else 10001)
    assert "://" not in MANIFEST.read_text()


def test_every_mount_has_its_volume_and_every_container_its_limits(service):
    for pod in pods(service):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_replicas_request_gpus_and_the_group_can_grow_to_all_of_them(service):
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    most = sum(
        one["deployments"][0]["autoscaling_config"]["max_replicas"]
        for one in config["applications"]
    )
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert group["maxReplicas"] >= most
