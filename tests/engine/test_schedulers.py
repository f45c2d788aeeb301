"""Each row's steps against diffusers' own scheduler, on a made-up UNet."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.schedulers import (
    NoiseSchedule,
    StepCoefficients,
    StepTable,
    UnsupportedSchedule,
    advance,
    noise_schedule,
    step_table,
    update_weights,
)

DIFFUSERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
DEMO = Path(__file__).parents[2] / "models/darkroom-demo/scheduler/scheduler_config.json"

configs = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "steps_offset": st.sampled_from([0, 1]),
        "set_alpha_to_one": st.booleans(),
        "rescale_betas_zero_snr": st.booleans(),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    }
)


def made_up_unet(sample: Tensor, timestep: float) -> Tensor:
    """Return something smooth that depends on both inputs."""
    return torch.tanh(sample) * 0.7 + 0.3 * torch.cos(torch.tensor(timestep / 300))


def weights(*steps: StepCoefficients) -> Tensor:
    return torch.tensor([update_weights(step) for step in steps])


def noise() -> Tensor:
    return torch.randn((1, 4, 3, 3), generator=torch.Generator().manual_seed(7))


def denoise(table: StepTable) -> Tensor:
    latents = noise() * table.initial_scale
    clean = torch.zeros_like(latents)
    for step in table.steps:
        output = made_up_unet(latents * step.input_scale, step.timestep)
        latents, clean = advance(latents, output, clean, weights(step))
    return latents


def denoise_with_diffusers(scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    latents = noise() * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = made_up_unet(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


def assert_same(ours: Tensor, theirs: Tensor, table: StepTable) -> None:
    """Compare within 1e-4, plus diffusers' float32 error where Euler starts at 4096 times noise."""
    lost = table.initial_scale * torch.finfo(torch.float32).eps
    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * size + lost)


@pytest.mark.parametrize("scheduler", DIFFUSERS)
@settings(max_examples=60, deadline=None)
@given(config=configs, steps=st.integers(1, 50))
def test_the_last_latents_are_those_of_diffusers(scheduler, config, steps):
    blind = config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon"
    assume(not (scheduler == "ddim" and blind))  # diffusers divides by zero there
    config = STABLE_DIFFUSION | config

    table = step_table(noise_schedule(config), scheduler, steps)
    ours = denoise(table)
    theirs = denoise_with_diffusers(DIFFUSERS[scheduler].from_config(config), steps)

    assert bool(ours.isfinite().all())
    assert_same(ours, theirs, table)


@pytest.mark.parametrize("scheduler", DIFFUSERS)
@pytest.mark.parametrize("steps", [1, 2, 14, 15, 50])
def test_the_demo_model_is_finite_from_zero_snr(scheduler, steps):
    config = json.loads(DEMO.read_text())
    table = step_table(noise_schedule(config), scheduler, steps)
    ours = denoise(table)
    theirs = denoise_with_diffusers(DIFFUSERS[scheduler].from_config(config), steps)

    assert_same(ours, theirs, table)


@pytest.mark.parametrize("scheduler", DIFFUSERS)
def test_each_scheduler_keeps_its_own_default_spacing(scheduler):
    ours = step_table(noise_schedule(STABLE_DIFFUSION), scheduler, 7)
    theirs = DIFFUSERS[scheduler].from_config(STABLE_DIFFUSION)
    theirs.set_timesteps(7)

    np.testing.assert_allclose([step.timestep for step in ours.steps], theirs.timesteps.numpy())


@settings(max_examples=200, deadline=None)
@given(
    scheduler=st.sampled_from(sorted(DIFFUSERS)),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    steps=st.integers(1, 1000),
)
def test_a_step_table_has_the_requested_steps_in_falling_order(scheduler, spacing, steps):
    schedule = noise_schedule(STABLE_DIFFUSION | {"timestep_spacing": spacing, "steps_offset": 1})
    timesteps = [step.timestep for step in step_table(schedule, scheduler, steps).steps]

    assert len(timesteps) == steps
    assert all(0 <= timestep <= 999 for timestep in timesteps)
    assert timesteps == sorted(timesteps, reverse=True)


def test_rows_with_different_schedulers_do_not_affect_each_other():
    schedule = noise_schedule(STABLE_DIFFUSION)
    courses = [step_table(schedule, name, 9) for name in DIFFUSERS]
    steps = [table.steps[4] for table in courses]
    latents, output, clean = torch.randn((3, 3, 4, 2, 2)).unbind(0)

    together, together_clean = advance(latents, output, clean, weights(*steps))

    for at, step in enumerate(steps):
        only = slice(at, at + 1)
        alone, alone_clean = advance(latents[only], output[only], clean[only], weights(step))
        assert torch.equal(together[only], alone)
        assert torch.equal(together_clean[only], alone_clean)


def epsilon_at_zero_snr() -> NoiseSchedule:
    return noise_schedule(
        STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    )


@pytest.mark.parametrize(
    ("schedule", "scheduler", "steps"),
    [
        (noise_schedule(STABLE_DIFFUSION), "plms", 10),
        (noise_schedule(STABLE_DIFFUSION), "ddim", 0),
        (noise_schedule(STABLE_DIFFUSION), "euler", 1001),
        (epsilon_at_zero_snr(), "ddim", 10),
    ],
)
def test_unsupported_steps_are_rejected(schedule, scheduler, steps):
    with pytest.raises(UnsupportedSchedule):
        step_table(schedule, scheduler, steps)


@pytest.mark.parametrize(
    "option",
    [
        {"clip_sample": True},
        {"use_karras_sigmas": True},
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "random"},
    ],
)
def test_an_unsupported_configuration_is_rejected(option):
    with pytest.raises(UnsupportedSchedule):
        noise_schedule(STABLE_DIFFUSION | option)
