"""Training of the decoder alone, on latents as the UNet leaves them, not on ideal ones.

Nothing else moves, so the latents and the UNet stay what they are.
"""

import copy
from typing import Final

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from recipes.demo_model import schedule
from recipes.demo_model.canvas import Canvas
from recipes.demo_model.networks import SCALING, Denoiser
from recipes.demo_model.pictures import Supply, encode, mixed_precision
from recipes.demo_model.progress import Stage, follow
from recipes.demo_model.train import picture_loss

#: Noise from which the UNet's guess is still the same image: up to this timestep.
_LATEST_TIMESTEP: Final = 350
_RATE: Final = 3e-4


def polish_decoder(
    vae: AutoencoderKL,
    denoiser: Denoiser,
    supply: Supply,
    canvas: Canvas,
    stage: Stage,
    *,
    batch: int,
) -> AutoencoderKL:
    """Train until the stage's time is up; the VAE with averaged decoder weights."""
    average = copy.deepcopy(vae).requires_grad_(False).eval()
    vae.requires_grad_(False)
    parameters = [*vae.decoder.parameters()]
    if vae.post_quant_conv is not None:
        parameters += list(vae.post_quant_conv.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.99), fused=True)
    if saved := stage.resume():
        vae.load_state_dict(saved["weights"])
        average.load_state_dict(saved["average"])
    stage.begin()
    while not stage.done:
        tokens, plans = supply.take(batch)
        pictures = canvas.draw(plans)
        latents = _as_left(denoiser, encode(vae, pictures), torch.from_numpy(tokens).long())
        with mixed_precision(canvas.device):
            painted = vae.decode(latents / SCALING).sample.float()
        loss = picture_loss(painted, pictures)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * stage.rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        follow(average, vae, step=stage.step, decay=0.998)
        stage.advance(loss)
    stage.save({"weights": vae.state_dict(), "average": average.state_dict()})
    return average


@torch.no_grad()
def _as_left(denoiser: Denoiser, latents: Tensor, tokens: Tensor) -> Tensor:
    """Half of them as they are, half as the UNet guesses them through a little noise."""
    half = len(latents) // 2
    device = latents.device
    timesteps = torch.randint(20, _LATEST_TIMESTEP, (half,), device=device)
    signal, sigma = schedule.signal_and_noise(schedule.alphas_cumprod(device), timesteps)
    noisy = signal * latents[:half] + sigma * torch.randn_like(latents[:half])
    with mixed_precision(device):
        v = denoiser(noisy, timesteps, tokens[:half].to(device)).float()
    return torch.cat([signal * noisy - sigma * v, latents[half:]])
