"""The denoise loop: rows in, events out. Each row goes its own way through shared UNet batches."""

import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.rows import (
    Event,
    Mishap,
    Picture,
    Row,
    Step,
    admit,
    is_guided,
    unet_rows,
)
from engine.runner import Decoding, NetworkRunner
from engine.schedulers import (
    Course,
    Move,
    UnsupportedSchedule,
    advance,
    course,
    factors,
)

GUIDED_UNET_ROWS: Final = 2
DECODED_TOGETHER: Final = 4  # pictures at a time: the VAE's activations dwarf the UNet's

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Seat:
    """A row on its way. Not frozen: latents, clean estimate and step move together, in `_step`."""

    index: int
    row: Row
    course: Course
    latents: Tensor  # [C, h, w]
    clean: Tensor  # the last step's clean estimate; DPM-Solver++ looks back at it
    prompt: Tensor  # [tokens, features]
    negative_prompt: Tensor
    step: int = 0

    @property
    def move(self) -> Move:
        return self.course.moves[self.step]

    @property
    def steps(self) -> int:
        return len(self.course.moves)


@dataclass(frozen=True, eq=False)
class _Developing:
    """Rows that have done all their steps, and are being decoded."""

    indices: list[int]
    decoding: Decoding


def _nobody() -> Container[int]:
    return ()


def draw(
    runner: NetworkRunner,
    rows: Sequence[Row],
    *,
    max_unet_rows: int,
    withdrawn: Callable[[], Container[int]] = _nobody,
) -> Iterator[Event]:
    """Draw the rows together, at most `max_unet_rows` UNet rows in a step.

    Every row ends in exactly one Picture or Mishap, as soon as it is done; a Step follows each of
    its steps. `withdrawn` is asked before each step which rows are not to be drawn any further. A
    picture is the same in any company, up to rounding: one grey level of 255 in float32 on CPU.
    When the device's memory does not suffice, whoever has not ended yet ends in a Mishap that says
    so: fewer rows together may fit.

    Raises ValueError when not even one guided row may run, and what the networks raise.
    """
    if max_unet_rows < GUIDED_UNET_ROWS:
        raise ValueError(
            f"max_unet_rows is {max_unet_rows}; one guided row takes {GUIDED_UNET_ROWS}"
        )
    left = dict(enumerate(rows))
    try:
        for event in _drawn(runner, rows, max_unet_rows, withdrawn):
            if not isinstance(event, Step):
                del left[event.index]
            yield event
    except torch.OutOfMemoryError as error:
        shortage = str(error)
    else:
        return
    # Not inside `except`: there, the error keeps the frames alive whose tensors fill the memory.
    torch.cuda.empty_cache()
    logger.warning("%d rows together do not fit into memory: %s", len(rows), shortage)
    yield from (Mishap(index, "out_of_memory", "it does not fit into memory") for index in left)


def _drawn(
    runner: NetworkRunner,
    rows: Sequence[Row],
    max_unet_rows: int,
    withdrawn: Callable[[], Container[int]],
) -> Iterator[Event]:
    courses: dict[int, Course] = {}
    gone = withdrawn()
    for index, row in enumerate(rows):
        if index in gone:  # before anything was done for it
            yield _canceled(index)
            continue
        try:
            courses[index] = _course(runner, row)
        except UnsupportedSchedule as refusal:
            yield Mishap(index, "invalid_params", str(refusal))
    # Latents of two sizes have no common batch: one size after the other.
    for size in dict.fromkeys((rows[index].width, rows[index].height) for index in courses):
        company = [index for index in courses if (rows[index].width, rows[index].height) == size]
        waiting = _seated(runner, {index: (rows[index], courses[index]) for index in company})
        yield from _denoise(runner, waiting, max_unet_rows, withdrawn)


def _canceled(index: int) -> Mishap:
    return Mishap(index, "canceled", "canceled while drawing")


def _course(runner: NetworkRunner, row: Row) -> Course:
    """The row's steps. Raises UnsupportedSchedule for whatever this row asks that cannot be."""
    unit = runner.pixels_per_latent
    if row.width < unit or row.height < unit or row.width % unit or row.height % unit:
        raise UnsupportedSchedule(
            f"width and height must be positive multiples of {unit}, not {row.width}x{row.height}"
        )
    if runner.sizes is not None and (row.width, row.height) not in runner.sizes:
        known = ", ".join(f"{width}x{height}" for width, height in sorted(runner.sizes))
        raise UnsupportedSchedule(
            f"the model was compiled for {known}, not {row.width}x{row.height}"
        )
    if not math.isfinite(row.guidance_scale):
        raise UnsupportedSchedule(f"guidance_scale must be finite, not {row.guidance_scale}")
    return course(runner.noise_schedule, row.scheduler, row.num_inference_steps)


def _seated(runner: NetworkRunner, company: Mapping[int, tuple[Row, Course]]) -> list[_Seat]:
    """Rows of one size, each with its own noise and its texts as the UNet reads them."""
    texts = [text for row, _ in company.values() for text in (row.prompt, row.negative_prompt)]
    embeddings = runner.encode(texts)
    seats = []
    for at, (index, (row, way)) in enumerate(company.items()):
        noise = _noise(runner, row)
        prompt, negative_prompt = embeddings[2 * at], embeddings[2 * at + 1]
        seats.append(
            _Seat(
                index=index,
                row=row,
                course=way,
                latents=noise * way.initial_scale,
                clean=torch.zeros_like(noise),
                prompt=prompt,
                negative_prompt=negative_prompt,
            )
        )
    return seats


def _noise(runner: NetworkRunner, row: Row) -> Tensor:
    """From a generator of the row's own, on the CPU: no company and no device changes it."""
    unit = runner.pixels_per_latent
    shape = (1, runner.latent_channels, row.height // unit, row.width // unit)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(row.seed))
    return noise[0].to(runner.device)


def _denoise(
    runner: NetworkRunner,
    waiting: list[_Seat],
    max_unet_rows: int,
    withdrawn: Callable[[], Container[int]],
) -> Iterator[Event]:
    running: list[_Seat] = []
    developing: list[_Developing] = []
    while running or waiting:
        gone = withdrawn()
        yield from (_canceled(seat.index) for seat in (*running, *waiting) if seat.index in gone)
        running = [seat for seat in running if seat.index not in gone]
        waiting = [seat for seat in waiting if seat.index not in gone]

        free = max_unet_rows - sum(unet_rows(seat.row) for seat in running)
        admitted = admit([seat.row for seat in waiting], free_unet_rows=free)
        running += [waiting[position] for position in admitted]
        waiting = [seat for at, seat in enumerate(waiting) if at not in admitted]
        if running:
            _step(runner, running)
        yield from (Step(seat.index, seat.step, seat.steps) for seat in running)
        developing += _begun(runner, [seat for seat in running if seat.step == seat.steps])
        running = [seat for seat in running if seat.step < seat.steps]
        # With nobody left to step for, there is nothing better to do than to wait for pictures.
        ready = [one for one in developing if one.decoding.done() or not running]
        developing = [one for one in developing if one not in ready]
        yield from (event for one in ready for event in _developed(one))


@torch.inference_mode()
def _step(runner: NetworkRunner, seats: Sequence[_Seat]) -> None:
    """One UNet call, and everybody one step on. The lanes: guided rows unprompted, then all."""
    guided = [at for at, seat in enumerate(seats) if is_guided(seat.row)]
    everybody = list(range(len(seats)))
    # Where all are guided the runner knows that the two lanes of a row differ by their text only.
    seen = everybody if len(guided) == len(seats) else [*guided, *everybody]
    latents = torch.stack([seat.latents for seat in seats])
    numbers = _numbers(seats, latents)
    inputs = latents * numbers.input_scale
    output = runner.unet(
        inputs if seen == everybody else inputs[seen],
        numbers.timestep if seen == everybody else numbers.timestep[seen],
        torch.stack([seats[at].negative_prompt for at in guided] + [seat.prompt for seat in seats]),
    )
    output = _guide(output, guided, numbers.guidance_scale)
    last_clean = torch.stack([seat.clean for seat in seats])
    following, clean = advance(latents, output, last_clean, numbers.moves)
    for seat, its_latents, its_clean in zip(seats, following, clean, strict=True):
        seat.latents, seat.clean, seat.step = its_latents, its_clean, seat.step + 1


@dataclass(frozen=True)
class _Numbers:
    """What the rows' steps are made of, on the device; [B, 1, 1, 1] where not said."""

    timestep: Tensor  # [B]
    input_scale: Tensor
    guidance_scale: Tensor
    moves: Tensor  # [B, 5], see `schedulers.advance`


def _numbers(seats: Sequence[_Seat], like: Tensor) -> _Numbers:
    """In one copy, which the device's work need not be waited for."""
    table = torch.tensor(
        [
            (move.timestep, move.input_scale, seat.row.guidance_scale, *factors(move))
            for seat in seats
            for move in (seat.move,)
        ],
        dtype=like.dtype,
    )
    if like.is_cuda:
        table = table.pin_memory().to(like.device, non_blocking=True)
    columns = table[..., None, None, None]
    return _Numbers(table[:, 0].clone(), columns[:, 1], columns[:, 2], table[:, 3:])


def _guide(output: Tensor, guided: Sequence[int], scales: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6, in diffusers' scale)."""
    unprompted, prompted = output[: len(guided)], output[len(guided) :]
    if len(guided) == len(prompted):
        return unprompted + scales * (prompted - unprompted)
    if not guided:
        return prompted
    steered = prompted.clone()
    rows = list(guided)
    steered[rows] = unprompted + scales[rows] * (prompted[rows] - unprompted)
    return steered


def _begun(runner: NetworkRunner, done: Sequence[_Seat]) -> Iterator[_Developing]:
    """Start to decode the latents of rows that are through."""
    for first in range(0, len(done), DECODED_TOGETHER):
        chunk = done[first : first + DECODED_TOGETHER]
        decoding = runner.decode(torch.stack([seat.latents for seat in chunk]))
        yield _Developing([seat.index for seat in chunk], decoding)


def _developed(developing: _Developing) -> Iterator[Picture | Mishap]:
    """The pictures. One that is not a number is said so, never shown."""
    pictures = developing.decoding.pictures()
    for index, pixels in zip(developing.indices, pictures, strict=True):
        if pixels is None:
            yield Mishap(index, "not_finite", "the numbers of this picture overflowed")
            continue
        yield Picture(index, pixels)
