"""The engine's vocabulary: rows, the events of each row, and the UNet rows that each one costs."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  #: [height, width, 3], RGB


@dataclass(frozen=True)
class Row:
    """One image to generate, in diffusers' words."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    width: int  #: pixels, a multiple of the model's pixels per latent (8)
    height: int
    scheduler: str = "ddim"  #: a key of `schedulers.SCHEDULERS`


def never_canceled() -> Container[int]:
    """Return no row."""
    return ()


@dataclass(eq=False)
class BatchRequest:
    """Rows submitted together; each ends with exactly one Image, RowFailed or Canceled."""

    rows: Sequence[Row]
    canceled: Callable[[], Container[int]] = never_canceled  #: indices of rows to leave out
    unfinished: set[int] = field(init=False)  #: indices of rows without a final event

    def __post_init__(self) -> None:
        self.unfinished = set(range(len(self.rows)))


@dataclass(frozen=True)
class Started:
    """The request is with the model; row `index` waits for room. Sent again while it waits."""

    index: int


@dataclass(frozen=True)
class Step:
    """Row `index` has done `step` of its `steps`."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Image:
    """Row `index` is generated."""

    index: int
    pixels: Pixels


@dataclass(frozen=True)
class RowFailed:
    """Row `index` has no image; the other rows are not affected."""

    index: int
    code: str  #: "invalid_params", "not_finite" or "out_of_memory"
    message: str


@dataclass(frozen=True)
class Canceled:
    """Row `index` was left out because its request asked for it."""

    index: int


RowEvent = Started | Step | Image | RowFailed | Canceled
FinalEvent = Image | RowFailed | Canceled


def is_guided(row: Row) -> bool:
    """Return whether classifier-free guidance applies: diffusers skips it at 1 and below."""
    return row.guidance_scale > 1


def unet_rows(row: Row) -> int:
    """Return the UNet rows of one step: a guided row runs conditionally and unconditionally."""
    return 2 if is_guided(row) else 1


def admit(waiting: Sequence[Row], *, free_unet_rows: int) -> list[int]:
    """Return the positions of the waiting rows that fit now, oldest first.

    An unguided row passes a guided one that does not fit: its UNet row would stay unused otherwise.
    """
    admitted = []
    for position, row in enumerate(waiting):
        if unet_rows(row) <= free_unet_rows:
            admitted.append(position)
            free_unet_rows -= unet_rows(row)
    return admitted
