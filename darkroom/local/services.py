"""Processes of a whole Darkroom: its servers and its own, configured to find each other."""

import os
from collections.abc import Mapping
from typing import Final

from darkroom.local import darkroom_processes, servers
from darkroom.local.data_dir import DataDir, read_or_create_secret, write_secret
from darkroom.local.ports import LOOPBACK, free_port
from darkroom.local.postgres import postgres
from darkroom.local.process import ProcessSpec
from darkroom.local.ray_head import choose_ray_ports, client_environment, cpu_count, ray_head
from darkroom.settings import HOME

BUCKET: Final = "darkroom"
#: Variables of the caller that would lead our processes to another server.
EXCLUDED_PREFIXES: Final = ("PG", "RAY_", "CELERY_", "AWS_", "DARKROOM_SECRETS_DIR")


def process_specs(data_dir: DataDir, *, api_port: int, workers: int) -> list[ProcessSpec]:
    """Return the spec of every process, slowest first: the others start while Ray boots."""
    secrets = {
        name: read_or_create_secret(data_dir.secrets / name)
        for name in ("postgres_password", "redis_password", "darkroom_s3_secret_access_key")
    }
    token = data_dir.secrets / "ray_token"
    inherited = _inherited_environment()
    ray = ray_head(
        data_dir.ray,
        ports=choose_ray_ports(),
        token=token,
        cpus=cpu_count(),
        env=inherited,
        log=data_dir.log("ray"),
    )
    stores = _stores(data_dir, secrets)
    env = {
        **inherited,
        **client_environment(token),
        **_settings(data_dir, {spec.name: spec.url for spec in [ray, *stores]}, api_port),
    }
    return [ray, *stores, *_own_processes(data_dir, env, api_port, workers)]


def _stores(data_dir: DataDir, secrets: Mapping[str, str]) -> list[ProcessSpec]:
    return [
        postgres(
            data_dir.home / "postgres",
            port=free_port(),
            password=secrets["postgres_password"],
            log=data_dir.log("postgres"),
        ),
        servers.redis(
            data_dir.home / "redis",
            port=free_port(),
            password=secrets["redis_password"],
            log=data_dir.log("redis"),
        ),
        servers.s3(
            data_dir.objects,
            port=free_port(),
            key_id=BUCKET,
            secret_key=secrets["darkroom_s3_secret_access_key"],
            bucket=BUCKET,
            log=data_dir.log("s3"),
        ),
    ]


def _settings(data_dir: DataDir, urls: Mapping[str, str], api_port: int) -> dict[str, str]:
    """Write secrets into files, since /proc shows an environment; return the other settings."""
    write_secret(data_dir.secrets / "darkroom_database_url", urls["postgres"])
    write_secret(data_dir.secrets / "darkroom_redis_url", urls["redis"])
    write_secret(data_dir.secrets / "darkroom_s3_access_key_id", BUCKET)
    read_or_create_secret(data_dir.secrets / "darkroom_webhook_encryption_keys")
    return {
        "DARKROOM_SECRETS_DIR": str(data_dir.secrets),
        "DARKROOM_S3_ENDPOINT_URL": urls["s3"],
        "DARKROOM_S3_BUCKET": BUCKET,
        "DARKROOM_RAY_ADDRESS": urls["ray"],
        "DARKROOM_API_HOST": LOOPBACK,
        "DARKROOM_API_PORT": str(api_port),
        "DARKROOM_AUTH": "off",  # the API then listens on loopback only
        "DARKROOM_WEBHOOK_ALLOW_PRIVATE": "1",  # a developer's receiver is on loopback too
    }


def _own_processes(
    data_dir: DataDir, env: Mapping[str, str], api_port: int, workers: int
) -> list[ProcessSpec]:
    serve = darkroom_processes.serve_application(
        env=env, ready_file=data_dir.ready / "serve", log=data_dir.log("serve")
    )
    worker_specs = [
        darkroom_processes.worker(
            number,
            env=env,
            ready_file=data_dir.ready / f"worker-{number}",
            log=data_dir.log(f"worker-{number}"),
        )
        for number in range(1, workers + 1)
    ]
    return [
        darkroom_processes.migration(env=env, log=data_dir.log("migration")),
        serve,
        darkroom_processes.api(api_port, env=env, log=data_dir.log("api")),
        darkroom_processes.sender(
            env=env, ready_file=data_dir.ready / "sender", log=data_dir.log("sender")
        ),
        *worker_specs,
    ]


def _inherited_environment() -> dict[str, str]:
    """Return the caller's environment with its DARKROOM_ settings, without excluded variables."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(EXCLUDED_PREFIXES)
    }
    env["PYTHONUNBUFFERED"] = "1"  # else a log lacks its end when its writer dies
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), env.get("PYTHONPATH")]))
    return env
