"""DDIM, Euler and DPM-Solver++ as tables of coefficients, one table for each row.

Each of the three is linear in the latents, the UNet's output and the previous clean estimate. So
all steps of a row are a table of numbers, computed once in double precision, and one step of a
batch in which every row uses another scheduler is three multiplications (`advance`).
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

#: diffusers' substitute for a terminal SNR of zero where it divides by it (Euler, DPM-Solver++).
ALMOST_ZERO_SNR: Final = 2.0**-24

#: Below this, diffusers always ends DPM-Solver++ with a first-order step.
FEW_STEPS: Final = 15

#: Options of diffusers' schedulers that this module rejects: ignoring them gives wrong images.
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
    """The engine does not support this scheduler, its configuration or the number of steps."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise of each timestep in training, and how inference selects timesteps."""

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
        """Number of timesteps in training."""
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """Noise-to-signal ratio of each timestep; finite also where the SNR is zero."""
        alphas = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            alphas[-1] = ALMOST_ZERO_SNR
        sigmas: NDArray[np.float64] = np.sqrt((1 - alphas) / alphas)
        return sigmas


@dataclass(frozen=True)
class StepCoefficients:
    """One step of one row.

    With x the latents and o the UNet's output for `input_scale` * x, the clean estimate is
    x0 = clean_sample_weight * x + clean_output_weight * o, and the next
    x = sample_weight * x + output_weight * o + last_clean_weight * last x0.
    """

    timestep: float
    input_scale: float
    sample_weight: float
    output_weight: float
    last_clean_weight: float
    clean_sample_weight: float
    clean_output_weight: float


@dataclass(frozen=True)
class StepTable:
    """All steps of one row, which starts from unit noise times `initial_scale`."""

    initial_scale: float
    steps: tuple[StepCoefficients, ...]


def read_noise_schedule(path: Path) -> NoiseSchedule:
    """Read a diffusers scheduler_config.json. Raises UnsupportedSchedule."""
    return noise_schedule(json.loads(path.read_text("utf-8")))


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the schedule of a diffusers scheduler configuration. Raises UnsupportedSchedule.

    Missing entries take diffusers' defaults, except `clip_sample`: clipping is for pixels, and a
    configuration written for latents by a scheduler that cannot clip does not mention it.
    """
    unsupported = [option for option in UNSUPPORTED if config.get(option)]
    if unsupported:
        raise UnsupportedSchedule(f"scheduler options not supported: {', '.join(unsupported)}")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise UnsupportedSchedule(f"prediction_type {config['prediction_type']!r} is not supported")
    if config.get("timestep_spacing") not in (None, "leading", "trailing", "linspace"):
        raise UnsupportedSchedule(
            f"timestep_spacing {config['timestep_spacing']!r} is not supported"
        )
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
    """Return the steps of one row. Raises UnsupportedSchedule, also for steps out of range."""
    if scheduler not in SCHEDULERS:
        raise UnsupportedSchedule(f"scheduler {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
    if not 1 <= num_inference_steps <= schedule.num_train_timesteps:
        raise UnsupportedSchedule(
            f"num_inference_steps must be 1 to {schedule.num_train_timesteps}, "
            f"not {num_inference_steps}"
        )
    return SCHEDULERS[scheduler](schedule, num_inference_steps)


def update_weights(step: StepCoefficients) -> tuple[float, float, float, float, float]:
    """Return the step's row of `weights` for `advance`."""
    return (
        step.sample_weight,
        step.output_weight,
        step.last_clean_weight,
        step.clean_sample_weight,
        step.clean_output_weight,
    )


def advance(
    latents: Tensor, output: Tensor, last_clean: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance every row by one step. Tensors are [rows, channels, h, w], `weights` [rows, 5].

    Returns the next latents and this step's clean estimate, which is the next `last_clean`.
    Rows do not affect each other.
    """
    columns = weights[..., None, None, None].unbind(1)
    of_sample, of_output, of_last_clean, clean_of_sample, clean_of_output = columns
    next_latents = of_sample * latents + of_output * output + of_last_clean * last_clean
    return next_latents, clean_of_sample * latents + clean_of_output * output


def _ddim(schedule: NoiseSchedule, steps: int) -> StepTable:
    """Return DDIM's steps: Song et al. 2020, equation 12 with sigma (eta) zero."""
    alphas = schedule.alphas_cumprod
    final = 1.0 if schedule.set_alpha_to_one else float(alphas[0])
    stride = schedule.num_train_timesteps // steps
    table = []
    for timestep in _spaced(schedule, steps, schedule.timestep_spacing or "leading"):
        now = float(alphas[int(timestep)])
        # As in diffusers: one stride back, which with "trailing" is not quite the next timestep.
        before = int(timestep) - stride
        then = float(alphas[before]) if before >= 0 else final
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        noise_ratio = math.sqrt(1 - then) / noise
        clean = _clean(schedule.prediction_type, signal, noise)
        toward = math.sqrt(then) - signal * noise_ratio
        table.append(_step(timestep, 1.0, noise_ratio, toward, 0.0, clean))
    return StepTable(1.0, tuple(table))


def _euler(schedule: NoiseSchedule, steps: int) -> StepTable:
    """Return Euler's steps: Karras et al. 2022, algorithm 2 without churn."""
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":  # not rounded: the time embedding takes fractions
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, steps)[::-1]
    else:
        timesteps = _spaced(schedule, steps, spacing)
    sigmas = _sigmas_at(schedule, timesteps)
    table = []
    for timestep, sigma, next_sigma in zip(timesteps, sigmas, sigmas[1:], strict=False):
        signal, noise = _signal_and_noise(sigma)
        of_sample, of_output = _clean(schedule.prediction_type, signal, noise)
        ratio = next_sigma / sigma
        # The latents here are not scaled to unit variance: the UNet's input is, hence x0's x too.
        clean = of_sample * signal, of_output
        table.append(_step(timestep, signal, ratio, 1 - ratio, 0.0, clean))
    first = max(sigmas)
    return StepTable(math.hypot(first, 1) if spacing == "leading" else first, tuple(table))


def _dpm_solver_pp_2m(schedule: NoiseSchedule, steps: int) -> StepTable:
    """Return DPM-Solver++ 2M's steps: Lu et al. 2022, algorithm 2, the midpoint form."""
    timesteps = _spaced_dpm(schedule, steps, schedule.timestep_spacing or "linspace")
    sigmas = _sigmas_at(schedule, timesteps)
    # First order at the first step, and at the end where second is unstable, as diffusers.
    first_order_end = schedule.final_sigmas_type == "zero" or (
        schedule.lower_order_final and len(timesteps) < FEW_STEPS
    )
    table = []
    for at, timestep in enumerate(timesteps):
        signal, noise = _signal_and_noise(sigmas[at])
        next_signal, next_noise = _signal_and_noise(sigmas[at + 1])
        # exp(-h), with lambda = log(signal / noise) = -log(sigma); a final sigma of 0 needs no log.
        toward = next_signal * (1 - sigmas[at + 1] / sigmas[at])
        last_weight = 0.0
        if at > 0 and not (first_order_end and at == len(timesteps) - 1):
            h = math.log(sigmas[at] / sigmas[at + 1])
            last_h = math.log(sigmas[at - 1] / sigmas[at])
            # Near a thousand steps "leading" may visit the last timestep twice: no slope to take.
            last_weight = -0.5 * toward * h / last_h if last_h else 0.0
        clean = _clean(schedule.prediction_type, signal, noise)
        ratio = next_noise / noise
        table.append(_step(timestep, 1.0, ratio, toward - last_weight, last_weight, clean))
    return StepTable(1.0, tuple(table))


SCHEDULERS: Final[Mapping[str, Callable[[NoiseSchedule, int], StepTable]]] = {
    "ddim": _ddim,
    "euler": _euler,
    "dpmsolver++": _dpm_solver_pp_2m,
}


def _step(
    timestep: float,
    input_scale: float,
    sample: float,
    toward: float,
    last_clean: float,
    clean: tuple[float, float],
) -> StepCoefficients:
    """Fold x' = sample * x + toward * x0 + last_clean * last x0; x0 is linear in x and output."""
    clean_sample, clean_output = clean
    return StepCoefficients(
        timestep=float(timestep),
        input_scale=input_scale,
        sample_weight=sample + toward * clean_sample,
        output_weight=toward * clean_output,
        last_clean_weight=last_clean,
        clean_sample_weight=clean_sample,
        clean_output_weight=clean_output,
    )


def _clean(prediction_type: PredictionType, signal: float, noise: float) -> tuple[float, float]:
    """Return the weights of x and the UNet's output in x0, for x = signal * x0 + noise * eps.

    v-prediction is Salimans & Ho 2022, appendix D: v = signal * eps - noise * x0.
    """
    if prediction_type == "v_prediction":
        return signal, -noise
    if signal == 0:
        raise UnsupportedSchedule(
            "epsilon prediction is undefined at zero SNR; use the euler scheduler"
        )
    return 1 / signal, -noise / signal


def _signal_and_noise(sigma: float) -> tuple[float, float]:
    signal = 1 / math.hypot(sigma, 1)
    return signal, sigma * signal


def _sigmas_at(schedule: NoiseSchedule, timesteps: NDArray[np.float64]) -> list[float]:
    """Return the sigma at each timestep, and the final one."""
    known = schedule.sigmas
    sigmas = np.interp(timesteps, np.arange(len(known)), known)
    final = 0.0 if schedule.final_sigmas_type == "zero" else float(known[0])
    return [*(float(sigma) for sigma in sigmas), final]


def _spaced(schedule: NoiseSchedule, steps: int, spacing: TimestepSpacing) -> NDArray[np.float64]:
    """Return whole timesteps, falling: Lin et al. 2023, table 2, rounded as in diffusers."""
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
    """Return `_spaced` of one more step, without its last: it ends above timestep 0."""
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
    """Compute in single precision on purpose: models were trained with these numbers."""
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    total = config.get("num_train_timesteps", 1000)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = torch.linspace(start, end, total, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    else:
        raise UnsupportedSchedule(f"beta_schedule {kind!r} is not supported")
    if config.get("rescale_betas_zero_snr", False):
        betas = _rescaled_to_zero_snr(betas)
    return cast("NDArray[np.float64]", torch.cumprod(1 - betas, dim=0).double().numpy())


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha bar) to end at zero: Lin et al. 2023, algorithm 1."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alphas_bar = ((signal - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return 1 - alphas
