"""One row on its way from noise to a picture, and the step that all who sit together take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.requests import BatchRequest, Row, is_guided
from engine.runner import NetworkRunner
from engine.schedulers import (
    StepCoefficients,
    StepTable,
    UnsupportedSchedule,
    advance,
    factors,
    step_table,
)


@dataclass(eq=False)
class RunningRow:
    """A row on its way. Not frozen: latents, clean and step move together, in `step_together`."""

    call: BatchRequest
    index: int  #: of the row in its call
    row: Row
    step_table: StepTable
    step: int = 0
    is_ready: bool = False  #: the four below are there, see `make_ready`
    latents: Tensor = field(init=False)  # [C, h, w]
    clean: Tensor = field(init=False)  # the last clean estimate; DPM-Solver++ looks back at it
    prompt: Tensor = field(init=False)  # [tokens, features]
    negative_prompt: Tensor = field(init=False)

    @property
    def move(self) -> StepCoefficients:
        """Of its next step."""
        return self.step_table.moves[self.step]

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.step_table.moves)

    @property
    def size(self) -> tuple[int, int]:
        """Latents of two sizes have no common batch."""
        return self.row.width, self.row.height


def step_table_of(runner: NetworkRunner, row: Row) -> StepTable:
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
    return step_table(runner.noise_schedule, row.scheduler, row.num_inference_steps)


def make_ready(runner: NetworkRunner, seats: Sequence[RunningRow]) -> None:
    """Give each row its own noise, and its texts as the UNet reads them."""
    texts = [text for seat in seats for text in (seat.row.prompt, seat.row.negative_prompt)]
    embeddings = runner.encode(texts)
    for at, seat in enumerate(seats):
        noise = _noise(runner, seat.row)
        seat.latents = noise * seat.step_table.initial_scale
        seat.clean = torch.zeros_like(noise)
        seat.prompt, seat.negative_prompt = embeddings[2 * at], embeddings[2 * at + 1]
        seat.is_ready = True


def _noise(runner: NetworkRunner, row: Row) -> Tensor:
    """From a generator of the row's own, on the CPU: no company and no device changes it."""
    unit = runner.pixels_per_latent
    shape = (1, runner.latent_channels, row.height // unit, row.width // unit)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(row.seed))
    return noise[0].to(runner.device)


@torch.inference_mode()
def step_together(runner: NetworkRunner, seats: Sequence[RunningRow]) -> None:
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


def _numbers(seats: Sequence[RunningRow], like: Tensor) -> _Numbers:
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
