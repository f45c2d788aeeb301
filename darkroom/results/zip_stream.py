"""ZIP archive of a batch's images, made while it is read: memory is constant at any size."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from stat import S_IFREG
from typing import Final

from stream_zip import NO_COMPRESSION_64, MemberFile, stream_zip

from darkroom.db.connection import Sessions
from darkroom.db.tables import Batch, Job
from darkroom.errors import ImageVanished
from darkroom.prefetch import map_ordered
from darkroom.results import manifest
from darkroom.storage.images import ImageStore

MISSING: Final = "missing.txt"  #: member that lists the images that the store has lost
_PREFETCHED: Final = 8  # images fetched in parallel, ahead of the client
_MODE: Final = S_IFREG | 0o644


def as_zip(sessions: Sessions, batch: Batch, store: ImageStore) -> Iterator[bytes]:
    """Yield an archive of the images generated so far, in row order, without recompression.

    Raise StorageUnavailable if the store cannot be reached.
    """
    return iter(stream_zip(_members(sessions, batch, store)))


def _members(sessions: Sessions, batch: Batch, store: ImageStore) -> Iterator[MemberFile]:
    missing = []
    jobs = manifest.jobs_of(sessions, batch, with_image=True)
    for job, image in map_ordered(partial(_fetch, store), jobs, threads=_PREFETCHED):
        name = manifest.file_name(job, batch)
        if image is None:
            missing.append(f"{name}\t{job.id}\n")
        else:
            yield _member(name, job.finished_at, image)
    if missing:
        title = "Images that the store has lost or altered:\n\n"
        yield _member(MISSING, None, (title + "".join(missing)).encode())


def _member(name: str, at: datetime | None, content: bytes) -> MemberFile:
    return name, at or datetime.now(UTC), _MODE, NO_COMPRESSION_64, (content,)


def _fetch(store: ImageStore, job: Job) -> bytes | None:
    """Return the image, or None if it is missing or its checksum differs."""
    assert job.image_key is not None
    try:
        image = store.get(job.image_key)
    except ImageVanished:
        return None
    return image if hashlib.sha256(image).hexdigest() == job.image_sha256 else None
