"""Errors, named for what happened; the edges (HTTP, CLI, tasks) translate each once."""

from dataclasses import dataclass
from datetime import datetime


class DarkroomError(Exception):
    """Base of everything this project raises on purpose."""


@dataclass(frozen=True)
class InputProblem:
    """Problem with one field of the client's input."""

    loc: tuple[str | int, ...]  #: e.g. ("body", "width") or ("row", 3, "steps")
    code: str
    message: str


class InvalidInput(DarkroomError):
    """The client's input is invalid; nothing was created."""

    def __init__(self, problems: list[InputProblem], *, total: int | None = None) -> None:
        super().__init__("; ".join(problem.message for problem in problems[:3]))
        self.problems = problems
        self.total = (
            len(problems) if total is None else total
        )  #: `problems` holds the first of them


class NotFound(DarkroomError):
    """The tenant has no such object."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"no {kind} {object_id[:64]!r}")
        self.kind = kind


class Deleted(DarkroomError):
    """The object was deleted; only a tombstone is left."""

    def __init__(self, kind: str, object_id: str, deleted_at: datetime) -> None:
        super().__init__(f"{kind} {object_id} was deleted at {deleted_at:%Y-%m-%dT%H:%M:%SZ}")
        self.kind = kind
        self.object_id = object_id
        self.deleted_at = deleted_at


class JobNotFinished(DarkroomError):
    """The job is queued or running, and the request needs a finished one."""


class NothingToRetry(DarkroomError):
    """The job succeeded, or the batch has no failed job."""


class ImageNotReady(DarkroomError):
    """The job has no image: it has not succeeded (yet)."""


class Overloaded(DarkroomError):
    """Too many requests are pending; nothing was accepted."""


class Draining(DarkroomError):
    """An operator is draining the queue; nothing was accepted."""

    def __init__(self) -> None:
        super().__init__(
            "the server is draining: it finishes its jobs and accepts no new ones; try again later"
        )


class ImageVanished(DarkroomError):
    """The object of an image is missing from the store, or differs from the one stored."""


class StorageUnavailable(DarkroomError):
    """The object store is unreachable or refused; a later attempt may succeed."""


class GeneratorUnavailable(DarkroomError):
    """No replica could generate the microbatch, for a fault that is not its jobs'."""


class GeneratorGone(GeneratorUnavailable):
    """The Ray cluster is unreachable; this process must restart to connect again."""


class MicrobatchCrashed(DarkroomError):
    """The replica died during generation; one of the microbatch's jobs may be the cause."""


class MicrobatchCanceled(DarkroomError):
    """The worker itself canceled the microbatch."""


class SetupError(DarkroomError):
    """The machine or configuration is unsuitable; the message names the remedy."""
