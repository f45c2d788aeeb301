"""What can go wrong, named for what happened. Edges (HTTP, CLI, tasks) translate these once."""

from dataclasses import dataclass
from datetime import datetime


class DarkroomError(Exception):
    """Base of everything this project raises on purpose."""


@dataclass(frozen=True)
class InputProblem:
    """One thing wrong with what the client sent, and where."""

    loc: tuple[str | int, ...]  #: e.g. ("body", "width") or ("row", 3, "steps")
    code: str
    message: str


class InvalidInput(DarkroomError):
    """What the client sent cannot be accepted; nothing was created."""

    def __init__(self, problems: list[InputProblem], *, total: int | None = None) -> None:
        super().__init__("; ".join(problem.message for problem in problems[:3]))
        self.problems = problems
        self.total = len(problems) if total is None else total  #: of which `problems` are the first


class NotFound(DarkroomError):
    """There is no such object for this tenant."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"no {kind} {object_id[:64]!r}")
        self.kind = kind


class Deleted(DarkroomError):
    """There was such an object; its owner deleted it, and this is all that is left."""

    def __init__(self, kind: str, object_id: str, deleted_at: datetime) -> None:
        super().__init__(f"{kind} {object_id} was deleted at {deleted_at:%Y-%m-%dT%H:%M:%SZ}")
        self.kind = kind
        self.object_id = object_id
        self.deleted_at = deleted_at


class JobNotFinished(DarkroomError):
    """The job is queued or running, and what was asked is for jobs that have ended."""


class NothingToRetry(DarkroomError):
    """There is no end here that another try could change."""


class ImageNotReady(DarkroomError):
    """The job has no image: it has not succeeded (yet)."""


class Overloaded(DarkroomError):
    """More came in than can be taken on now; nothing was accepted."""


class Draining(DarkroomError):
    """An operator has it finish what it has; nothing was accepted."""

    def __init__(self) -> None:
        super().__init__("the server finishes what it has and accepts nothing new; try again later")


class ImageVanished(DarkroomError):
    """The store has no such object, though a row says so; or it is not what was stored."""


class StorageUnavailable(DarkroomError):
    """The object store could not be reached or refused; trying later may help."""


class GeneratorUnavailable(DarkroomError):
    """The replica could not draw the microbatch, through no fault of its jobs."""


class GeneratorGone(GeneratorUnavailable):
    """The whole Ray cluster is out of reach; this process must be started anew to reconnect."""


class MicrobatchCrashed(DarkroomError):
    """The replica died while drawing: one of the microbatch's jobs may be why."""


class MicrobatchCanceled(DarkroomError):
    """The worker itself gave the microbatch up: nobody wants it from here any more."""


class SetupError(DarkroomError):
    """This machine or configuration cannot run what was asked; the message says what to do."""
