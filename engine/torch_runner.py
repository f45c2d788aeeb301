"""PyTorch runner of a diffusers folder, with optimized networks where they are supported."""

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
#: rows that are captured as CUDA graphs; others are padded. Twice as many UNet rows if guided.
BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64)
GRAPH_DECODE_ROWS: Final = (1, 2)  # with more images, decoding takes longer than launching

logger = logging.getLogger(__name__)


class TorchRunner:
    """The networks of one model. Not thread-safe."""

    def __init__(
        self,
        *,
        text_encoder: TextEncoder,
        unet: Any,
        vae: Any,
        noise_schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Take diffusers' modules `unet` and `vae`, on the device."""
        self.noise_schedule = noise_schedule
        self.sizes: frozenset[tuple[int, int]] | None = None
        self.device = device
        self.latent_channels: int = unet.config.in_channels
        self.pixels_per_latent: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.native_size: int = unet.config.sample_size  #: of its latents, each way
        self.encode = text_encoder.encode
        self._text_encoder = text_encoder
        self._dtype = dtype
        self._unet: Network
        self._unet, self._decoder = _optimized(unet, vae)
        if device.type == "cuda":
            self._prepare_gpu()

    def _prepare_gpu(self) -> None:
        self._unet = CudaGraphRunner(self._unet, BUCKETS)
        self._decode_few = CudaGraphRunner(self._decoder, GRAPH_DECODE_ROWS)
        self._decode_stream = torch.cuda.Stream(self.device)
        self._pending_steps: deque[torch.cuda.Event] = deque()

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

        `dtype` is a key of DTYPES. `threads` is PyTorch's for the whole process; None: its default.
        Raises OSError for a missing file, KeyError for a dtype, UnsupportedSchedule.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        if threads is not None:
            torch.set_num_threads(threads)
        where, precision = torch.device(device), DTYPES[dtype]

        def network(kind: Any, folder: str, dtype: torch.dtype = precision) -> Any:
            # An explicit dtype, because transformers 5 otherwise takes the file's, and diffusers
            # float32: a mixture of both fails only at the first image.
            options = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
            if not folder.startswith("text_encoder"):
                options["low_cpu_mem_usage"] = False  # True needs the accelerate package
            loaded = kind.from_pretrained(model_dir / folder, **options)
            return loaded.eval().requires_grad_(False).to(where)

        is_xl = (model_dir / "text_encoder_2").is_dir()
        kinds = {"": CLIPTextModel} | ({"_2": CLIPTextModelWithProjection} if is_xl else {})
        # oneDNN's and cuDNN's convolutions use channels_last: no reordering in between
        return cls(
            text_encoder=TextEncoder(
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
                AutoencoderKL,
                "vae",
                torch.float32 if is_xl and _overflows(model_dir) else precision,
            ).to(memory_format=torch.channels_last),
            noise_schedule=read_noise_schedule(model_dir / "scheduler" / "scheduler_config.json"),
            device=where,
            dtype=precision,
        )

    @torch.inference_mode()
    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """See NetworkRunner."""
        hidden_states, pooled = self._text_encoder.parts(embeddings)
        inputs = [latents.to(self._dtype), timesteps, hidden_states]
        if pooled is not None:
            inputs += [pooled, self._sizes(latents).expand(len(pooled), -1)]
        if self.device.type != "cuda":
            return self._unet(*inputs).float()
        if len(self._pending_steps) > 1:
            self._pending_steps.popleft().synchronize()
        output = self._unet(*inputs).float()
        done = torch.cuda.Event(blocking=True)
        done.record()
        self._pending_steps.append(done)
        return output

    def _sizes(self, latents: Tensor) -> Tensor:
        """Return XL's time ids: original size, no crop, target size."""
        height, width = (side * self.pixels_per_latent for side in latents.shape[2:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).to(
            self.device, non_blocking=True
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoding:
        """See NetworkRunner. Non-finite latents would decode to a black image."""
        if self.device.type != "cuda":
            # One by one: the activations of one image fit into the caches, those of several do not.
            return _to_pixels(torch.cat([self._decoder(one) for one in latents.split(1)]))
        self._decode_stream.wait_stream(torch.cuda.current_stream())
        latents.record_stream(self._decode_stream)
        with torch.cuda.stream(self._decode_stream):
            few = len(latents) <= max(GRAPH_DECODE_ROWS)
            return _to_pixels((self._decode_few if few else self._decoder)(latents))

    def warm(self, max_unet_rows: int) -> None:
        """Capture CUDA graphs at the native size: each bucket of guided rows, and decoding."""
        size, embedding = self.native_size, self.encode([""])
        for rows in [bucket for bucket in BUCKETS if 2 * bucket <= max_unet_rows]:
            latents = torch.zeros((rows, self.latent_channels, size, size), device=self.device)
            timesteps = torch.zeros(rows, device=self.device)
            self.unet(latents, timesteps, embedding.repeat(2 * rows, *[1] * (embedding.dim() - 1)))
        for rows in (1, 2, 3, 4):
            self.decode(
                torch.zeros((rows, self.latent_channels, size, size), device=self.device)
            ).images()


def _optimized(unet: Any, vae: Any) -> tuple[Network, Network]:
    try:
        return UNet(unet), VaeDecoder(vae)
    except UnsupportedNetwork as error:
        logger.warning("no optimized network for %s; using diffusers' slower ones", error)
        return _diffusers_unet(unet), _diffusers_decoder(vae)


def _diffusers_unet(unet: Any) -> Callable[..., Tensor]:
    """Return diffusers' UNet with the signature of engine.gpu.unet.UNet."""

    def call(
        latents: Tensor,
        timesteps: Tensor,
        texts: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        times = len(texts) // len(latents)
        sample = latents.repeat(times, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        output = unet(
            sample,
            timesteps.repeat(times),
            encoder_hidden_states=texts,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return output[0]  # type: ignore[no-any-return]  # diffusers is not typed here

    return call


def _diffusers_decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """Return diffusers' decoder with the signature of engine.gpu.unet.VaeDecoder."""

    def call(latents: Tensor) -> Tensor:
        sample = (latents / vae.config.scaling_factor).to(
            vae.dtype, memory_format=torch.channels_last
        )
        decoded: Tensor = vae.decode(sample, return_dict=False)[0]
        return decoded.permute(0, 2, 3, 1)

    return call


def _to_pixels(decoded: Tensor) -> "_PixelDecoding":
    """Convert [B, height, width, 3], about -1 to 1, to pixels."""
    decoded = decoded.float()
    finite = decoded.isfinite().flatten(1).all(dim=1)
    levels = (decoded / 2 + 0.5).clamp_(0, 1).mul_(255).round_()
    return _PixelDecoding(levels.nan_to_num_().to(torch.uint8).contiguous(), finite)


class _PixelDecoding:
    """A Decoding: pixels and a finite flag for each image, being copied from the device."""

    def __init__(self, pixels: Tensor, finite: Tensor) -> None:
        self._pixels = pixels.to("cpu", non_blocking=True)  # pinned memory, on CUDA
        self._finite = finite.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True) if pixels.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def done(self) -> bool:
        """See Decoding."""
        return self._copied is None or self._copied.query()

    def images(self) -> list[Pixels | None]:
        """See Decoding."""
        if self._copied is not None:
            self._copied.synchronize()
        images = zip(self._pixels.numpy(), self._finite.tolist(), strict=True)
        return [pixels if finite else None for pixels, finite in images]


def _overflows(model_dir: Path) -> bool:
    """Return whether the decoder overflows in float16, as that of XL's first release does."""
    config = json.loads((model_dir / "vae" / "config.json").read_text())
    return bool(config.get("force_upcast", True))
