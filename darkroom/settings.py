"""All settings, read once at the start of a process and passed on as arguments.

Values come from the environment (`DARKROOM_…`) or, for secrets, from files named like the
variable in lower case inside the directory `DARKROOM_SECRETS_DIR` (Docker's /run/secrets).
"""

import os
import sys
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

HOME: Final = Path(__file__).resolve().parent.parent  #: models/, model_repository/, migrations/


class Settings(BaseSettings):
    """Settings, one field per variable; a test compares them with `.env.example`."""

    model_config = SettingsConfigDict(
        env_prefix="DARKROOM_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    database_url: SecretStr = Field(
        SecretStr("postgresql://darkroom@127.0.0.1:5432/darkroom"),
        description="PostgreSQL, as a libpq URL. Holds every job; the only state that matters.",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey. Carries only wake-up hints; may be flushed at any moment.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="S3 endpoint that workers and the API call; unset means AWS."
    )
    s3_public_url: str | None = Field(
        None, description="Endpoint in image URLs, if clients reach S3 under another name."
    )
    s3_region: str = Field("us-east-1", description="Region in signatures.")
    s3_bucket: str = Field("darkroom", description="Bucket for the images.")
    s3_access_key_id: SecretStr = Field(SecretStr(""), description="S3 access key id.")
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="S3 secret access key.")
    retention_days: int | None = Field(
        None,
        ge=1,
        description="Days after a job finished at which its image and prompt are deleted, unless "
        "its batch or tenant has its own number; unset keeps them.",
    )
    orphan_retention_h: float = Field(
        24,
        ge=1,
        description="Hours after which a stored image that no job refers to is removed; at least "
        "1, and far longer than an upload waits for its row.",
    )
    image_url_ttl_s: int = Field(
        900, ge=1, le=604_800, description="Seconds a presigned image URL is valid; at most 7 days."
    )

    api_host: str = Field("127.0.0.1", description="Address the API listens on.")
    api_port: int = Field(8000, ge=0, le=65_535, description="Port the API listens on.")
    auth: Literal["on", "off"] = Field(
        "on",
        description="Whether requests need an API key: on or off. `off` is for development: the "
        "API then listens on loopback only, or refuses to start.",
    )
    max_upload_bytes: int = Field(64 * 2**20, description="Largest batch file, in bytes.")
    max_upload_rows: int = Field(100_000, description="Most rows of one batch file.")
    max_batch_jobs: int = Field(
        500_000,
        ge=1,
        description="Most jobs of one batch; `num_images` and parameter sweeps make several jobs "
        "of one row.",
    )

    models_dir: Path = Field(
        HOME / "models",
        description="Folder of models, each a diffusers folder with a darkroom.toml.",
    )
    default_model: str = Field("darkroom-demo", description="Model of a job that names none.")

    webhook_allow_private: bool = Field(
        False,
        description="For development: allow webhook URLs on loopback and private networks, with "
        "plain HTTP and any port. Metadata services stay blocked.",
    )
    webhook_denylist: str = Field(
        "",
        description="Networks and host names that no webhook may reach, separated by commas: your "
        "own public addresses, a NAT64 prefix, names that resolve to internal hosts.",
    )
    webhook_encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="Any long random text. Encrypts the signing secrets in the database; empty "
        "stores them in plain text. To rotate, put the new key and a comma before the "
        "old one.",
    )
    webhook_signing_key: SecretStr = Field(
        SecretStr(""),
        description="An ed25519 key, whsk_…; if set, webhooks carry a `v1a` signature too. To "
        "rotate, put the new key and a comma before the old one.",
    )
    webhook_ca_file: Path | None = Field(
        None,
        description="PEM file of certificate authorities to trust for receivers, besides the "
        "system's.",
    )
    webhook_timeout_s: float = Field(
        15,
        gt=0,
        le=60,
        description="Seconds for one webhook attempt: DNS, connection, TLS and response.",
    )
    webhook_max_connections: int = Field(
        2000, ge=16, description="Most webhook attempts that one sender has in flight."
    )
    webhook_max_endpoints: int = Field(
        2000, ge=1, description="Most webhook endpoints of one tenant."
    )

    ray_address: str = Field(
        "127.0.0.1:6380", description="Address of the Ray cluster's control store (GCS), host:port."
    )
    worker_concurrency: int = Field(
        2,
        ge=1,
        description="Microbatches a worker runs at a time; 2 keep a replica busy while images are "
        "stored.",
    )
    lease_s: float = Field(
        30,
        gt=0,
        description="Seconds after the last heartbeat at which the jobs of a dead worker are "
        "requeued.",
    )
    maintenance_interval_s: float = Field(
        5,
        gt=0,
        description="Seconds between two passes that requeue the jobs of dead workers and wake "
        "workers.",
    )
    microbatch_timeout_s: float = Field(
        600,
        gt=0,
        description="Longest generation of one microbatch, in seconds; then its jobs count as "
        "crashed.",
    )
    step_timeout_s: float = Field(
        60,
        gt=0,
        description="Longest time without a finished denoising step, in seconds; then the replica "
        "counts as hung.",
    )
    shutdown_grace_s: float = Field(
        5,
        ge=0,
        description="Seconds a stopping worker continues to generate; unfinished jobs are then "
        "requeued.",
    )
    max_attempts: int = Field(
        3,
        ge=3,
        description="Crashes of a worker or replica after which a job fails; at least 3. From the "
        "third attempt on it runs alone, so that it cannot fail other jobs.",
    )
    min_replicas: int = Field(
        1, ge=1, description="Least replicas of each model; on GPUs, one GPU each."
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="Most replicas of each model; between the two, the number follows the queued "
        "work. Unset: always the least.",
    )
    target_microbatches_per_replica: float = Field(
        4.0,
        gt=0,
        description="Queued and running microbatches per replica at which the autoscaler adds no "
        "more.",
    )
    replica_idle_timeout_s: float = Field(
        120.0, ge=0, description="Seconds a replica that is not needed is kept."
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Device of the replicas: cpu or cuda."
    )
    runner: Literal["torch", "tensorrt"] = Field(
        "torch",
        description="What executes the networks: torch or tensorrt, which needs plans made by "
        "python -m compile.",
    )
    compiled_models: str | None = Field(
        None,
        description="Compiled models, one folder each: a local folder, or s3://BUCKET/PREFIX; "
        "unset means plans/ of the checkout.",
    )
    torch_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of one replica; unset divides all cores among the replicas.",
    )
    triton_mode: Literal["auto", "inprocess", "subprocess"] = Field(
        "auto",
        description="How a replica runs Triton: auto, inprocess or subprocess. `auto` is in "
        "process where `tritonserver` can be imported.",
    )


def load_settings() -> Settings:
    """Read the environment and the secrets directory, at the start of a process.

    Exit with status 2 if a value is invalid. The message names the variable and the reason, but
    not the value, which may be a secret.
    """
    secrets_dir = os.environ.get("DARKROOM_SECRETS_DIR")
    try:
        return Settings(_secrets_dir=secrets_dir)
    except ValidationError as invalid:
        for problem in invalid.errors(include_url=False, include_input=False):
            name = "_".join(["DARKROOM", *map(str, problem["loc"])]).upper()
            message = problem["msg"].removeprefix("Input ")
            print(f"error: {name} {message}; see .env.example", file=sys.stderr)
        raise SystemExit(2) from None
