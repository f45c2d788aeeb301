"""The seam between a worker and whatever draws."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from darkroom.generation.params import GenerationParams
from darkroom.jobs.progress import Steps

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Image:
    """One drawn image: `pixels` are uint8 [height, width, 3]."""

    pixels: "npt.NDArray[np.uint8]"
    inference_ms: int


@dataclass(frozen=True)
class RowFailed:
    """Why one job of the microbatch could not be drawn; the others are not affected."""

    code: str
    message: str


@dataclass(frozen=True)
class Canceled:
    """It was left out, as asked by `GenerateCall.withdraw`."""


@dataclass(frozen=True)
class OutOfMemory:
    """There was not enough memory for so many together; fewer may fit."""


RowResult: TypeAlias = Image | RowFailed | Canceled | OutOfMemory


@dataclass(frozen=True)
class Accepted:
    """A replica has the microbatch; another one may have to be drawn before it."""


@dataclass(frozen=True)
class Started:
    """The microbatch's turn has come: what happens to the replica now may be its jobs' doing.

    Said again now and then while none of its jobs has a seat beside those who are drawn already.
    """


@dataclass(frozen=True)
class Progress:
    """Where the jobs are by now, by their place in the microbatch; those that have moved."""

    steps: Mapping[int, Steps]


@dataclass(frozen=True)
class Finished:
    """The job at this place of the microbatch is done with."""

    index: int
    drawing: RowResult


GenerationEvent: TypeAlias = Accepted | Started | Progress | Finished


class GenerateCall(Protocol):
    """A microbatch under way. Every method but `happenings` may be called from any thread."""

    def happenings(self, *, timeout_s: float, step_timeout_s: float) -> Iterator[GenerationEvent]:
        """What becomes of the jobs, as it happens: exactly one Finished for each, in any order.

        `timeout_s` bounds the waiting for its turn, and then the drawing, from the last Begun on;
        `step_timeout_s` the time between two happenings of the drawing. Raises GeneratorUnavailable
        when it was not drawn through no fault of the jobs, MicrobatchCrashed when one of those not
        yet finished may have killed the replica or hung it, and MicrobatchCanceled after `cancel`.
        """

    def withdraw(self, indices: Collection[int]) -> None:
        """Do not draw these any further. May come too early or be lost: say it until it is so."""

    def cancel(self) -> None:
        """Stop drawing; nobody wants the result any more."""


class ImageGenerator(Protocol):
    """Draws microbatches. All jobs of one call have the same microbatch key."""

    def connect(self) -> None:
        """Once, in the main thread, before the first call. Raises when nobody can be reached."""

    def begin(self, microbatch: Sequence[GenerationParams], *, alone: bool = False) -> GenerateCall:
        """Hand the microbatch over. Raises GeneratorUnavailable.

        `alone`: it must not be drawn beside others, because one of its jobs may be deadly.
        """
