"""docker-compose.yml and its secrets: what can be checked without a Docker daemon."""

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from darkroom.settings import Settings
from tests.support.compose_files import (
    COMPOSE,
    MAKE_SECRETS,
    OVERRIDE,
    command_of,
    our_commands,
    sent_to_builder,
)

OF_CONTAINERS_ONLY = {"pod"}  # holds namespaces for others; it has no work, and so no health


def test_the_files_follow_the_compose_schema():
    program = Path(sys.executable).with_name("check-jsonschema")

    checked = subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", COMPOSE, OVERRIDE],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_docker_compose_itself_accepts_the_file(profile):
    if not shutil.which("docker"):
        pytest.skip("docker is not here")
    plugin = ["docker", "compose"]
    if subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker's client has no compose plugin")

    checked = subprocess.run(
        [*plugin, "-f", COMPOSE, "--profile", profile, "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stderr


def test_only_the_api_is_published_and_on_loopback(services):
    assert {name for name, service in services.items() if "ports" in service} == {"api"}
    assert services["api"]["ports"] == ["${DARKROOM_PUBLISH:-127.0.0.1:8000}:8000"]
    assert services["api"]["environment"]["DARKROOM_AUTH"] == "on"
    assert not any(service.get("network_mode") == "host" for service in services.values())


def test_the_override_publishes_the_storage_on_loopback_only():
    services = yaml.safe_load(OVERRIDE.read_text())["services"]

    assert {name for name, service in services.items() if "ports" in service} == {"s3"}
    assert services["s3"]["ports"] == ["127.0.0.1:${DARKROOM_S3_PORT:-9000}:9000"]


def test_stores_are_on_a_network_without_a_way_out(compose, services):
    assert compose["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "redis", "s3", "migrate", "pod"):
        assert services[name]["networks"] == ["inside"]


def test_every_service_has_a_health_check_or_ends_by_itself(services):
    for name in services.keys() - OF_CONTAINERS_ONLY:
        service = services[name]
        assert "healthcheck" in service or service["restart"] == "no", name


def test_every_service_is_bounded_and_without_rights(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service, name
        assert "pids_limit" in service, name
        user = service.get("user", "10001:10001")  # or that of our Dockerfile
        assert int(user.split(":")[0]) > 0, name


def test_each_profile_has_one_ray_and_one_that_deploys(services):
    for profile, device in (("cpu", "cpu"), ("gpu", "cuda")):
        here = {
            name: service
            for name, service in services.items()
            if profile in service.get("profiles", [profile])
        }
        commands = {name: command_of(command) for name, command in our_commands(here).items()}
        [deploying] = [name for name, command in commands.items() if command == "workers serve"]

        assert list(commands.values()).count("ray.scripts.scripts") == 1
        assert here[deploying]["environment"]["DARKROOM_DEVICE"] == device
        for name, service in here.items():
            for needed, how in service.get("depends_on", {}).items():
                assert needed in here or how.get("required") is False, (name, needed)


def test_no_other_user_of_the_pod_has_a_workers_secrets(services):
    """They share processes: one with the same user id may look into /proc/…/root."""
    in_pod = {n: s for n, s in services.items() if s.get("pid") == "service:pod" or n == "pod"}
    by_user: dict[str, set[str]] = {}
    for service in in_pod.values():
        by_user.setdefault(service["user"], set()).update(service.get("secrets", []))

    assert by_user["10001:10001"] == {"ray_token"}
    assert "darkroom_database_url" in by_user["10002:10001"]


def test_the_sender_has_no_secret_but_its_own_and_a_user_of_its_own(services):
    sender = services["sender"]

    assert set(sender["secrets"]) == {
        "darkroom_database_url",
        "darkroom_redis_url",
        "darkroom_webhook_encryption_keys",
    }
    assert not {name for name in services if "outside" in services[name].get("networks", [])} - {
        "sender"
    }
    users = [service.get("user") for name, service in services.items() if name != "sender"]
    assert sender["user"] not in users
    assert "pid" not in sender
    assert "volumes" not in sender


def test_a_worker_has_time_to_requeue_its_jobs_when_it_stops(services):
    grace_s = int(services["worker"]["stop_grace_period"].removesuffix("s"))

    assert grace_s > Settings().shutdown_grace_s + 10


# --- secrets --------------------------------------------------------------------------------------


def test_no_secret_is_in_an_environment(compose, services):
    secret_settings = {
        f"DARKROOM_{name.upper()}"
        for name, field in Settings.model_fields.items()
        if "Secret" in str(field.annotation)
    }
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            assert variable not in secret_settings, name
            assert not re.search(r"(?i)passw|secret|token|key", variable) or value.startswith(
                ("/run/secrets", "token")
            ), (name, variable)
    for secret in compose["secrets"].values():
        assert list(secret) == ["file"]


def test_the_script_makes_every_secret_that_is_mounted(compose, services, secrets_dir):
    mounted = {secret for service in services.values() for secret in service.get("secrets", [])}

    assert mounted == set(compose["secrets"])
    for name, secret in compose["secrets"].items():
        assert secret["file"] == f"./secrets/{name}"
        assert (secrets_dir / name).stat().st_size > 0


def test_secrets_are_kept_from_others_and_from_git_and_from_the_builder(secrets_dir):
    assert stat.S_IMODE(secrets_dir.stat().st_mode) == 0o700
    assert (secrets_dir / ".gitignore").read_text() == "*"
    assert not sent_to_builder("secrets/ray_token")
    assert not sent_to_builder(".env")


def test_the_script_leaves_alone_what_is_there(secrets_dir):
    before = {file.name: file.read_bytes() for file in secrets_dir.iterdir()}

    again = subprocess.run([MAKE_SECRETS, secrets_dir], check=True, capture_output=True)

    assert again.stdout == b""
    assert {file.name: file.read_bytes() for file in secrets_dir.iterdir()} == before
