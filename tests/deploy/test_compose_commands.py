"""The commands of docker-compose.yml, run here: the same as those of the local stack."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
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
from tests.support.compose_files import command_of, our_commands


@pytest.fixture(scope="module")
def local_argvs(tmp_path_factory) -> list[Sequence[str]]:
    data_dir = make_data_dir(tmp_path_factory.mktemp("local"))
    return [spec.argv for spec in process_specs(data_dir, api_port=free_port(), workers=1)]


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


def test_the_commands_are_those_of_the_local_stack(services, local_argvs):
    here = {command_of(command) for command in our_commands(services).values()}
    there = {command_of(argv) for argv in local_argvs} - {None}

    assert here == there


def test_the_s3_server_is_that_of_the_local_stack(services, local_argvs):
    (local,) = [argv for argv in local_argvs if Path(argv[0]).name == "rclone"]

    assert services["s3"]["command"][:2] == list(local[1:3]) == ["serve", "s3"]


def test_ray_is_started_with_the_options_of_the_local_stack(services, local_argvs):
    def options(argv: Sequence[str]) -> set[str]:
        return {argument.partition("=")[0] for argument in argv if argument.startswith("--")}

    (local,) = [argv for argv in local_argvs if command_of(argv) == "ray.scripts.scripts"]

    # How many processors a container may use, Ray asks the kernel.
    assert options(services["ray"]["command"]) == options(local) - {"--num-cpus"}
    assert services["ray-cpu"]["command"] == services["ray"]["command"]
    assert "--node-ip-address=127.0.0.1" in services["ray"]["command"]


def test_rays_services_have_the_environment_of_the_local_stack(services):
    local = client_environment(Path("/run/secrets/ray_token"))

    for name in ("ray", "ray-cpu", "serve", "serve-cpu", "worker"):
        assert local.items() <= services[name]["environment"].items(), name


def test_each_of_our_commands_prints_its_help(services):
    commands = {command_of(command) for command in our_commands(services).values()}
    commands |= {"ray.scripts.scripts start"}
    running = [run_here(["python", "-m", *command.split(), "--help"]) for command in commands]

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
    """Run the server; it listens when the block starts, and is stopped after it."""
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


def test_valkey_takes_our_password_and_carries_our_hints(secrets_dir, tmp_path):
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

        with Redis(port=port) as anonymous, pytest.raises(AuthenticationError):
            anonymous.ping()
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
        store.put("tenant/job/1.png", b"an image", "image/png")

    assert (tmp_path / "darkroom" / "tenant" / "job" / "1.png").read_bytes() == b"an image"
