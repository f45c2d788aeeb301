"""What executes the networks, as the denoise loop sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.requests import Pixels
from engine.schedulers import NoiseSchedule


class Decoding(Protocol):
    """Pictures that are being decoded, on a GPU beside the UNet's next steps."""

    def done(self) -> bool:
        """Whether `pictures` would answer at once."""
        ...

    def pictures(self) -> list[Pixels | None]:
        """One for each of the latents; None where it came out as not a number. Waits for them."""
        ...


@dataclass(frozen=True)
class Decoded:
    """A decoding that is over."""

    finished: list[Pixels | None]

    def done(self) -> bool:
        """See Decoding."""
        return True

    def pictures(self) -> list[Pixels | None]:
        """See Decoding."""
        return self.finished


class NetworkRunner(Protocol):
    """The networks of one model. Latents come and go as float32 on `device`.

    All calls come from one thread. A runner may pad rows to the sizes it is fast at, and may return
    before the device is done; it then lets the loop run ahead of the device by a step at most, so
    that a row that is withdrawn leaves within a step.
    """

    noise_schedule: NoiseSchedule
    device: torch.device
    latent_channels: int
    pixels_per_latent: int
    sizes: frozenset[tuple[int, int]] | None  #: pictures' widths and heights; None: any

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[len(prompts), ...], in order: what `unet` wants to know of each text.

        The loop only takes rows of it and puts them together again.
        """
        ...

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The output, [B, C, h, w], for [B, C, h, w], float32 [B] and rows of `encode`, [B, ...].

        Where everybody is guided there are twice as many embeddings as latents: first all that the
        latents are seen without their prompts with, then all prompts. So many are the outputs, too.
        Valid until the next call.
        """
        ...

    def decode(self, latents: Tensor) -> Decoding:
        """Begin to make a picture of each of [B, C, h, w]; so many as DECODED_TOGETHER."""
        ...
