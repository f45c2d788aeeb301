"""Compiled models in S3: folders in Triton's layout, uploaded and downloaded file by file.

Access uses the AWS_… variables of the environment, as Triton does.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from darkroom.errors import StorageUnavailable
from darkroom.settings import HOME

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_SCHEME: Final = "s3://"
_DIGESTS: Final = "sha256.json"  #: digests of all files; not every store keeps metadata of objects
_RECORD: Final = "engine.json"
_CONFIG: Final = Config(
    connect_timeout=5,
    retries={"mode": "standard", "total_max_attempts": 5},
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path"},
)


def is_url(location: str) -> bool:
    """Return whether the location is in S3."""
    return location.startswith(_SCHEME)


def local_folder(location: str) -> Path:
    """Return the folder itself, or the folder of the local copy of an S3 location."""
    if not is_url(location):
        return Path(location)
    return (
        HOME / ".darkroom" / "plans" / location.removeprefix(_SCHEME).strip("/").replace("/", "_")
    )


def push(folder: Path, url: str) -> int:
    """Upload new and changed files; return how many. Raises StorageUnavailable.

    Records are uploaded last, so that a record implies its plan.
    """
    bucket, prefix = _split(url)
    files = [path for path in folder.rglob("*") if path.is_file()]
    with _translate_errors(url):
        client = _client()
        objects = dict(_list(client, bucket, prefix))
        digests = _digests(client, bucket, prefix) if f"{prefix}{_DIGESTS}" in objects else {}
        uploaded = 0
        for path in sorted(files, key=lambda path: (path.name == _RECORD, path)):
            key, digest = f"{prefix}{path.relative_to(folder).as_posix()}", _sha256(path)
            if key in objects and digests.get(key) == digest:
                continue
            client.upload_file(str(path), bucket, key)
            digests[key] = digest
            uploaded += 1
        client.put_object(
            Bucket=bucket, Key=f"{prefix}{_DIGESTS}", Body=json.dumps(digests).encode()
        )
    return uploaded


def pull(url: str, folder: Path) -> int:
    """Download missing and changed files; return how many. Raises StorageUnavailable."""
    bucket, prefix = _split(url)
    downloaded = 0
    with _translate_errors(url):
        client = _client()
        objects = dict(_list(client, bucket, prefix))
        digests = _digests(client, bucket, prefix) if objects.pop(f"{prefix}{_DIGESTS}", 0) else {}
        for key, size in objects.items():
            path = folder / key.removeprefix(prefix)
            if not path.resolve().is_relative_to(folder.resolve()):
                raise StorageUnavailable(f"{url} contains {key}, which is outside of {folder}")
            same_size = path.is_file() and path.stat().st_size == size
            if same_size and digests.get(key) == _sha256(path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".part")
            client.download_file(bucket, key, str(unfinished))
            unfinished.replace(path)
            downloaded += 1
    return downloaded


def _client() -> "S3Client":
    return boto3.client("s3", config=_CONFIG)


def _split(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix(_SCHEME).partition("/")
    return bucket, f"{prefix.rstrip('/')}/" if prefix else ""


def _list(client: "S3Client", bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            yield entry["Key"], entry["Size"]


def _digests(client: "S3Client", bucket: str, prefix: str) -> dict[str, str]:
    body = client.get_object(Bucket=bucket, Key=f"{prefix}{_DIGESTS}")["Body"].read()
    digests: dict[str, str] = json.loads(body)
    return digests


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _translate_errors:  # noqa: N801  # reads as a verb where it is used
    """Context manager that raises StorageUnavailable for errors of boto3."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BotoCoreError | ClientError | Boto3Error):
            raise StorageUnavailable(f"{self._url}: {error}; check the AWS_… variables") from error
