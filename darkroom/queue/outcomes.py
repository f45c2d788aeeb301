"""Outcomes of a claimed job, which `darkroom.queue.dispatches` turns into status changes."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class RequeueReason(StrEnum):
    """Why a job goes back to the queue; decides its backoff and whether the attempt counts."""

    UNAVAILABLE = "unavailable"  #: the store or a replica failed: backoff, no attempt is counted
    RELEASED = "released"  #: the worker stops: claimable at once, no attempt is counted
    CRASHED = "crashed"  #: the replica or worker died: at once, with fewer others, one attempt


@dataclass(frozen=True)
class Succeeded:
    """Job whose image is in the store."""

    job_id: str
    image_key: str
    image_sha256: str
    image_bytes: int
    inference_ms: int
    upload_ms: int


@dataclass(frozen=True)
class Failed:
    """Job that cannot be generated; the rest of its microbatch is not affected."""

    job_id: str
    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True)
class Requeued:
    """Job that goes back to the queue."""

    job_id: str
    reason: RequeueReason
    isolation_group: str = ""  #: after a crash: the job shares a microbatch only with this group


Outcome: TypeAlias = Succeeded | Failed | Requeued
