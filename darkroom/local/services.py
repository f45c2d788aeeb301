"""The children of a whole Darkroom: which servers and processes, configured to find each other."""

import os
from collections.abc import Mapping
from typing import Final

from darkroom.local import darkroom_processes, servers
from darkroom.local.data_dir import DataDir, secret
from darkroom.local.ports import LOOPBACK, free_port
from darkroom.local.postgres import postgres
from darkroom.local.process import ProcessSpec
from darkroom.local.ray_head import choose_ray_ports, client_environment, cpu_count, ray_head
from darkroom.settings import HOME

BUCKET: Final = "darkroom"
#: What the caller's shell may hold that would lead our processes to another server.
FOREIGN: Final = ("PG", "RAY_", "CELERY_", "AWS_", "DARKROOM_SECRETS_DIR")


def darkroom_children(layout: DataDir, *, api_port: int, workers: int) -> list[ProcessSpec]:
    """Slowest first: while Ray boots, the others become ready."""
    kept = {
        name: secret(layout.secrets / name)
        for name in ("postgres_password", "redis_password", "darkroom_s3_secret_access_key")
    }
    token = layout.secrets / "ray_token"
    plain = _inherited()
    ray = ray_head(
        layout.ray,
        ports=choose_ray_ports(),
        token=token,
        cpus=cpu_count(),
        env=plain,
        log=layout.log("ray"),
    )
    stores = _stores(layout, kept)
    env = {
        **plain,
        **client_environment(token),
        **_settings(layout, {child.name: child.url for child in [ray, *stores]}, api_port),
    }
    return [ray, *stores, *_own(layout, env, api_port, workers)]


def _stores(layout: DataDir, kept: Mapping[str, str]) -> list[ProcessSpec]:
    return [
        postgres(
            layout.home / "postgres",
            port=free_port(),
            password=kept["postgres_password"],
            log=layout.log("postgres"),
        ),
        servers.redis(
            layout.home / "redis",
            port=free_port(),
            password=kept["redis_password"],
            log=layout.log("redis"),
        ),
        servers.s3(
            layout.objects,
            port=free_port(),
            key_id=BUCKET,
            secret_key=kept["darkroom_s3_secret_access_key"],
            bucket=BUCKET,
            log=layout.log("s3"),
        ),
    ]


def _settings(layout: DataDir, urls: Mapping[str, str], api_port: int) -> dict[str, str]:
    """Secrets go into files: an environment is open to anyone who may read /proc."""
    secret(layout.secrets / "darkroom_database_url", otherwise=urls["postgres"])
    secret(layout.secrets / "darkroom_redis_url", otherwise=urls["redis"])
    secret(layout.secrets / "darkroom_s3_access_key_id", otherwise=BUCKET)
    secret(layout.secrets / "darkroom_webhook_encryption_keys")
    return {
        "DARKROOM_SECRETS_DIR": str(layout.secrets),
        "DARKROOM_S3_ENDPOINT_URL": urls["s3"],
        "DARKROOM_S3_BUCKET": BUCKET,
        "DARKROOM_RAY_ADDRESS": urls["ray"],
        "DARKROOM_API_HOST": LOOPBACK,
        "DARKROOM_API_PORT": str(api_port),
        "DARKROOM_AUTH": "off",  # the API then listens on loopback only
        "DARKROOM_WEBHOOK_ALLOW_PRIVATE": "1",  # a developer's receiver is on loopback too
    }


def _own(layout: DataDir, env: Mapping[str, str], api_port: int, workers: int) -> list[ProcessSpec]:
    serve = darkroom_processes.serve_application(
        env=env, ready_file=layout.ready / "serve", log=layout.log("serve")
    )
    numbered = [
        darkroom_processes.worker(
            number,
            env=env,
            ready_file=layout.ready / f"worker-{number}",
            log=layout.log(f"worker-{number}"),
        )
        for number in range(1, workers + 1)
    ]
    return [
        darkroom_processes.migration(env=env, log=layout.log("migration")),
        serve,
        darkroom_processes.api(api_port, env=env, log=layout.log("api")),
        darkroom_processes.sender(
            env=env, ready_file=layout.ready / "sender", log=layout.log("sender")
        ),
        *numbered,
    ]


def _inherited() -> dict[str, str]:
    """The caller's environment, with his DARKROOM_ settings, without what would misdirect us."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    env["PYTHONUNBUFFERED"] = "1"  # so that a log's end is there when its writer dies
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), env.get("PYTHONPATH")]))
    return env
