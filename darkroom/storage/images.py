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

# Small and few: the queue itself retries, so a dead store should be noticed within seconds.
_CLIENT: Final = Config(
    signature_version="s3v4",  # boto3 still presigns with version 2 for endpoints of other makers
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
    """An object of the store."""

    key: str
    modified_at: datetime  #: by the store's clock


class ImageStore(Protocol):
    """Where finished images go. Keys are ours, never the client's."""

    def put(self, key: str, image: bytes, content_type: str) -> None:
        """Store the object, whole or not at all. Raises StorageUnavailable."""

    def presign(self, key: str, *, ttl_s: int) -> str:
        """A URL that reads the object without a key, for so many seconds."""

    def get(self, key: str) -> bytes:
        """The object. Raises ImageVanished when there is none, or StorageUnavailable."""

    def delete(self, key: str) -> None:
        """Remove the object; that there is none is as good. Raises StorageUnavailable."""

    def page(self, *, after: str, limit: int) -> list[Stored]:
        """The objects whose keys follow `after`, in the order of the keys.

        None only when none follows. Raises StorageUnavailable.
        """

    def check(self) -> None:
        """Raises StorageUnavailable unless the bucket answers."""


class S3Store:
    """An ImageStore in one bucket."""

    def __init__(self, settings: Settings) -> None:
        self._bucket = settings.s3_bucket
        self._client = _client(settings, settings.s3_endpoint_url)
        self._public = _client(settings, settings.s3_public_url or settings.s3_endpoint_url)

    def put(self, key: str, image: bytes, content_type: str) -> None:
        """See ImageStore. boto3 tries three times; an error does not mean `not written`."""
        try:
            self._client.put_object(
                Bucket=self._bucket, Key=key, Body=image, ContentType=content_type
            )
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"could not store {key}: {error}") from error

    def presign(self, key: str, *, ttl_s: int) -> str:
        """See ImageStore. Signs locally; nothing is asked of the store."""
        return self._public.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=ttl_s
        )

    def get(self, key: str) -> bytes:
        """See ImageStore."""
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=key)
            return found["Body"].read()
        except self._client.exceptions.NoSuchKey as error:
            raise ImageVanished(f"there is no object {key}") from error
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
            found = self._client.list_objects_v2(
                Bucket=self._bucket, StartAfter=after, MaxKeys=limit
            )
        except (BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"could not list the bucket: {error}") from error
        return [Stored(each["Key"], each["LastModified"]) for each in found.get("Contents", [])]

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
    """Holds the dispatch, so that a late worker's upload never overwrites the winner's."""
    return f"{tenant_id}/{job_id}/{dispatch_id}.{extension}"
