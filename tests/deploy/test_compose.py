"""docker-compose.yml and Dockerfile: what can be known of them without a Docker daemon."""

import fnmatch
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from darkroom.local.data_dir import make_data_dir
from darkroom.local.ports import accepts, free_port
from darkroom.local.ray_head import client_environment
from darkroom.local.servers import rclone_program, redis_program
from darkroom.local.services import process_specs
from darkroom.queue.celery_app import celery_app
from darkroom.settings import HOME, Settings
from darkroom.storage.images import S3Store

COMPOSE = HOME / "docker-compose.yml"
OVERRIDE = HOME / "deploy" / "compose" / "publish-s3.yml"
MAKE_SECRETS = HOME / "deploy" / "compose" / "make-secrets.sh"
OF_CONTAINERS_ONLY = {"pod"}  # holds namespaces for others; it has no work, and so no health


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture(scope="module")
def services(compose) -> dict[str, dict]:
    return compose["services"]


@pytest.fixture(scope="module")
def secrets_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compose") / "secrets"
    subprocess.run([MAKE_SECRETS, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def local_argvs(tmp_path_factory) -> list[Sequence[str]]:
    data_dir = make_data_dir(tmp_path_factory.mktemp("local"))
    return [spec.argv for spec in process_specs(data_dir, api_port=free_port(), workers=1)]


def module_of(argv: Sequence[str]) -> str | None:
    """`m` of `python … -m m …`; None for what is no Python of ours."""
    if "python" not in Path(argv[0]).name or "-m" not in argv:
        return None
    return argv[argv.index("-m") + 1]


def our_commands(services: Mapping[str, dict]) -> dict[str, list[str]]:
    """The command of each service that runs a Python module."""
    return {
        name: service["command"]
        for name, service in services.items()
        if module_of(service.get("command", ["image's own"]))
    }


def run_here(command: Sequence[str], *extra: str, **environment: str) -> subprocess.Popen[str]:
    assert command[0] == "python"
    return subprocess.Popen(
        [sys.executable, "-P", *command[1:], *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HOME), **environment},
    )


# --- the file -------------------------------------------------------------------------------------


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
        modules = [module_of(command) for command in our_commands(here).values()]
        deploying = next(
            s for s in here.values() if s.get("command", [""])[-1] == "workers.deploy.serve"
        )

        assert modules.count("ray.scripts.scripts") == 1
        assert modules.count("workers.deploy.serve") == 1
        assert deploying["environment"]["DARKROOM_DEVICE"] == device
        for name, service in here.items():
            for needed, how in service.get("depends_on", {}).items():
                assert needed in here or how.get("required") is False, (name, needed)


def test_a_workers_secrets_are_no_other_users_in_the_pod(services):
    """They share processes: who has the same user id may look into /proc/…/root."""
    in_pod = {n: s for n, s in services.items() if s.get("pid") == "service:pod" or n == "pod"}
    by_user: dict[str, set[str]] = {}
    for service in in_pod.values():
        by_user.setdefault(service["user"], set()).update(service.get("secrets", []))

    assert by_user["10001:10001"] == {"ray_token"}
    assert "darkroom_database_url" in by_user["10002:10001"]


def test_who_speaks_with_strangers_has_nothing_to_lose(services):
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


def test_a_worker_may_hand_over_what_it_draws(services):
    grace_s = int(services["worker"]["stop_grace_period"].removesuffix("s"))

    assert grace_s > Settings().shutdown_grace_s + 10


# --- secrets --------------------------------------------------------------------------------------


def test_no_secret_stands_in_an_environment(compose, services):
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


# --- commands -------------------------------------------------------------------------------------


def test_the_commands_are_those_of_the_local_stack(services, local_argvs):
    here = {module_of(command) for command in our_commands(services).values()}
    there = {module_of(argv) for argv in local_argvs} - {None}

    assert here == there


def test_the_s3_server_is_that_of_the_local_stack(services, local_argvs):
    (local,) = [argv for argv in local_argvs if Path(argv[0]).name == "rclone"]

    assert services["s3"]["command"][:2] == list(local[1:3]) == ["serve", "s3"]


def test_ray_is_started_with_the_options_of_the_local_stack(services, local_argvs):
    def options(argv: Sequence[str]) -> set[str]:
        return {argument.partition("=")[0] for argument in argv if argument.startswith("--")}

    (local,) = [argv for argv in local_argvs if module_of(argv) == "ray.scripts.scripts"]

    # How many processors a container may use, Ray asks the kernel.
    assert options(services["ray"]["command"]) == options(local) - {"--num-cpus"}
    assert services["ray-cpu"]["command"] == services["ray"]["command"]
    assert "--node-ip-address=127.0.0.1" in services["ray"]["command"]


def test_all_who_meet_ray_are_told_what_the_local_stack_tells_them(services):
    local = client_environment(Path("/run/secrets/ray_token"))

    for name in ("ray", "ray-cpu", "serve", "serve-cpu", "worker"):
        assert local.items() <= services[name]["environment"].items(), name


def test_each_of_our_commands_explains_itself(services):
    commands = {tuple(command[:3]): command[:3] for command in our_commands(services).values()}
    commands[("ray",)] = ["python", "-m", "ray.scripts.scripts", "start"]
    running = [run_here(command, "--help") for command in commands.values()]

    for process in running:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "usage" in output.lower()
    assert len(running) == 7


def test_each_command_finds_what_it_needs_with_the_secrets_mounted_for_it(
    services, database_url, redis_url, s3_settings, tmp_path
):
    values = {
        "darkroom_database_url": database_url,
        "darkroom_redis_url": redis_url,
        "darkroom_webhook_encryption_keys": "a long random text",
        "darkroom_s3_access_key_id": s3_settings.access_key_id,
        "darkroom_s3_secret_access_key": s3_settings.secret_access_key,
        "ray_token": "not asked for: the check only connects",
    }
    with socket.create_server(("127.0.0.1", 0)) as ray:
        moved = {
            "DARKROOM_S3_ENDPOINT_URL": s3_settings.endpoint_url,
            "DARKROOM_S3_BUCKET": s3_settings.bucket,
            "DARKROOM_RAY_ADDRESS": f"127.0.0.1:{ray.getsockname()[1]}",
        }
        checks = {}
        for name in ("migrate", "api", "sender", "worker", "serve-cpu"):
            folder = tmp_path / name
            folder.mkdir()
            for secret in services[name]["secrets"]:
                (folder / secret).write_text(values[secret])
            environment = services[name]["environment"] | moved
            environment["DARKROOM_SECRETS_DIR"] = str(folder)
            checks[name] = run_here(services[name]["command"], "--check", **environment)

        for name, process in checks.items():
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, f"{name}: {output}"


@contextmanager
def running(argv: Sequence[str | Path], port: int, **environment: str) -> Iterator[None]:
    """The server, from when it listens until it has ended."""
    process = subprocess.Popen(
        argv,
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 10
        while not accepts(port)():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "it does not listen"
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)


def test_valkey_takes_our_password_and_carries_our_doorbell(secrets_dir, tmp_path):
    port = free_port()
    moved = [f"--port {port}", "--bind 127.0.0.1", f"--dir {tmp_path}"]
    moved += [f"--aclfile {secrets_dir / 'redis_users.acl'}"]
    given = (secrets_dir / "darkroom_redis_url").read_text()
    url = given.replace("redis:6379", f"127.0.0.1:{port}")
    configuration = HOME / "deploy" / "compose" / "valkey.conf"
    argv = [redis_program(), str(configuration), *" ".join(moved).split()]

    with running(argv, port), Redis.from_url(url) as ours:
        app = celery_app(Settings(redis_url=url), socket_timeout_s=1)
        with app.connection_for_write() as connection, connection.SimpleQueue("generate") as queue:
            queue.put({"a": "hint"})
            assert queue.get(timeout=2).payload == {"a": "hint"}

        with Redis(port=port) as anybody, pytest.raises(AuthenticationError):
            anybody.ping()
        with Redis(port=port, username="probe", password="any") as probe:
            assert probe.ping()
            with pytest.raises(NoPermissionError):
                probe.llen("generate")
        with pytest.raises(NoPermissionError):
            ours.flushall()

    assert (tmp_path / "appendonlydir").is_dir()


def test_the_s3_server_takes_our_key_and_has_our_bucket(services, secrets_dir, tmp_path):
    port = free_port()
    service = services["s3"]
    moved = {
        "/run/secrets": str(secrets_dir),
        "/home/rclone": str(tmp_path),
        ":9000": f"127.0.0.1:{port}",
        "exec rclone": f"exec {rclone_program()}",
        "$$": "$",
    }
    argv = [*service["entrypoint"], *service["command"]]
    for there, here in moved.items():
        argv = [argument.replace(there, here) for argument in argv]
    ours = Settings(
        s3_endpoint_url=f"http://127.0.0.1:{port}",
        s3_access_key_id=(secrets_dir / "darkroom_s3_access_key_id").read_text(),
        s3_secret_access_key=(secrets_dir / "darkroom_s3_secret_access_key").read_text(),
    )

    with running(argv, port, RCLONE_CONFIG="", HOME=str(tmp_path)):
        store = S3Store(ours)
        store.put("tenant/job/1.png", b"a picture", "image/png")

    assert (tmp_path / "darkroom" / "tenant" / "job" / "1.png").read_bytes() == b"a picture"


# --- images ---------------------------------------------------------------------------------------


def dockerfile_lines() -> list[str]:
    """Instructions, each on one line."""
    text = re.sub(r"\\\n", " ", (HOME / "Dockerfile").read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def sent_to_builder(path: str) -> bool:
    """Whether .dockerignore lets it pass; as Docker, the last line that matches decides."""
    ignored = False
    parts = path.split("/")
    prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for line in (HOME / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        tried = parts if "**/" in line else prefixes
        if any(fnmatch.fnmatchcase(name, pattern) for name in tried):
            ignored = not line.startswith("!")
    return not ignored


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=HOME, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    return listed.stdout.splitlines()


def test_every_target_that_compose_builds_is_in_the_dockerfile(services):
    wanted = {service["build"]["target"] for service in services.values() if "build" in service}
    stages = {line.split()[-1] for line in dockerfile_lines() if line.startswith("FROM ")}

    assert wanted == stages - {"base"}


def test_an_image_without_a_build_of_its_own_is_another_services(services):
    built = {service["image"] for service in services.values() if "build" in service}

    for name, service in services.items():
        if service["image"].startswith("darkroom-"):
            assert service["image"] in built, name


def test_all_that_is_copied_is_there_and_passes_dockerignore():
    tracked = tracked_files()
    copied = [line.split()[1:-1] for line in dockerfile_lines() if line.startswith("COPY ")]

    assert copied
    for source in {source for sources in copied for source in sources}:
        files = [file for file in tracked if file == source or file.startswith(f"{source}/")]
        assert files, f"{source} is not in the repository"
        assert any(map(sent_to_builder, files)), f"{source} is ignored"


def test_what_the_code_reads_reaches_the_builder():
    for file in (
        "migrations/versions/0001_first_tables.py",
        "model_repository/stable_diffusion/config.pbtxt",
        "models/darkroom-demo/darkroom.toml",
        "darkroom/local/darkroom_processes.py",
    ):
        assert sent_to_builder(file), file
    for file in ("tests/conftest.py", ".venv/bin/python", "model_repository/unet/1/model.plan"):
        assert not sent_to_builder(file), file


def test_the_image_runs_what_compose_tells_it_to(services):
    stages: dict[str, list[str]] = {}
    for line in dockerfile_lines():
        if line.startswith("FROM "):
            stage = stages.setdefault(line.split()[-1], [])
        elif stages:
            stage.append(line)

    for name, service in services.items():
        if "build" in service:
            (command,) = [
                yaml.safe_load(line.removeprefix("CMD "))
                for line in stages[service["build"]["target"]]
                if line.startswith("CMD ")
            ]
            assert service["command"][: len(command)] == command, name


def test_no_image_is_named_by_a_tag_that_moves_at_will(services):
    images = [s["image"] for s in services.values() if not s["image"].startswith("darkroom-")]
    images += re.findall(r"(?m)^ARG \w+_IMAGE=(\S+)", (HOME / "Dockerfile").read_text())

    for image in images:
        assert re.search(r":\d", image), image


def test_packages_can_be_installed_before_they_are_copied(tmp_path):
    script = HOME / "deploy" / "compose" / "package_folders.py"

    subprocess.run([sys.executable, script, HOME / "pyproject.toml"], cwd=tmp_path, check=True)

    assert (tmp_path / "darkroom" / "cli" / "__init__.py").exists()
    assert (tmp_path / "workers" / "__init__.py").exists()
