"""Every setting, read once at the start of a process and handed on.

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
    """One field per variable; `.env.example` lists them all (a test compares the two)."""

    model_config = SettingsConfigDict(
        env_prefix="DARKROOM_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    database_url: SecretStr = Field(
        SecretStr("postgresql://darkroom@127.0.0.1:5432/darkroom"),
        description="PostgreSQL, as a libpq URL. Holds every job; the only state that matters.",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey. Carries doorbells only; may be flushed at any moment.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="S3 endpoint that workers and the API call; unset means AWS."
    )
    s3_public_url: str | None = Field(
        None, description="Endpoint put into image URLs, when clients reach S3 by another name."
    )
    s3_region: str = Field("us-east-1", description="Region used in signatures.")
    s3_bucket: str = Field("darkroom", description="Bucket that holds the images.")
    s3_access_key_id: SecretStr = Field(SecretStr(""), description="S3 key id.")
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="S3 secret key.")
    retention_days: int | None = Field(
        None,
        ge=1,
        description="Days after its end at which a job's picture and prompt are deleted, where "
        "neither its batch nor its tenant says otherwise; unset keeps them.",
    )
    orphan_retention_h: float = Field(
        24,
        ge=1,
        description="Hours after which an image that no job knows of is removed from the bucket; "
        "far longer than an upload waits for its row.",
    )
    image_url_ttl_s: int = Field(
        900, ge=1, le=604_800, description="Seconds a presigned image URL is valid."
    )

    api_host: str = Field("127.0.0.1", description="Address the API listens on.")
    api_port: int = Field(8000, ge=0, le=65_535, description="Port the API listens on.")
    auth: Literal["on", "off"] = Field(
        "on",
        description="Whether requests need an API key. `off` is for development: the API then "
        "refuses to listen anywhere but on loopback.",
    )
    max_upload_bytes: int = Field(64 * 2**20, description="Largest batch file, in bytes.")
    max_upload_rows: int = Field(100_000, description="Most rows of one batch file.")
    max_batch_jobs: int = Field(
        500_000, ge=1, description="Most jobs of one batch; `num_images` and sweeps multiply rows."
    )

    models_dir: Path = Field(
        HOME / "models", description="Folder of models: each a diffusers folder + darkroom.toml."
    )
    default_model: str = Field("darkroom-demo", description="Model of a job that names none.")

    webhook_allow_private: bool = Field(
        False,
        description="For development: webhooks may go to loopback and private networks, over plain "
        "HTTP, to any port. Metadata services stay closed.",
    )
    webhook_denylist: str = Field(
        "",
        description="Networks and names that no webhook may reach, separated by commas: your own "
        "public addresses, a NAT64 prefix, names that lead inside.",
    )
    webhook_encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="Any long random text. Seals the signing secrets in the database; empty keeps "
        "them as they are. To replace it, put the new one before the old one and a comma.",
    )
    webhook_signing_key: SecretStr = Field(
        SecretStr(""),
        description="An ed25519 key, whsk_…; if set, webhooks carry a `v1a` signature as well. To "
        "replace it, put the new one before the old one and a comma.",
    )
    webhook_ca_file: Path | None = Field(
        None, description="PEM file of authorities to trust, besides the system's, for receivers."
    )
    webhook_timeout_s: float = Field(
        15, gt=0, le=60, description="Seconds of one attempt: name, connection, TLS and answer."
    )
    webhook_max_connections: int = Field(
        2000, ge=16, description="Most attempts that one sender has in flight."
    )
    webhook_max_endpoints: int = Field(
        2000, ge=1, description="Most webhook endpoints of one tenant."
    )

    ray_address: str = Field("127.0.0.1:6380", description="GCS address of the Ray cluster.")
    worker_concurrency: int = Field(
        2, ge=1, description="Microbatches a worker keeps in flight, so that a replica never idles."
    )
    lease_s: float = Field(
        30, gt=0, description="Seconds a dispatch stays claimed without a heartbeat."
    )
    maintenance_interval_s: float = Field(5, gt=0, description="Seconds between two sweeps.")
    microbatch_timeout_s: float = Field(
        600, gt=0, description="Longest one microbatch may take in the replica, in seconds."
    )
    step_timeout_s: float = Field(
        60,
        gt=0,
        description="Longest a model may draw without finishing a step, in seconds; then it hangs.",
    )
    shutdown_grace_s: float = Field(
        5,
        ge=0,
        description="Seconds that a worker which is told to stop goes on drawing; what is not done "
        "by then is handed to others.",
    )
    max_attempts: int = Field(
        3,
        ge=3,
        description="Crashes that a job may be there at before it fails; from the third on it is "
        "drawn alone, so that fewer would fail innocent company.",
    )
    min_replicas: int = Field(
        1, ge=1, description="Replicas of each model at least; on GPUs one each."
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="Replicas of each model at most: between the two, their number follows the "
        "queued work. Unset: it stays what it is.",
    )
    target_microbatches_per_replica: float = Field(
        4.0, gt=0, description="Microbatches, queued or under way, that one replica is enough for."
    )
    replica_idle_timeout_s: float = Field(
        120.0, ge=0, description="Seconds that a replica may be one too many before it is ended."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where replicas draw.")
    runner: Literal["torch", "tensorrt"] = Field(
        "torch",
        description="What executes the networks; tensorrt needs plans made by python -m compile.",
    )
    compiled_models: str | None = Field(
        None,
        description="Compiled models, each a folder of its name: a folder, or s3://BUCKET/PREFIX; "
        "unset means plans/ of the checkout.",
    )
    torch_threads: int | None = Field(
        None, ge=1, description="CPU threads of one replica; unset shares all cores among them."
    )
    triton_mode: Literal["auto", "inprocess", "subprocess"] = Field(
        "auto", description="How a replica runs Triton; auto takes in process where it imports."
    )


def load_settings() -> Settings:
    """Read the environment and the secrets directory, at the start of a process.

    Where a value cannot be used there is no process: its message says which variable, and why,
    but not the value, which may be a secret.
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
