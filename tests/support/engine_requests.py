"""Rows to generate, and helpers to read their events: for the tests of the engine."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.generate import generate
from engine.requests import Canceled, Image, Pixels, Row, RowEvent, RowFailed
from engine.runner import Decoding, NetworkRunner

DEMO = Path(__file__).parents[2] / "models/darkroom-demo"


def row(prompt: str = "a lighthouse", **changed: object) -> Row:
    plain = Row(
        prompt=prompt,
        negative_prompt="",
        seed=11,
        num_inference_steps=3,
        guidance_scale=5.0,
        width=64,
        height=64,
    )
    return dataclasses.replace(plain, **changed)  # type: ignore[arg-type]


def events(runner: NetworkRunner, *rows: Row, max_unet_rows: int = 64) -> list[RowEvent]:
    return list(generate(runner, rows, max_unet_rows=max_unet_rows))


def images(happened: Iterable[RowEvent]) -> dict[int, Pixels]:
    return {event.index: event.pixels for event in happened if isinstance(event, Image)}


def failures(happened: Iterable[RowEvent]) -> dict[int, str]:
    return {event.index: event.code for event in happened if isinstance(event, RowFailed)}


def canceled_rows(happened: Iterable[RowEvent]) -> list[int]:
    return [event.index for event in happened if isinstance(event, Canceled)]


def alone(runner: NetworkRunner, wanted: Row) -> Pixels:
    """Return the image of a row generated without other rows."""
    return images(events(runner, wanted))[0]


def by_diffusers(pipeline: Any, wanted: Row) -> Pixels:
    """Generate the same row with a pipeline of diffusers from the same noise.

    The noise is made here: PyTorch does not promise that a seed gives the same numbers in float16,
    and on some processors it does not.
    """
    scale = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, wanted.height // scale, wanted.width // scale)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(wanted.seed))
    output = pipeline(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        width=wanted.width,
        height=wanted.height,
        latents=noise.to(pipeline.device, pipeline.unet.dtype),
    )
    return np.asarray(output.images[0])


def levels_apart(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


def psnr_db(one: Pixels, other: Pixels) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images; infinite for the same."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


class CountingRunner:
    """The real networks, recording the number of rows of each UNet batch."""

    def __init__(self, runner: NetworkRunner) -> None:
        self.noise_schedule = runner.noise_schedule
        self.sizes = runner.sizes
        self.device = runner.device
        self.latent_channels = runner.latent_channels
        self.pixels_per_latent = runner.pixels_per_latent
        self.encode, self.decode = runner.encode, runner.decode
        self.runner = runner
        self.batches: list[int] = []

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        self.batches.append(len(embeddings))
        return self.runner.unet(latents, timesteps, embeddings)


class LimitedMemoryRunner(CountingRunner):
    """The real networks with memory for so many rows of the UNet, or of the decoder."""

    def __init__(self, runner: NetworkRunner, *, unet_rows: int, decoded: int = 8) -> None:
        super().__init__(runner)
        self._unet_rows, self._decoded = unet_rows, decoded
        self.decode = self._decode

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        if len(embeddings) > self._unet_rows:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return super().unet(latents, timesteps, embeddings)

    def _decode(self, latents: Tensor) -> Decoding:
        if len(latents) > self._decoded:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return self.runner.decode(latents)
