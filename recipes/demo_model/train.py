"""Both trainings: images to latents and back, and captions and noise to latents."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from recipes.demo_model import schedule
from recipes.demo_model.canvas import Canvas
from recipes.demo_model.networks import SCALING, Denoiser
from recipes.demo_model.pictures import LatentBank, Supply, mixed_precision
from recipes.demo_model.progress import Stage, follow

_EMPTY_CAPTIONS: Final = 0.1  # what guidance needs to know (Ho & Salimans 2022)
_KL_WEIGHT: Final = 2e-4


@dataclass(frozen=True)
class TrainingConfig:
    """Sizes and rates of a training."""

    batch: int = 512
    bank: int = 131_072  #: encoded images kept on the device
    fresh: int = 32  #: of them replaced for each step
    rate: float = 6e-4
    text_rate: float = 3e-4
    average: float = 0.9995  #: decay of the weights' average, which is what gets exported
    crop: int = 128  #: side of what the VAE learns from, in pixels
    crops: int = 40
    compiled: bool = True


#: To teach a trained model something more: a third of the rates, for minutes and not for many.
GENTLE: Final = TrainingConfig(batch=256, bank=65_536, rate=2e-4, text_rate=1e-4, average=0.998)
SMOKE: Final = TrainingConfig(batch=8, bank=32, fresh=2, crop=64, crops=4, compiled=False)


def compiled(module: Any, training_config: TrainingConfig) -> Any:
    return torch.compile(module, dynamic=False) if training_config.compiled else module


# --- captions and noise to latents


def train_denoiser(
    denoiser: Denoiser,
    bank: LatentBank,
    empty: Tensor,
    stage: Stage,
    training_config: TrainingConfig,
    *,
    look: Callable[[Denoiser], None],
) -> Denoiser:
    """Train until the stage's time is up; the averaged weights. `look` is shown them at times.

    `empty` [1, 77] is the empty caption. Resumes from the stage's checkpoint.
    """
    average = copy.deepcopy(denoiser).requires_grad_(False).eval()
    optimizer = _optimizer(denoiser, training_config)
    if saved := stage.resume():
        denoiser.load_state_dict(saved["weights"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
    denoiser.train()
    unet = compiled(denoiser.unet, training_config)
    looks = _looks(stage.share)
    is_warm = not training_config.compiled
    stage.begin()
    while not stage.done:
        latents, tokens = bank.batch(training_config.batch)
        loss = denoising_loss(unet, denoiser.text, latents, _some_emptied(tokens, empty))
        _descend(loss, optimizer, denoiser, stage)
        if not is_warm:
            is_warm = True
            float(loss.detach())  # waits for it
            stage.begin()  # the compiler's time is not training
        follow(average, denoiser, step=stage.step, decay=training_config.average)
        bank.renew(training_config.fresh)
        stage.advance(loss)
        if stage.share >= looks[0] or stage.done:
            looks = looks[1:] if stage.share >= looks[0] else looks
            look(average)
            stage.save(_checkpoint(denoiser, average, optimizer))
            stage.begin()  # neither is training
    return average


def denoising_loss(unet: Any, text: nn.Module, latents: Tensor, tokens: Tensor) -> Tensor:
    """Weighted squared error of v, at noise levels spread evenly over the batch."""
    size, device = len(latents), latents.device
    spread = (torch.arange(size, device=device) + torch.rand(size, device=device)) / size
    timesteps = (spread * schedule.TIMESTEPS).long().clamp(max=schedule.TIMESTEPS - 1)
    powers = schedule.alphas_cumprod(device)
    signal, sigma = schedule.signal_and_noise(powers, timesteps)
    noise = torch.randn_like(latents)
    noisy = (signal * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
    with mixed_precision(device):
        predicted = unet(noisy, timesteps, text(tokens)[0]).sample
    wanted = schedule.velocity(latents, noise, signal, sigma)
    errors = (predicted.float() - wanted).square().mean((1, 2, 3))
    loss: Tensor = (schedule.loss_weights(powers, timesteps) * errors).mean()
    return loss


def _optimizer(denoiser: Denoiser, training_config: TrainingConfig) -> torch.optim.AdamW:
    groups = [
        {"params": list(denoiser.unet.parameters()), "peak": training_config.rate},
        {"params": list(denoiser.text.parameters()), "peak": training_config.text_rate},
    ]
    return torch.optim.AdamW(
        groups, lr=training_config.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )


def _descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, module: nn.Module, stage: Stage
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * stage.rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def _some_emptied(tokens: Tensor, empty: Tensor) -> Tensor:
    emptied = torch.rand(len(tokens), 1, device=tokens.device) < _EMPTY_CAPTIONS
    return torch.where(emptied, empty, tokens)


def _looks(share: float) -> list[float]:
    """Yield the remaining shares of the budget at which to save; the last is never reached."""
    return [*(eighth / 8 for eighth in range(1, 8) if eighth / 8 > share), 2.0]


def _checkpoint(
    module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    return {
        "weights": module.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


# --- images to latents and back


def train_vae(
    vae: AutoencoderKL,
    supply: Supply,
    canvas: Canvas,
    stage: Stage,
    training_config: TrainingConfig,
) -> AutoencoderKL:
    """Train until the stage's time is up; averaged weights whose latents have unit variance."""
    average = copy.deepcopy(vae).requires_grad_(False).eval()
    groups = [{"params": list(vae.parameters()), "peak": 1e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    if saved := stage.resume():
        vae.load_state_dict(saved["weights"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
    crops = _crops(supply, canvas, training_config)
    forward = compiled(lambda pictures: _through(vae, pictures), training_config)
    stage.begin()
    while not stage.done:
        pictures = next(crops)
        with mixed_precision(canvas.device):
            repainted, mean, log_variance = forward(pictures)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).float().mean() / 2
        loss = picture_loss(repainted.float(), pictures) + _KL_WEIGHT * kl
        _descend(loss, optimizer, vae, stage)
        follow(average, vae, step=stage.step, decay=0.998)
        stage.advance(loss)
    stage.save(_checkpoint(vae, average, optimizer))
    normalize_latents(average, [next(crops) for _ in range(16)])
    return average


def _through(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    posterior = vae.encode(pictures).latent_dist
    return vae.decode(posterior.sample()).sample, posterior.mean, posterior.logvar


def _crops(supply: Supply, canvas: Canvas, training_config: TrainingConfig) -> Iterator[Tensor]:
    """Random squares; those of one quarter of the batch are cut at one place."""
    while True:
        pieces = []
        for picture in canvas.draw(supply.take(training_config.crops)[1]).chunk(4):
            top, left = torch.randint(
                0, picture.shape[-1] - training_config.crop + 1, (2,)
            ).tolist()
            pieces.append(
                picture[..., top : top + training_config.crop, left : left + training_config.crop]
            )
        yield torch.cat(pieces).contiguous(memory_format=torch.channels_last)


def picture_loss(painted: Tensor, pictures: Tensor) -> Tensor:
    """Absolute and squared error, of edges too, and of coarser copies, which keep colors right."""
    loss = (painted - pictures).abs().mean() + 0.5 * (painted - pictures).square().mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (painted.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean()
    for level in range(4):
        painted, pictures = F.avg_pool2d(painted, 2), F.avg_pool2d(pictures, 2)
        difference = painted - pictures
        loss = loss + (0.3 * difference.abs().mean() if level < 2 else difference.square().mean())
    return loss


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, pictures: list[Tensor]) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions around them.

    Times SCALING, latents then have mean 0 and deviation 1, as the noise schedule assumes.
    """
    latents = torch.cat([vae.encode(some).latent_dist.mode().float() for some in pictures])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = 1 / (SCALING * deviation)
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into is not None
    assert out is not None
    into.weight[:4] *= scale[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) * scale
    into.bias[4:] += 2 * scale.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= (1 / scale)[None, :, None, None]
