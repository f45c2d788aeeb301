"""Settings, read once when a process starts and passed on.

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
    """Settings, one field per variable; `.env.example` lists them all (a test compares them)."""

    model_config = SettingsConfigDict(
        env_prefix="DARKROOM_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    database_url: SecretStr = Field(
        SecretStr("postgresql://darkroom@127.0.0.1:5432/darkroom"),
        description="URL of PostgreSQL (libpq). Holds all jobs; the only state not to be lost.",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="URL of Redis or Valkey. Carries only hints; may be flushed at any time.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="S3 endpoint that workers and the API use. Unset: AWS."
    )
    s3_public_url: str | None = Field(
        None, description="S3 endpoint in image URLs, if clients need another one. Unset: the same."
    )
    s3_region: str = Field("us-east-1", description="Region used in signatures.")
    s3_bucket: str = Field("darkroom", description="Bucket that holds the images.")
    s3_access_key_id: SecretStr = Field(SecretStr(""), description="S3 key id.")
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="S3 secret key.")
    retention_days: int | None = Field(
        None,
        ge=1,
        description="Days after which the image and prompt of a finished job are deleted, unless "
        "its batch or tenant has another period. Unset: never.",
    )
    orphan_retention_h: float = Field(
        24,
        ge=1,
        description="Hours after which an image that belongs to no job is removed from the bucket; "
        "must be far longer than an upload takes.",
    )
    image_url_ttl_s: int = Field(
        900, ge=1, le=604_800, description="Seconds a presigned image URL is valid."
    )

    api_host: str = Field("127.0.0.1", description="Address the API listens on.")
    api_port: int = Field(8000, ge=0, le=65_535, description="Port the API listens on.")
    auth: Literal["on", "off"] = Field(
        "on",
        description="Whether requests need an API key. `off` is for development: the API then "
        "listens only on loopback.",
    )
    max_upload_bytes: int = Field(64 * 2**20, description="Largest batch file, in bytes.")
    max_upload_rows: int = Field(100_000, description="Most rows of one batch file.")
    max_batch_jobs: int = Field(
        500_000,
        ge=1,
        description="Most jobs of one batch; `num_images` and parameter sweeps multiply rows.",
    )

    models_dir: Path = Field(
        HOME / "models", description="Folder of models, each a diffusers folder with darkroom.toml."
    )
    default_model: str = Field("darkroom-demo", description="Model of a job that names none.")

    webhook_allow_private: bool = Field(
        False,
        description="For development: allow webhooks to loopback and private networks, over plain "
        "HTTP, to any port. Metadata services stay blocked.",
    )
    webhook_denylist: str = Field(
        "",
        description="Networks and host names that no webhook may reach, separated by commas: your "
        "public addresses, a NAT64 prefix, internal names.",
    )
    webhook_encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="Any long random text. Encrypts signing secrets in the database; empty leaves "
        "them unencrypted. To replace it, put the new one before the old one and a comma.",
    )
    webhook_signing_key: SecretStr = Field(
        SecretStr(""),
        description="Ed25519 key, whsk_…; if set, webhooks also carry a `v1a` signature. To "
        "replace it, put the new one before the old one and a comma.",
    )
    webhook_ca_file: Path | None = Field(
        None,
        description="PEM file of certificate authorities to trust in addition to the system's.",
    )
    webhook_timeout_s: float = Field(
        15, gt=0, le=60, description="Seconds of one attempt: DNS, connection, TLS and response."
    )
    webhook_max_connections: int = Field(
        2000, ge=16, description="Most concurrent attempts of one sender."
    )
    webhook_max_endpoints: int = Field(
        2000, ge=1, description="Most webhook endpoints of one tenant."
    )

    ray_address: str = Field("127.0.0.1:6380", description="Address of the Ray cluster's GCS.")
    worker_concurrency: int = Field(
        2, ge=1, description="Microbatches a worker keeps in flight, so that a replica never idles."
    )
    lease_s: float = Field(
        30, gt=0, description="Seconds a dispatch stays claimed without a heartbeat."
    )
    maintenance_interval_s: float = Field(
        5, gt=0, description="Seconds between two maintenance passes."
    )
    microbatch_timeout_s: float = Field(
        600, gt=0, description="Seconds that one microbatch may take in the replica."
    )
    step_timeout_s: float = Field(
        60,
        gt=0,
        description="Seconds without a finished denoise step after which a model counts as hung.",
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
        description="Crashes of a worker or replica after which a job fails. From the third "
        "attempt on it runs alone, so that it cannot fail other jobs.",
    )
    min_replicas: int = Field(
        1, ge=1, description="Fewest replicas of each model; on GPUs one each."
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="Most replicas of each model; their number follows the queued work. Unset: no "
        "autoscaling.",
    )
    target_microbatches_per_replica: float = Field(
        4.0, gt=0, description="Queued and running microbatches per replica."
    )
    replica_idle_timeout_s: float = Field(
        120.0, ge=0, description="Seconds after which an idle replica stops."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Device of the replicas.")
    runner: Literal["torch", "tensorrt"] = Field(
        "torch",
        description="Runtime of the networks; tensorrt needs plans made by python -m compile.",
    )
    compiled_models: str | None = Field(
        None,
        description="Folder of compiled models, or s3://BUCKET/PREFIX, with a folder per model. "
        "Unset: plans/ of the checkout.",
    )
    torch_threads: int | None = Field(
        None, ge=1, description="CPU threads per replica. Unset: all cores shared among them."
    )
    triton_mode: Literal["auto", "inprocess", "subprocess"] = Field(
        "auto", description="How a replica runs Triton; auto: in process if it can be imported."
    )


def load_settings() -> Settings:
    """Read the environment and the secrets directory.

    Exit with code 2 if a value is invalid; the message names the variable and the problem, but not
    the value, which may be a secret.
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
