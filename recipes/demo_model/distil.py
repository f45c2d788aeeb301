"""Few steps: a UNet that jumps to the end of the guided UNet's way, from anywhere on it.

Latent consistency distillation (Luo et al. 2023): guidance is distilled in, so sampling needs no
second, unguided pass. A model's folder has room for one UNet; this one is exported on its own.
"""

import copy
from typing import Any, Final

import torch
from torch import Tensor

from recipes.demo_model import schedule
from recipes.demo_model.networks import Denoiser
from recipes.demo_model.pictures import LatentBank, mixed_precision
from recipes.demo_model.progress import Stage, follow
from recipes.demo_model.train import TrainingConfig, compiled

_JUMP: Final = 20  #: timesteps of the teacher's one step
_RATE: Final = 2e-4
_SIGMA_DATA: Final = 0.5
_TIME_SCALE: Final = 10.0  #: diffusers' LCMScheduler scales timesteps alike


def distil(
    teacher: Denoiser,
    bank: LatentBank,
    empty: Tensor,
    stage: Stage,
    training_config: TrainingConfig,
    *,
    guidance: float,
) -> Denoiser:
    """Train until the stage's time is up; averaged weights, with the teacher's text encoder."""
    student = copy.deepcopy(teacher).train()
    student.text.requires_grad_(False)
    average = copy.deepcopy(teacher).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.unet.parameters(), lr=_RATE, betas=(0.9, 0.99))
    if saved := stage.resume():
        student.load_state_dict(saved["weights"])
        average.load_state_dict(saved["average"])
    unets = tuple(compiled(one.unet, training_config) for one in (student, average, teacher))
    stage.begin()
    while not stage.done:
        latents, tokens = bank.batch(training_config.batch // 2)
        loss = consistency_loss(unets, teacher, latents, tokens, empty, guidance=guidance)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * stage.rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.unet.parameters(), 1.0)
        optimizer.step()
        follow(average.unet, student.unet, step=stage.step, decay=0.97)
        stage.advance(loss)
    stage.save({"weights": student.state_dict(), "average": average.state_dict()})
    return average


def consistency_loss(
    unets: tuple[Any, Any, Any],
    teacher: Denoiser,
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    *,
    guidance: float,
) -> Tensor:
    """How far the student's end from here is from its average's end one guided step on.

    `unets` are the student's, the average's and the teacher's.
    """
    student, average, guide = unets
    device = latents.device
    powers = schedule.alphas_cumprod(device)
    here = (torch.randint(0, 50, (len(latents),), device=device) + 1) * _JUMP - 1
    there = (here - _JUMP).clamp(min=0)
    signal, sigma = schedule.signal_and_noise(powers, here)
    noisy = signal * latents + sigma * torch.randn_like(latents)
    with torch.no_grad(), mixed_precision(device):
        text = teacher.text(tokens)[0]
        unasked = teacher.text(empty)[0].expand_as(text)
        v = guide(noisy, here, text).sample.float()
        without = guide(noisy, here, unasked).sample.float()
        v = without + guidance * (v - without)
        next_signal, next_sigma = schedule.signal_and_noise(powers, there)
        moved = next_signal * (signal * noisy - sigma * v) + next_sigma * (
            sigma * noisy + signal * v
        )
        wanted = _end(moved, average(moved, there, text).sample, there, powers)
    with mixed_precision(device):
        predicted = student(noisy, here, text).sample
    difference = _end(noisy, predicted, here, powers) - wanted
    return ((difference.square() + 1e-6).sqrt() - 1e-3).mean()  # pseudo-Huber


def _end(noisy: Tensor, v: Tensor, timesteps: Tensor, powers: Tensor) -> Tensor:
    """Return the clean latents; at timestep 0 they equal the input (LCM's c_skip and c_out)."""
    signal, sigma = schedule.signal_and_noise(powers, timesteps)
    scaled = (timesteps.float() * _TIME_SCALE)[:, None, None, None]
    skip = _SIGMA_DATA**2 / (scaled.square() + _SIGMA_DATA**2)
    out = scaled / (scaled.square() + _SIGMA_DATA**2).sqrt()
    return skip * noisy + out * (signal * noisy - sigma * v.float())


@torch.no_grad()
def sample_few(denoiser: Denoiser, noise: Tensor, tokens: Tensor, *, steps: int) -> Tensor:
    """Latents in a handful of steps without guidance: jump to the end, add noise back, again."""
    powers = schedule.alphas_cumprod(noise.device)
    latents, clean = noise, noise
    for at, timestep in enumerate(schedule.timesteps_of(steps)):
        times = torch.full((len(noise),), timestep, device=noise.device)
        signal, sigma = schedule.signal_and_noise(powers, times)
        if at:
            latents = signal * clean + sigma * torch.randn_like(clean)
        with mixed_precision(noise.device):
            clean = _end(latents, denoiser(latents, times, tokens), times, powers)
    return clean
