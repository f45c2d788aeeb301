"""How the claim of a job can end: values that `darkroom.dispatches.settle` turns into moves."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Succeeded:
    """The job's image is in the store."""

    job_id: str
    image_key: str
    image_sha256: str
    image_bytes: int
    inference_ms: int
    upload_ms: int


@dataclass(frozen=True)
class Failed:
    """The job itself cannot be drawn; its company is not affected."""

    job_id: str
    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True)
class SentBack:
    """Something around the job broke. It waits its backoff out and loses no attempt."""

    job_id: str


@dataclass(frozen=True)
class HandedBack:
    """Its worker leaves before it was drawn. It may go on at once and loses no attempt."""

    job_id: str


@dataclass(frozen=True)
class Suspect:
    """Its replica or worker died over its microbatch: it is drawn again, in smaller company."""

    job_id: str
    isolation_group: str


Outcome: TypeAlias = Succeeded | Failed | SentBack | HandedBack | Suspect
