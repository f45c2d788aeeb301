"""Images in S3-compatible storage."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from darkroom.errors import ImageVanished, StorageUnavailable
from darkroom.settings import Settings

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

# Short timeouts, few retries: the queue itself retries, so an outage must show within seconds.
_CLIENT: Final = Config(
    signature_version="s3v4",  # boto3 still presigns with version 2 for endpoints other than AWS
    connect_timeout=2,
    read_timeout=10,
    retries={"mode": "standard", "total_max_attempts": 3},
    max_pool_connections=32,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path"},
)


@dataclass(frozen=True)
class Stored:
    """Object of the store."""

    key: str
    modified_at: datetime  #: by the store's clock


class ImageStore(Protocol):
    """Store of images. Keys are ours, never the client's."""

    def put(self, key: str, image: bytes, content_type: str) -> None:
        """Store the object completely or not at all. Raises StorageUnavailable."""

    def presign(self, key: str, *, ttl_s: int) -> str:
        """Return a URL that reads the object without credentials for `ttl_s` seconds."""

    def get(self, key: str) -> bytes:
        """Return the object. Raises ImageVanished if there is none, StorageUnavailable."""

    def delete(self, key: str) -> None:
        """Remove the object if it exists. Raises StorageUnavailable."""

    def page(self, *, after: str, limit: int) -> list[Stored]:
        """Return objects whose keys follow `after`, in key order.

        Empty only if none follows. Raises StorageUnavailable.
        """

    def check(self) -> None:
        """Check that the bucket answers. Raises StorageUnavailable."""


class S3Store:
    """ImageStore in one S3 bucket."""

    def __init__(self, settings: Settings) -> None:
        self._bucket = settings.s3_bucket
        self._client = _client(settings, settings.s3_endpoint_url)
        self._public = _client(settings, settings.s3_public_url or settings.s3_endpoint_url)

    def put(self, key: str, image: bytes, content_type: str) -> None:
        """See ImageStore. boto3 tries three times; after an error the object may exist."""
        try:
            self._client.put_object(
                Bucket=self._bucket, Key=key, Body=image, ContentType=content_type
            )
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"could not store {key}: {error}") from error

    def presign(self, key: str, *, ttl_s: int) -> str:
        """See ImageStore. Signs locally, without a request."""
        return self._public.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=ttl_s
        )

    def get(self, key: str) -> bytes:
        """See ImageStore."""
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=key)
            return found["Body"].read()
        except self._client.exceptions.NoSuchKey as error:
            raise ImageVanished(f"object {key} does not exist") from error
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"could not read {key}: {error}") from error

    def delete(self, key: str) -> None:
        """See ImageStore."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"could not delete {key}: {error}") from error

    def page(self, *, after: str, limit: int) -> list[Stored]:
        """See ImageStore."""
        try:
            page = self._client.list_objects_v2(
                Bucket=self._bucket, StartAfter=after, MaxKeys=limit
            )
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"could not list the bucket: {error}") from error
        return [Stored(each["Key"], each["LastModified"]) for each in page.get("Contents", [])]

    def check(self) -> None:
        """See ImageStore."""
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"bucket {self._bucket}: {error}") from error


def _client(settings: Settings, endpoint: str | None) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id.get_secret_value() or None,
        aws_secret_access_key=settings.s3_secret_access_key.get_secret_value() or None,
        config=_CLIENT,
    )


def image_key(tenant_id: str, job_id: str, dispatch_id: int, extension: str) -> str:
    """Return the key of an image; the dispatch id keeps late workers from overwriting it."""
    return f"{tenant_id}/{job_id}/{dispatch_id}.{extension}"
