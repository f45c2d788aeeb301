"""Endless supply of captioned images: plans by processes, pixels and latents on the device."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Final

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from recipes.demo_model.canvas import PLAN_LENGTH, Canvas, plan_of
from recipes.demo_model.cast import Cast
from recipes.demo_model.composer import compose
from recipes.demo_model.networks import LATENT_SHAPE, SCALING
from recipes.demo_model.tokens import LENGTH, Encoder

_TOGETHER: Final = 256
_QUEUED: Final = 64

Tokens = NDArray[np.int16]
Plans = NDArray[np.float32]


class Supply:
    """Captions as tokens, and plans, made by `processes` of its own or, with 0, right here."""

    def __init__(self, cast: Cast, encoder: Encoder, *, processes: int, seed: int) -> None:
        self._cast, self._encoder, self._seed = cast, encoder, seed
        self._made = 0
        self._tokens = np.empty((0, LENGTH), np.int16)
        self._plans = np.empty((0, PLAN_LENGTH), np.float32)
        # Forked before CUDA starts: the children share the pixels and never touch the device.
        context = multiprocessing.get_context("fork")
        self._queue: Queue[tuple[Tokens, Plans]] | None = (
            context.Queue(_QUEUED) if processes else None
        )
        self._processes = [
            context.Process(target=self._fill_queue, args=(at,), daemon=True)
            for at in range(processes)
        ]
        for process in self._processes:
            process.start()

    def take(self, count: int) -> tuple[Tokens, Plans]:
        """[count, LENGTH] and [count, PLAN_LENGTH] that were not taken before."""
        while len(self._tokens) < count:
            tokens, plans = self._queue.get() if self._queue else self._make("here", _TOGETHER // 8)
            self._tokens = np.concatenate([self._tokens, tokens])
            self._plans = np.concatenate([self._plans, plans])
        taken = self._tokens[:count], self._plans[:count]
        self._tokens, self._plans = self._tokens[count:], self._plans[count:]
        return taken

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def _fill_queue(self, maker: int) -> None:
        os.nice(3)
        assert self._queue is not None
        while True:
            self._queue.put(self._make(str(maker), _TOGETHER))

    def _make(self, maker: str, count: int) -> tuple[Tokens, Plans]:
        first, self._made = self._made, self._made + count
        seeds = (f"{self._seed}-{maker}-{at}" for at in range(first, first + count))
        made = [compose(self._cast, seed) for seed in seeds]
        tokens = self._encoder.encode([one.caption for one in made])
        return tokens, np.stack([plan_of(one) for one in made])


class LatentBank:
    """Encoded images on the device, a few of them replaced all the time."""

    def __init__(
        self,
        supply: Supply,
        canvas: Canvas,
        encode: Callable[[Tensor], Tensor],
        *,
        capacity: int,
        together: int,
    ) -> None:
        self._supply, self._canvas, self._encode = supply, canvas, encode
        self._together = together
        self._latents = torch.zeros(
            (capacity, *LATENT_SHAPE), dtype=torch.float16, device=canvas.device
        )
        self._tokens = torch.zeros((capacity, LENGTH), dtype=torch.int16, device=canvas.device)
        self._next = 0
        self._owed = 0
        for _ in range(0, capacity, together):
            self._renew()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """(latents [size, 4, h, w] scaled to unit variance, tokens [size, LENGTH])."""
        at = torch.randint(0, len(self._latents), (size,), device=self._canvas.device)
        return self._latents[at].float(), self._tokens[at].long()

    def renew(self, count: int) -> None:
        """Replace `count` of the oldest, sooner or later: a few at a time waste the device."""
        self._owed += count
        while self._owed >= self._together:
            self._renew()
            self._owed -= self._together

    def _renew(self) -> None:
        tokens, plans = self._supply.take(self._together)
        latents = self._encode(self._canvas.draw(plans))
        at = (torch.arange(self._together) + self._next) % len(self._latents)
        at = at.to(self._canvas.device)
        self._latents[at] = latents.half()
        self._tokens[at] = torch.from_numpy(tokens).to(self._canvas.device)
        self._next = int(self._next + self._together) % len(self._latents)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents [n, 4, h / 8, w / 8] of images [n, 3, h, w]: the mode, scaled."""
    with mixed_precision(pictures.device):
        ready = pictures.contiguous(memory_format=torch.channels_last)
        moments = vae.quant_conv(vae.encoder(ready))
    latents: Tensor = moments[:, : LATENT_SHAPE[0]].float() * SCALING
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, *, together: int = 16) -> Tensor:
    """Images between -1 and 1 of scaled latents."""
    with mixed_precision(latents.device):
        pieces = [
            vae.decode(latents[start : start + together] / SCALING).sample.float()
            for start in range(0, len(latents), together)
        ]
    return torch.cat(pieces).clamp(-1, 1)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; a CPU stays in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
