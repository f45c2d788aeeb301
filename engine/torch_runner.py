"""Runs a diffusers folder's networks with PyTorch, laid out anew where they are known."""

import json
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from engine.gpu.blocks import UnsupportedNetwork
from engine.gpu.cuda_graphs import CudaGraphRunner, Network
from engine.gpu.unet import UNet, VaeDecoder
from engine.requests import Pixels
from engine.runner import Decoding
from engine.schedulers import NoiseSchedule, read_noise_schedule
from engine.text_encoding import TextEncoder, clip_encoders

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
#: UNet rows that a GPU has recordings for; what is between is filled up. Twice as many if guided.
BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64)
RECORDED_DECODINGS: Final = (1, 2)  # more pictures keep the GPU busy for longer than launching is

logger = logging.getLogger(__name__)


class TorchRunner:
    """The networks of one model, ready to be called. Not to be shared between threads."""

    def __init__(
        self,
        *,
        texts: TextEncoder,
        unet: Any,
        vae: Any,
        noise_schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`unet` and `vae` are diffusers' modules, on the device."""
        self.noise_schedule = noise_schedule
        self.sizes: frozenset[tuple[int, int]] | None = None
        self.device = device
        self.latent_channels: int = unet.config.in_channels
        self.pixels_per_latent: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.native_size: int = unet.config.sample_size  #: of its latents, each way
        self.encode = texts.encode
        self._texts = texts
        self._dtype = dtype
        self._unet: Network
        self._unet, self._decoder = _laid_out(unet, vae)
        if device.type == "cuda":
            self._prepare_gpu()

    def _prepare_gpu(self) -> None:
        self._unet = CudaGraphRunner(self._unet, BUCKETS)
        self._decode_few = CudaGraphRunner(self._decoder, RECORDED_DECODINGS)
        self._decoding = torch.cuda.Stream(self.device)
        self._under_way: deque[torch.cuda.Event] = deque()

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int | None,
    ) -> Self:
        """Read a local diffusers folder (safetensors only; nothing is ever downloaded).

        `dtype` is a key of DTYPES. `threads` is PyTorch's for the whole process; None leaves them.
        Raises OSError for a missing file, KeyError for a dtype, UnsupportedSchedule.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        if threads is not None:
            torch.set_num_threads(threads)
        where, precision = torch.device(device), DTYPES[dtype]

        def network(kind: Any, folder: str, dtype: torch.dtype = precision) -> Any:
            # The dtype is said aloud because transformers 5 otherwise takes the file's, and
            # diffusers float32: a mixture of both fails only at the first picture.
            options = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
            if not folder.startswith("text_encoder"):
                options["low_cpu_mem_usage"] = False  # True asks for the accelerate package
            loaded = kind.from_pretrained(model_dir / folder, **options)
            return loaded.eval().requires_grad_(False).to(where)

        two = (model_dir / "text_encoder_2").is_dir()  # Stable Diffusion XL
        kinds = {"": CLIPTextModel} | ({"_2": CLIPTextModelWithProjection} if two else {})
        # channels_last is what oneDNN's and cuDNN's convolutions want: no reordering in between
        return cls(
            texts=TextEncoder(
                [
                    CLIPTokenizer.from_pretrained(
                        model_dir / f"tokenizer{at}", local_files_only=True
                    )
                    for at in kinds
                ],
                clip_encoders([network(kind, f"text_encoder{at}") for at, kind in kinds.items()]),
                where,
            ),
            unet=network(UNet2DConditionModel, "unet").to(memory_format=torch.channels_last),
            vae=network(
                AutoencoderKL, "vae", torch.float32 if two and _overflows(model_dir) else precision
            ).to(memory_format=torch.channels_last),
            noise_schedule=read_noise_schedule(model_dir / "scheduler" / "scheduler_config.json"),
            device=where,
            dtype=precision,
        )

    @torch.inference_mode()
    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """See NetworkRunner."""
        words, pooled = self._texts.parts(embeddings)
        inputs = [latents.to(self._dtype), timesteps, words]
        if pooled is not None:
            inputs += [pooled, self._sizes(latents).expand(len(pooled), -1)]
        if self.device.type != "cuda":
            return self._unet(*inputs).float()
        if len(self._under_way) > 1:
            self._under_way.popleft().synchronize()
        output = self._unet(*inputs).float()
        done = torch.cuda.Event(blocking=True)
        done.record()
        self._under_way.append(done)
        return output

    def _sizes(self, latents: Tensor) -> Tensor:
        """What XL is told of the picture: its size, that it was not cropped, its size again."""
        height, width = (side * self.pixels_per_latent for side in latents.shape[2:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).to(
            self.device, non_blocking=True
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoding:
        """See NetworkRunner. A picture of something that is not a number would be black."""
        if self.device.type != "cuda":
            # One by one: what a picture takes fits into the caches, and several do not.
            return _developed(torch.cat([self._decoder(one) for one in latents.split(1)]))
        self._decoding.wait_stream(torch.cuda.current_stream())
        latents.record_stream(self._decoding)
        with torch.cuda.stream(self._decoding):
            few = len(latents) <= max(RECORDED_DECODINGS)
            return _developed((self._decode_few if few else self._decoder)(latents))

    def warm(self, max_unet_rows: int) -> None:
        """Make recordings of the native size for every number of guided rows, and of pictures."""
        size, text = self.native_size, self.encode([""])
        for rows in [bucket for bucket in BUCKETS if 2 * bucket <= max_unet_rows]:
            latents = torch.zeros((rows, self.latent_channels, size, size), device=self.device)
            timesteps = torch.zeros(rows, device=self.device)
            self.unet(latents, timesteps, text.repeat(2 * rows, *[1] * (text.dim() - 1)))
        for rows in (1, 2, 3, 4):
            self.decode(
                torch.zeros((rows, self.latent_channels, size, size), device=self.device)
            ).pictures()


def _laid_out(unet: Any, vae: Any) -> tuple[Network, Network]:
    try:
        return UNet(unet), VaeDecoder(vae)
    except UnsupportedNetwork as odd:
        logger.warning("this model has %s: diffusers' own networks run it, slower", odd)
        return _plain_unet(unet), _plain_decoder(vae)


def _plain_unet(unet: Any) -> Callable[..., Tensor]:
    """Diffusers' UNet, called as networks.UNet is."""

    def call(
        latents: Tensor,
        timesteps: Tensor,
        words: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        times = len(words) // len(latents)
        sample = latents.repeat(times, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        output = unet(
            sample,
            timesteps.repeat(times),
            encoder_hidden_states=words,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return output[0]  # type: ignore[no-any-return]  # diffusers is not typed here

    return call


def _plain_decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """Diffusers' decoder, called as networks.Decoder is."""

    def call(latents: Tensor) -> Tensor:
        sample = (latents / vae.config.scaling_factor).to(
            vae.dtype, memory_format=torch.channels_last
        )
        decoded: Tensor = vae.decode(sample, return_dict=False)[0]
        return decoded.permute(0, 2, 3, 1)

    return call


def _developed(decoded: Tensor) -> "_Developed":
    """[B, height, width, 3], about -1 to 1, as pixels."""
    decoded = decoded.float()
    finite = decoded.isfinite().flatten(1).all(dim=1)
    shades = (decoded / 2 + 0.5).clamp_(0, 1).mul_(255).round_()
    return _Developed(shades.nan_to_num_().to(torch.uint8).contiguous(), finite)


class _Developed:
    """A Decoding: pixels, and which pictures of them are finite, on their way from the device."""

    def __init__(self, pixels: Tensor, finite: Tensor) -> None:
        self._pixels = pixels.to("cpu", non_blocking=True)  # pinned memory, on CUDA
        self._finite = finite.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event(blocking=True) if pixels.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def done(self) -> bool:
        """See Decoding."""
        return self._arrived is None or self._arrived.query()

    def pictures(self) -> list[Pixels | None]:
        """See Decoding."""
        if self._arrived is not None:
            self._arrived.synchronize()
        pictures = zip(self._pixels.numpy(), self._finite.tolist(), strict=True)
        return [pixels if finite else None for pixels, finite in pictures]


def _overflows(model_dir: Path) -> bool:
    """Whether the decoder's numbers are too large for halves, as those of XL's first are."""
    config = json.loads((model_dir / "vae" / "config.json").read_text())
    return bool(config.get("force_upcast", True))
