"""A batch's pictures as one ZIP file, made while it is read: memory stays flat at any size."""

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

MISSING: Final = "missing.txt"  #: in the archive, when pictures should be there and are not
_AHEAD: Final = 8  # pictures that are fetched before they are wanted
_MODE: Final = S_IFREG | 0o644


def as_zip(sessions: Sessions, batch: Batch, store: ImageStore) -> Iterator[bytes]:
    """The pictures drawn so far, in the order of their rows.

    Pictures are not compressed again. Raises StorageUnavailable when the store is out of reach.
    """
    return iter(stream_zip(_members(sessions, batch, store)))


def _members(sessions: Sessions, batch: Batch, store: ImageStore) -> Iterator[MemberFile]:
    missing = []
    drawn = manifest.jobs_of(sessions, batch, drawn=True)
    for job, picture in map_ordered(partial(_fetch, store), drawn, threads=_AHEAD):
        name = manifest.file_name(job, batch)
        if picture is None:
            missing.append(f"{name}\t{job.id}\n")
        else:
            yield _member(name, job.finished_at, picture)
    if missing:
        why = "These should be here, but the store has lost or altered them:\n\n"
        yield _member(MISSING, None, (why + "".join(missing)).encode())


def _member(name: str, at: datetime | None, content: bytes) -> MemberFile:
    return name, at or datetime.now(UTC), _MODE, NO_COMPRESSION_64, (content,)


def _fetch(store: ImageStore, job: Job) -> bytes | None:
    """None for what is not there, or not what was drawn: never a wrong picture."""
    assert job.image_key is not None
    try:
        picture = store.get(job.image_key)
    except ImageVanished:
        return None
    return picture if hashlib.sha256(picture).hexdigest() == job.image_sha256 else None
