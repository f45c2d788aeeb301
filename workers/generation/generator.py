"""Seam between a worker and the models that generate."""

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
    """Generated image: `pixels` are uint8 [height, width, 3]."""

    pixels: "npt.NDArray[np.uint8]"
    inference_ms: int


@dataclass(frozen=True)
class RowFailed:
    """Failure of one job; the others of its microbatch are not affected."""

    code: str
    message: str


@dataclass(frozen=True)
class Canceled:
    """Job left out, as asked by `GenerateCall.cancel_rows`."""


@dataclass(frozen=True)
class OutOfMemory:
    """Job for which there was not enough memory beside the others; fewer may fit."""


RowResult: TypeAlias = Image | RowFailed | Canceled | OutOfMemory


@dataclass(frozen=True)
class Accepted:
    """A replica has the microbatch, and may have to generate another one first."""


@dataclass(frozen=True)
class Started:
    """Generation has started: a crash of the replica may be due to these jobs from now on.

    Repeated now and then while none of the jobs has a row beside those generated already.
    """


@dataclass(frozen=True)
class Progress:
    """Steps done, by index in the microbatch, of the jobs that have advanced."""

    steps: Mapping[int, Steps]


@dataclass(frozen=True)
class Finished:
    """Result of the job at this index of the microbatch."""

    index: int
    result: RowResult


GenerationEvent: TypeAlias = Accepted | Started | Progress | Finished


class GenerateCall(Protocol):
    """Microbatch being generated. Any thread may call any method but `events`."""

    def events(self, *, timeout_s: float, step_timeout_s: float) -> Iterator[GenerationEvent]:
        """Yield events as they happen: exactly one Finished for each job, in any order.

        `timeout_s` bounds the wait for Started, and then the generation from the last Started on;
        `step_timeout_s` the time between two events of the generation. Raises GeneratorUnavailable
        for a failure that is not the jobs', MicrobatchCrashed when one of the unfinished jobs may
        have killed or hung the replica, and MicrobatchCanceled after `cancel`.
        """

    def cancel_rows(self, indices: Collection[int]) -> None:
        """Cancel some jobs. A call may come too early or be lost: repeat it until they finish."""

    def cancel(self) -> None:
        """Cancel the whole microbatch."""


class ImageGenerator(Protocol):
    """Generator of microbatches. All jobs of one call have the same microbatch key."""

    def connect(self) -> None:
        """Connect, in the main thread, before the first call. Raises if that fails."""

    def start(self, microbatch: Sequence[GenerationParams], *, alone: bool = False) -> GenerateCall:
        """Send the microbatch to a replica. Raises GeneratorUnavailable.

        `alone`: generate it beside no other, because one of its jobs may crash the replica.
        """
