"""The way from noise to a picture, one row at a time: DDIM, Euler and DPM-Solver++ as tables.

Each of the three is linear in the latents, the UNet's output and the previous clean estimate. So a
row's whole course is a table of numbers, worked out once in double precision, and one step of a
batch in which every row follows another scheduler is three multiplications (`advance`).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

#: What diffusers puts for a terminal SNR of zero where it must divide by it (Euler, DPM-Solver++).
ALMOST_ZERO_SNR: Final = 2.0**-24

#: Below this, diffusers ends DPM-Solver++ with a first-order step wherever it ends.
FEW_STEPS: Final = 15

#: Options of diffusers' schedulers that this module does not draw with. Silence would be wrong.
UNSUPPORTED: Final = (
    "trained_betas",
    "clip_sample",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)


class UnsupportedSchedule(ValueError):
    """The scheduler, its configuration or the number of steps is not one this engine draws with."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much noise the model was trained to see at each timestep, and how to visit them."""

    alphas_cumprod: NDArray[np.float64]  #: [num_train_timesteps], falling from about 1
    prediction_type: PredictionType
    timestep_spacing: TimestepSpacing | None  #: None: each scheduler's own default
    steps_offset: int
    set_alpha_to_one: bool
    rescale_betas_zero_snr: bool
    final_sigmas_type: Literal["zero", "sigma_min"]
    lower_order_final: bool

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """Noise over signal for each timestep; finite also where the SNR is zero."""
        alphas = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            alphas[-1] = ALMOST_ZERO_SNR
        sigmas: NDArray[np.float64] = np.sqrt((1 - alphas) / alphas)
        return sigmas


@dataclass(frozen=True)
class StepCoefficients:
    """One step of one row.

    With x the latents and o the UNet's output for `input_scale` * x:
    x0 = clean_keep * x + clean_push * o, and the next x = keep * x + push * o + recall * last x0.
    """

    timestep: float
    input_scale: float
    keep: float
    push: float
    recall: float
    clean_keep: float
    clean_push: float


@dataclass(frozen=True)
class StepTable:
    """All steps of one row; unit noise times `initial_scale` is where it starts."""

    initial_scale: float
    moves: tuple[StepCoefficients, ...]


def read_noise_schedule(path: Path) -> NoiseSchedule:
    """The schedule in a diffusers scheduler_config.json. Raises UnsupportedSchedule."""
    return noise_schedule(json.loads(path.read_text("utf-8")))


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that a diffusers scheduler configuration describes. Raises UnsupportedSchedule.

    Missing entries take diffusers' defaults, except `clip_sample`: clipping is for pixels, and a
    configuration written for latents by a scheduler that cannot clip does not mention it.
    """
    asked = [option for option in UNSUPPORTED if config.get(option)]
    if asked:
        raise UnsupportedSchedule(f"scheduler options not supported: {', '.join(asked)}")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise UnsupportedSchedule(f"prediction_type {config['prediction_type']!r}")
    if config.get("timestep_spacing") not in (None, "leading", "trailing", "linspace"):
        raise UnsupportedSchedule(f"timestep_spacing {config['timestep_spacing']!r}")
    return NoiseSchedule(
        alphas_cumprod=_alphas_cumprod(config),
        prediction_type=cast("PredictionType", config.get("prediction_type", "epsilon")),
        timestep_spacing=config.get("timestep_spacing"),
        steps_offset=config.get("steps_offset", 0),
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        final_sigmas_type=config.get("final_sigmas_type", "zero"),
        lower_order_final=config.get("lower_order_final", True),
    )


def step_table(schedule: NoiseSchedule, scheduler: str, num_inference_steps: int) -> StepTable:
    """The steps of one row. Raises UnsupportedSchedule, also for a number of steps out of range."""
    if scheduler not in SCHEDULERS:
        raise UnsupportedSchedule(f"scheduler {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
    if not 1 <= num_inference_steps <= schedule.num_train_timesteps:
        raise UnsupportedSchedule(
            f"num_inference_steps must be 1 to {schedule.num_train_timesteps}, "
            f"not {num_inference_steps}"
        )
    return SCHEDULERS[scheduler](schedule, num_inference_steps)


def factors(move: StepCoefficients) -> tuple[float, float, float, float, float]:
    """The move's row of numbers for `advance`."""
    return move.keep, move.push, move.recall, move.clean_keep, move.clean_push


def advance(
    latents: Tensor, output: Tensor, last_clean: Tensor, moves: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of every row. Tensors are [rows, channels, h, w]; `moves` holds each row's factors.

    Returns the next latents and this step's clean estimate, which is the next `last_clean`.
    Row by row: nothing of a row reaches another.
    """
    keep, push, recall, clean_keep, clean_push = moves[..., None, None, None].unbind(1)
    following = keep * latents + push * output + recall * last_clean
    return following, clean_keep * latents + clean_push * output


def _ddim(schedule: NoiseSchedule, steps: int) -> StepTable:
    """Song et al. 2020, equation 12 with sigma (eta) zero."""
    alphas = schedule.alphas_cumprod
    final = 1.0 if schedule.set_alpha_to_one else float(alphas[0])
    stride = schedule.num_train_timesteps // steps
    moves = []
    for timestep in _spaced(schedule, steps, schedule.timestep_spacing or "leading"):
        now = float(alphas[int(timestep)])
        # As in diffusers: one stride back, which with "trailing" is not quite the next timestep.
        before = int(timestep) - stride
        then = float(alphas[before]) if before >= 0 else final
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        fade = math.sqrt(1 - then) / noise
        clean = _clean(schedule.prediction_type, signal, noise)
        moves.append(_move(timestep, 1.0, fade, math.sqrt(then) - signal * fade, 0.0, clean))
    return StepTable(1.0, tuple(moves))


def _euler(schedule: NoiseSchedule, steps: int) -> StepTable:
    """Karras et al. 2022, algorithm 2 without churn: a straight line towards the clean estimate."""
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":  # not rounded: the time embedding takes fractions
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, steps)[::-1]
    else:
        timesteps = _spaced(schedule, steps, spacing)
    sigmas = _visited(schedule, timesteps)
    moves = []
    for timestep, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
        signal, noise = _signal_and_noise(sigma)
        keep, push = _clean(schedule.prediction_type, signal, noise)
        ratio = following / sigma
        # The latents here are not scaled to unit variance: the UNet's input is, hence x0's x too.
        moves.append(_move(timestep, signal, ratio, 1 - ratio, 0.0, (keep * signal, push)))
    first = max(sigmas)
    return StepTable(math.hypot(first, 1) if spacing == "leading" else first, tuple(moves))


def _dpm_solver_pp_2m(schedule: NoiseSchedule, steps: int) -> StepTable:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, the midpoint form."""
    timesteps = _spaced_dpm(schedule, steps, schedule.timestep_spacing or "linspace")
    sigmas = _visited(schedule, timesteps)
    # First order where there is no past, and at the end where it would be unstable, as diffusers.
    careful_end = schedule.final_sigmas_type == "zero" or (
        schedule.lower_order_final and len(timesteps) < FEW_STEPS
    )
    moves = []
    for at, timestep in enumerate(timesteps):
        signal, noise = _signal_and_noise(sigmas[at])
        next_signal, next_noise = _signal_and_noise(sigmas[at + 1])
        # exp(-h), with lambda = log(signal / noise) = -log(sigma); a final sigma of 0 needs no log.
        toward = next_signal * (1 - sigmas[at + 1] / sigmas[at])
        recall = 0.0
        if at > 0 and not (careful_end and at == len(timesteps) - 1):
            h = math.log(sigmas[at] / sigmas[at + 1])
            last_h = math.log(sigmas[at - 1] / sigmas[at])
            # Near a thousand steps "leading" may visit the last timestep twice: no slope to take.
            recall = -0.5 * toward * h / last_h if last_h else 0.0
        clean = _clean(schedule.prediction_type, signal, noise)
        moves.append(_move(timestep, 1.0, next_noise / noise, toward - recall, recall, clean))
    return StepTable(1.0, tuple(moves))


SCHEDULERS: Final[Mapping[str, Callable[[NoiseSchedule, int], StepTable]]] = {
    "ddim": _ddim,
    "euler": _euler,
    "dpmsolver++": _dpm_solver_pp_2m,
}


def _move(
    timestep: float,
    input_scale: float,
    keep: float,
    toward: float,
    recall: float,
    clean: tuple[float, float],
) -> StepCoefficients:
    """Fold x' = keep * x + toward * x0 + recall * last x0, where x0 is linear in x and output."""
    clean_keep, clean_push = clean
    return StepCoefficients(
        timestep=float(timestep),
        input_scale=input_scale,
        keep=keep + toward * clean_keep,
        push=toward * clean_push,
        recall=recall,
        clean_keep=clean_keep,
        clean_push=clean_push,
    )


def _clean(prediction_type: PredictionType, signal: float, noise: float) -> tuple[float, float]:
    """Factors of x and of the UNet's output in x0, for x = signal * x0 + noise * eps.

    v-prediction is Salimans & Ho 2022, appendix D: v = signal * eps - noise * x0.
    """
    if prediction_type == "v_prediction":
        return signal, -noise
    if signal == 0:
        raise UnsupportedSchedule("epsilon says nothing about the picture at zero SNR; use Euler")
    return 1 / signal, -noise / signal


def _signal_and_noise(sigma: float) -> tuple[float, float]:
    signal = 1 / math.hypot(sigma, 1)
    return signal, sigma * signal


def _visited(schedule: NoiseSchedule, timesteps: NDArray[np.float64]) -> list[float]:
    """The sigma at each timestep, and the one to end on."""
    known = schedule.sigmas
    sigmas = np.interp(timesteps, np.arange(len(known)), known)
    final = 0.0 if schedule.final_sigmas_type == "zero" else float(known[0])
    return [*(float(sigma) for sigma in sigmas), final]


def _spaced(schedule: NoiseSchedule, steps: int, spacing: TimestepSpacing) -> NDArray[np.float64]:
    """Whole timesteps, falling. Lin et al. 2023, table 2, rounded as diffusers rounds."""
    total = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1]
    if spacing == "leading":
        return _leading(np.arange(steps) * (total // steps), schedule)
    # [:steps] because floating point can make one more, at timestep -1
    falling: NDArray[np.float64] = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    return falling


def _spaced_dpm(
    schedule: NoiseSchedule, steps: int, spacing: TimestepSpacing
) -> NDArray[np.float64]:
    """As `_spaced`, but leaving out the last of one more step: it ends above timestep 0."""
    total = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    if spacing == "leading":
        return _leading(np.arange(1, steps + 1) * (total // (steps + 1)), schedule)
    return _spaced(schedule, steps, spacing)


def _leading(rising: NDArray[Any], schedule: NoiseSchedule) -> NDArray[np.float64]:
    shifted = rising[::-1] + float(schedule.steps_offset)
    within: NDArray[np.float64] = np.minimum(shifted, schedule.num_train_timesteps - 1)
    return within


def _alphas_cumprod(config: Mapping[str, Any]) -> NDArray[np.float64]:
    """In single precision on purpose: these are the numbers that models were trained with."""
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    total = config.get("num_train_timesteps", 1000)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = torch.linspace(start, end, total, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    else:
        raise UnsupportedSchedule(f"beta_schedule {kind!r}")
    if config.get("rescale_betas_zero_snr", False):
        betas = _rescaled_to_zero_snr(betas)
    return cast("NDArray[np.float64]", torch.cumprod(1 - betas, dim=0).double().numpy())


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1: shift and scale sqrt(alpha bar) so that it ends at zero."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alphas_bar = ((signal - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return 1 - alphas
