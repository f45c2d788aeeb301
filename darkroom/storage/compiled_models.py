"""Compiled models in S3: a folder of Triton's layout, sent and fetched file by file.

Reached as Triton itself reaches it: with the AWS_… variables of the environment.
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
_DIGESTS: Final = "sha256.json"  #: of every file; not every store keeps metadata of objects
_RECORD: Final = "engine.json"
_CONFIG: Final = Config(
    connect_timeout=5,
    retries={"mode": "standard", "total_max_attempts": 5},
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path"},
)


def is_url(place: str) -> bool:
    """Whether it is in S3."""
    return place.startswith(_SCHEME)


def local_folder(place: str) -> Path:
    """The folder itself, or where the copy of what is in S3 is kept."""
    if not is_url(place):
        return Path(place)
    return HOME / ".darkroom" / "plans" / place.removeprefix(_SCHEME).strip("/").replace("/", "_")


def push(folder: Path, url: str) -> int:
    """Send what is new or changed; how many files. Raises StorageUnavailable.

    Records go last: whoever sees one finds its plan.
    """
    bucket, prefix = _parted(url)
    files = [path for path in folder.rglob("*") if path.is_file()]
    with _translated(url):
        client = _client()
        there = dict(_listed(client, bucket, prefix))
        digests = _digests(client, bucket, prefix) if f"{prefix}{_DIGESTS}" in there else {}
        sent = 0
        for path in sorted(files, key=lambda path: (path.name == _RECORD, path)):
            key, digest = f"{prefix}{path.relative_to(folder).as_posix()}", _sha256(path)
            if key in there and digests.get(key) == digest:
                continue
            client.upload_file(str(path), bucket, key)
            digests[key] = digest
            sent += 1
        client.put_object(
            Bucket=bucket, Key=f"{prefix}{_DIGESTS}", Body=json.dumps(digests).encode()
        )
    return sent


def pull(url: str, folder: Path) -> int:
    """Fetch what is missing or differs; how many files. Raises StorageUnavailable."""
    bucket, prefix = _parted(url)
    fetched = 0
    with _translated(url):
        client = _client()
        there = dict(_listed(client, bucket, prefix))
        digests = _digests(client, bucket, prefix) if there.pop(f"{prefix}{_DIGESTS}", 0) else {}
        for key, size in there.items():
            path = folder / key.removeprefix(prefix)
            if not path.resolve().is_relative_to(folder.resolve()):
                raise StorageUnavailable(f"{url} holds {key}, which leads out of {folder}")
            is_like = path.is_file() and path.stat().st_size == size
            if is_like and digests.get(key) == _sha256(path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".part")
            client.download_file(bucket, key, str(unfinished))
            unfinished.replace(path)
            fetched += 1
    return fetched


def _client() -> "S3Client":
    return boto3.client("s3", config=_CONFIG)


def _parted(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix(_SCHEME).partition("/")
    return bucket, f"{prefix.rstrip('/')}/" if prefix else ""


def _listed(client: "S3Client", bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
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


class _translated:  # noqa: N801  # reads as a verb where it is used
    """Turns boto3's errors into ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BotoCoreError | ClientError | Boto3Error):
            raise StorageUnavailable(
                f"{self._url}: {error}; the AWS_… variables say how it is reached"
            ) from error
