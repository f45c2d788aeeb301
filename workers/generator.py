"""The seam between a worker and whatever draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from darkroom.params import GenerationParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Picture:
    """One drawn image: `pixels` are uint8 [height, width, 3]."""

    pixels: "npt.NDArray[np.uint8]"
    inference_ms: int


@dataclass(frozen=True)
class Mishap:
    """Why one job of the microbatch could not be drawn; the others are not affected."""

    code: str
    message: str


Drawing: TypeAlias = Picture | Mishap


class GenerateCall(Protocol):
    """A microbatch under way."""

    def result(self, timeout_s: float) -> Sequence[Drawing]:
        """One drawing for each job, in order.

        Raises GeneratorUnavailable when nothing was drawn through no fault of the jobs, and
        MicrobatchCrashed when one of them may have killed the replica or hung it.
        """

    def cancel(self) -> None:
        """Stop drawing; nobody wants the result any more."""


class ImageGenerator(Protocol):
    """Draws microbatches. All jobs of one call have the same microbatch key."""

    def connect(self) -> None:
        """Once, in the main thread, before the first call. Raises when nobody can be reached."""

    def begin(self, microbatch: Sequence[GenerationParams]) -> GenerateCall:
        """Hand the microbatch over. Raises GeneratorUnavailable."""
