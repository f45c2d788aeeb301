"""Denoising of running rows: one UNet call a step, whatever scheduler each row uses."""

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
    step_table,
    update_weights,
)


@dataclass(eq=False)
class RunningRow:
    """A row in progress. Mutable: `denoise_step` sets latents, clean and step together."""

    request: BatchRequest
    index: int  #: of the row in its request
    row: Row
    step_table: StepTable
    step: int = 0
    is_prepared: bool = False  #: the four below are set, see `prepare`
    latents: Tensor = field(init=False)  # [C, h, w]
    clean: Tensor = field(init=False)  # the last clean estimate; DPM-Solver++ looks back at it
    prompt: Tensor = field(init=False)  # [tokens, features]
    negative_prompt: Tensor = field(init=False)

    @property
    def coefficients(self) -> StepCoefficients:
        """Coefficients of the next step."""
        return self.step_table.steps[self.step]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.step_table.steps)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height; latents of two sizes cannot share a batch."""
        return self.row.width, self.row.height


def step_table_of(runner: NetworkRunner, row: Row) -> StepTable:
    """Return the row's steps. Raises UnsupportedSchedule for params that this model cannot do."""
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


def prepare(runner: NetworkRunner, rows: Sequence[RunningRow]) -> None:
    """Set each row's initial noise and text embeddings."""
    texts = [text for row in rows for text in (row.row.prompt, row.row.negative_prompt)]
    embeddings = runner.encode(texts)
    for at, row in enumerate(rows):
        noise = _noise(runner, row.row)
        row.latents = noise * row.step_table.initial_scale
        row.clean = torch.zeros_like(noise)
        row.prompt, row.negative_prompt = embeddings[2 * at], embeddings[2 * at + 1]
        row.is_prepared = True


def _noise(runner: NetworkRunner, row: Row) -> Tensor:
    """Return noise from the row's own generator on the CPU: no batch and no device changes it."""
    unit = runner.pixels_per_latent
    shape = (1, runner.latent_channels, row.height // unit, row.width // unit)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(row.seed))
    return noise[0].to(runner.device)


@torch.inference_mode()
def denoise_step(runner: NetworkRunner, rows: Sequence[RunningRow]) -> None:
    """Advance all rows by one step in one UNet call: first unconditional rows, then conditional."""
    guided = [at for at, row in enumerate(rows) if is_guided(row.row)]
    conditional = list(range(len(rows)))
    # When all rows are guided the latents are not repeated: the runner sees that a row's two UNet
    # rows differ by their text only.
    unet_rows = conditional if len(guided) == len(rows) else [*guided, *conditional]
    latents = torch.stack([row.latents for row in rows])
    inputs = _step_inputs(rows, latents)
    scaled = latents * inputs.input_scale
    output = runner.unet(
        scaled if unet_rows == conditional else scaled[unet_rows],
        inputs.timestep if unet_rows == conditional else inputs.timestep[unet_rows],
        torch.stack([rows[at].negative_prompt for at in guided] + [row.prompt for row in rows]),
    )
    output = _guide(output, guided, inputs.guidance_scale)
    last_clean = torch.stack([row.clean for row in rows])
    next_latents, clean = advance(latents, output, last_clean, inputs.weights)
    for row, row_latents, row_clean in zip(rows, next_latents, clean, strict=True):
        row.latents, row.clean, row.step = row_latents, row_clean, row.step + 1


@dataclass(frozen=True)
class _StepInputs:
    """Numbers of the rows' next steps, on the device; [B, 1, 1, 1] where not noted."""

    timestep: Tensor  # [B]
    input_scale: Tensor
    guidance_scale: Tensor
    weights: Tensor  # [B, 5], see `schedulers.advance`


def _step_inputs(rows: Sequence[RunningRow], like: Tensor) -> _StepInputs:
    """Copy the numbers to the device at once, without waiting for its work."""
    table = torch.tensor(
        [
            (step.timestep, step.input_scale, row.row.guidance_scale, *update_weights(step))
            for row in rows
            for step in (row.coefficients,)
        ],
        dtype=like.dtype,
    )
    if like.is_cuda:
        table = table.pin_memory().to(like.device, non_blocking=True)
    columns = table[..., None, None, None]
    return _StepInputs(table[:, 0].clone(), columns[:, 1], columns[:, 2], table[:, 3:])


def _guide(output: Tensor, guided: Sequence[int], scales: Tensor) -> Tensor:
    """Apply classifier-free guidance (Ho & Salimans 2022, equation 6, in diffusers' scale)."""
    unconditional, conditional = output[: len(guided)], output[len(guided) :]
    if len(guided) == len(conditional):
        return unconditional + scales * (conditional - unconditional)
    if not guided:
        return conditional
    combined = conditional.clone()
    rows = list(guided)
    combined[rows] = unconditional + scales[rows] * (conditional[rows] - unconditional)
    return combined
