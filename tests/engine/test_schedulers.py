"""Each row's course against diffusers' own scheduler, on a made-up UNet."""

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
    factors,
    noise_schedule,
    step_table,
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
    """Anything smooth that depends on both of its inputs."""
    return torch.tanh(sample) * 0.7 + 0.3 * torch.cos(torch.tensor(timestep / 300))


def table(*moves: StepCoefficients) -> Tensor:
    return torch.tensor([factors(move) for move in moves])


def noise() -> Tensor:
    return torch.randn((1, 4, 3, 3), generator=torch.Generator().manual_seed(7))


def drawn(way: StepTable) -> Tensor:
    latents = noise() * way.initial_scale
    clean = torch.zeros_like(latents)
    for move in way.moves:
        output = made_up_unet(latents * move.input_scale, move.timestep)
        latents, clean = advance(latents, output, clean, table(move))
    return latents


def drawn_by_diffusers(scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    latents = noise() * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = made_up_unet(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


def assert_same(ours: Tensor, theirs: Tensor, way: StepTable) -> None:
    """Within 1e-4, plus what diffusers' float32 loses where Euler starts at 4096 times noise."""
    lost = way.initial_scale * torch.finfo(torch.float32).eps
    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * size + lost)


@pytest.mark.parametrize("scheduler", DIFFUSERS)
@settings(max_examples=60, deadline=None)
@given(config=configs, steps=st.integers(1, 50))
def test_a_course_ends_where_diffusers_ends(scheduler, config, steps):
    blind = config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon"
    assume(not (scheduler == "ddim" and blind))  # diffusers divides by zero there
    config = STABLE_DIFFUSION | config

    way = step_table(noise_schedule(config), scheduler, steps)
    ours = drawn(way)
    theirs = drawn_by_diffusers(DIFFUSERS[scheduler].from_config(config), steps)

    assert bool(ours.isfinite().all())
    assert_same(ours, theirs, way)


@pytest.mark.parametrize("scheduler", DIFFUSERS)
@pytest.mark.parametrize("steps", [1, 2, 14, 15, 50])
def test_the_demo_model_is_finite_from_zero_snr(scheduler, steps):
    config = json.loads(DEMO.read_text())
    way = step_table(noise_schedule(config), scheduler, steps)
    ours = drawn(way)
    theirs = drawn_by_diffusers(DIFFUSERS[scheduler].from_config(config), steps)

    assert_same(ours, theirs, way)


@pytest.mark.parametrize("scheduler", DIFFUSERS)
def test_each_scheduler_keeps_its_own_default_spacing(scheduler):
    ours = step_table(noise_schedule(STABLE_DIFFUSION), scheduler, 7)
    theirs = DIFFUSERS[scheduler].from_config(STABLE_DIFFUSION)
    theirs.set_timesteps(7)

    np.testing.assert_allclose([move.timestep for move in ours.moves], theirs.timesteps.numpy())


@settings(max_examples=200, deadline=None)
@given(
    scheduler=st.sampled_from(sorted(DIFFUSERS)),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    steps=st.integers(1, 1000),
)
def test_a_course_has_as_many_steps_as_asked_and_falls(scheduler, spacing, steps):
    schedule = noise_schedule(STABLE_DIFFUSION | {"timestep_spacing": spacing, "steps_offset": 1})
    timesteps = [move.timestep for move in step_table(schedule, scheduler, steps).moves]

    assert len(timesteps) == steps
    assert all(0 <= timestep <= 999 for timestep in timesteps)
    assert timesteps == sorted(timesteps, reverse=True)


def test_rows_on_different_courses_do_not_touch_each_other():
    schedule = noise_schedule(STABLE_DIFFUSION)
    courses = [step_table(schedule, name, 9) for name in DIFFUSERS]
    moves = [way.moves[4] for way in courses]
    latents, output, clean = torch.randn((3, 3, 4, 2, 2)).unbind(0)

    together, together_clean = advance(latents, output, clean, table(*moves))

    for at, move in enumerate(moves):
        only = slice(at, at + 1)
        alone, alone_clean = advance(latents[only], output[only], clean[only], table(move))
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
def test_a_course_that_cannot_be_is_refused(schedule, scheduler, steps):
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
def test_a_configuration_that_would_be_drawn_wrongly_is_refused(option):
    with pytest.raises(UnsupportedSchedule):
        noise_schedule(STABLE_DIFFUSION | option)
