"""What can go wrong, named for what happened. Edges (HTTP, CLI, tasks) translate these once."""

from dataclasses import dataclass


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

    def __init__(self, problems: list[InputProblem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems[:3]))
        self.problems = problems


class NotFound(DarkroomError):
    """There is no such object for this tenant."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"no {kind} {object_id[:64]!r}")
        self.kind = kind


class ImageNotReady(DarkroomError):
    """The job has no image: it has not succeeded (yet)."""


class StorageUnavailable(DarkroomError):
    """The object store could not be reached or refused; trying later may help."""


class GeneratorUnavailable(DarkroomError):
    """The replica could not draw the microbatch, through no fault of its jobs."""


class GeneratorGone(GeneratorUnavailable):
    """The whole Ray cluster is out of reach; this process must be started anew to reconnect."""


class MicrobatchCrashed(DarkroomError):
    """The replica died while drawing: one of the microbatch's jobs may be why."""


class SetupError(DarkroomError):
    """This machine or configuration cannot run what was asked; the message says what to do."""
