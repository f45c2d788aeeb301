"""The interface of what executes the networks, as the denoising loop uses it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.requests import Pixels
from engine.schedulers import NoiseSchedule


class Decoding(Protocol):
    """Images that are being decoded, on a GPU beside the UNet's next steps."""

    def done(self) -> bool:
        """Return whether `images` would return at once."""
        ...

    def images(self) -> list[Pixels | None]:
        """Wait for the images and return one for each latent; None for a non-finite one."""
        ...


@dataclass(frozen=True)
class Decoded:
    """A decoding that is finished."""

    finished: list[Pixels | None]

    def done(self) -> bool:
        """See Decoding."""
        return True

    def images(self) -> list[Pixels | None]:
        """See Decoding."""
        return self.finished


class NetworkRunner(Protocol):
    """The networks of one model. Latents come and go as float32 on `device`.

    All calls come from one thread. A runner may pad batches to the sizes it is fast at, and may
    return before the device is done. The loop then runs ahead of the device by at most one step,
    so that a canceled row leaves within a step.
    """

    noise_schedule: NoiseSchedule
    device: torch.device
    latent_channels: int
    pixels_per_latent: int
    sizes: frozenset[tuple[int, int]] | None  #: images' widths and heights; None: any

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the texts as `unet` reads them, [len(prompts), ...], in order.

        The loop only selects rows of it and stacks them again.
        """
        ...

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Return the output, [B, C, h, w], for [B, C, h, w], float32 [B] and `encode`'s [B, ...].

        When all rows are guided there are twice as many embeddings as latents: first the
        unconditional embedding of each, then the conditional one. There are as many outputs.
        Valid until the next call.
        """
        ...

    def decode(self, latents: Tensor) -> Decoding:
        """Start to decode an image from each of [B, C, h, w], B at most DECODE_BATCH."""
        ...
