"""Noise schedule, the UNet's prediction target, and the sampler."""

import functools
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

TIMESTEPS: Final = 1000
_BETAS: Final = (0.00085, 0.012)  # Stable Diffusion's, linear in their square roots
_MIN_SNR_GAMMA: Final = 5.0

#: v for (latents [n, 4, h, w], timesteps [n], tokens [n, 77]).
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.cache
def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """Signal power at each timestep, [TIMESTEPS], falling to exactly zero.

    Rescaled so that the last step is pure noise (Lin et al. 2023, algorithm 1): without it no
    model draws a plain black or white background.
    """
    low, high = _BETAS
    betas = torch.linspace(low**0.5, high**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return (signal**2).float().to(device)


def signal_and_noise(powers: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return both amplitudes at [n] timesteps, each [n, 1, 1, 1]; their squares add up to 1."""
    power = powers[timesteps][:, None, None, None]
    return power.sqrt(), (1 - power).sqrt()


def velocity(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Return the target v = signal * noise - sigma * latents (Salimans & Ho 2022, §4)."""
    return signal * noise - sigma * latents


def loss_weights(powers: Tensor, timesteps: Tensor) -> Tensor:
    """Min-SNR weights for v (Hang et al. 2023), [n].

    One is added to both SNRs, so that the pure-noise step, which decides backgrounds, keeps
    weight 1 instead of losing it altogether.
    """
    power = powers[timesteps]
    snr = power / (1 - power).clamp(min=1e-8)
    return (snr.clamp(max=_MIN_SNR_GAMMA) + 1) / (snr + 1)


def timesteps_of(steps: int) -> list[int]:
    """Trailing timesteps, as DDIM visits them: 999 first (Lin et al. 2023, §3.3)."""
    spaced = torch.arange(TIMESTEPS, 0, -TIMESTEPS / steps, dtype=torch.float64)
    return [int(step) - 1 for step in spaced.round()]


@torch.no_grad()
def ddim(
    predict: Predict,
    noise: Tensor,
    tokens: Tensor,
    empty: Tensor,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents for tokens [n, 77] from noise [n, 4, h, w], without noise added on the way.

    DDIM with eta 0 (Song et al. 2021) and classifier-free guidance against `empty` [1, 77].
    """
    powers = alphas_cumprod(noise.device)
    both = torch.cat([empty.expand_as(tokens), tokens])
    latents = noise
    for timestep in timesteps_of(steps):
        times = torch.full((2 * len(latents),), timestep, device=noise.device)
        unguided, guided = predict(latents.repeat(2, 1, 1, 1), times, both).float().chunk(2)
        v = unguided + guidance * (guided - unguided)
        signal, sigma = signal_and_noise(powers, times[: len(latents)])
        clean, rest = signal * latents - sigma * v, sigma * latents + signal * v
        following = timestep - TIMESTEPS // steps
        power = powers[following] if following >= 0 else torch.ones_like(powers[0])
        latents = power.sqrt() * clean + (1 - power).sqrt() * rest
    return latents


def seeded_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """[len(seeds), *shape], each from its own generator: the same as the engine and diffusers."""
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(rows)
