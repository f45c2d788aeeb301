"""What is asked of the engine, what it answers, and which rows of the UNet that costs."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  #: [height, width, 3], RGB


@dataclass(frozen=True)
class Row:
    """One picture to draw, in diffusers' words."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    width: int  #: pixels, a multiple of the model's pixels per latent (8)
    height: int
    scheduler: str = "ddim"  #: a key of `schedulers.SCHEDULERS`


def _never_canceled() -> Container[int]:
    return ()


@dataclass(eq=False)
class BatchRequest:
    """Rows that are asked for together; each ends in exactly one Picture or Mishap."""

    rows: Sequence[Row]
    withdrawn: Callable[[], Container[int]] = (
        _never_canceled  #: which are not to be drawn any further
    )
    left: set[int] = field(init=False)  #: those that have not ended yet

    def __post_init__(self) -> None:
        self.left = set(range(len(self.rows)))


@dataclass(frozen=True)
class Step:
    """Row `index` has done `step` of its `steps`; none, while it waits for a seat."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Image:
    """Row `index` is drawn."""

    index: int
    pixels: Pixels


@dataclass(frozen=True)
class RowFailed:
    """Row `index` will have no picture; the other rows are not concerned."""

    index: int
    code: str  #: "invalid_params", "not_finite", "out_of_memory" or "canceled"
    message: str


Event = Step | Image | RowFailed


def is_guided(row: Row) -> bool:
    """Whether classifier-free guidance does anything: at 1 and below, diffusers leaves it out."""
    return row.guidance_scale > 1


def unet_rows(row: Row) -> int:
    """What a row costs in each step: a guided one is seen with and without its prompt."""
    return 2 if is_guided(row) else 1


def admit(waiting: Sequence[Row], *, free_unet_rows: int) -> list[int]:
    """Positions of the waiting rows that may start now, oldest first.

    A narrow row passes a wide one that does not fit: its seat would stay empty otherwise.
    """
    admitted = []
    for position, row in enumerate(waiting):
        if unet_rows(row) <= free_unet_rows:
            admitted.append(position)
            free_unet_rows -= unet_rows(row)
    return admitted
