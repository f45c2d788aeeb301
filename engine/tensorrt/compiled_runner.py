"""NetworkRunner of a model's compiled parts, independent of what executes them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from engine.requests import Pixels
from engine.runner import Decoded, Decoding
from engine.schedulers import NoiseSchedule, read_noise_schedule
from engine.text_encoding import Encoder, TextEncoder

Size = tuple[int, int]  #: width and height of an image, in pixels


class CompiledNetwork(Protocol):
    """One compiled part."""

    max_rows: int  #: in one call

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return its outputs, on the current stream; valid until the next call."""
        ...


@dataclass(frozen=True)
class PipelineConfig:
    """Configuration in the model's folder, without its weights."""

    tokenizers: tuple[Any, ...]  #: of text_encoder, and SDXL's text_encoder_2
    noise_schedule: NoiseSchedule
    latent_channels: int
    pixels_per_latent: int

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders, one for each tokenizer."""
        return ("text_encoder", "text_encoder_2")[: len(self.tokenizers)]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all compiled parts."""
        return (*self.text_encoders, "unet", "vae_decoder")


def read_pipeline_config(model_dir: Path) -> PipelineConfig:
    """Read the configuration. Raises OSError for a missing file, UnsupportedSchedule."""
    folders = [model_dir / name for name in ("tokenizer", "tokenizer_2")]
    vae = _json(model_dir / "vae/config.json")
    return PipelineConfig(
        tokenizers=tuple(
            CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            for folder in folders
            if folder.is_dir()
        ),
        noise_schedule=read_noise_schedule(model_dir / "scheduler" / "scheduler_config.json"),
        latent_channels=vae.get("latent_channels", 4),
        pixels_per_latent=2 ** (len(vae["block_out_channels"]) - 1),
    )


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


class CompiledRunner:
    """A NetworkRunner whose networks have named inputs and outputs. Not thread-safe."""

    def __init__(
        self,
        config: PipelineConfig,
        networks: Mapping[str, CompiledNetwork],
        *,
        sizes: frozenset[Size] | None,
        device: torch.device,
    ) -> None:
        self.noise_schedule = config.noise_schedule
        self.latent_channels = config.latent_channels
        self.pixels_per_latent = config.pixels_per_latent
        self.sizes = sizes
        self.device = device
        self._networks = networks
        self._streams = CudaStreams(device)
        self._text_encoder = TextEncoder(
            config.tokenizers,
            [self._encoder(networks[part]) for part in config.text_encoders],
            device,
            max_rows=networks["text_encoder"].max_rows,
        )
        self.encode = self._text_encoder.encode

    def _encoder(self, network: CompiledNetwork) -> Encoder:
        def encode(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            outputs = self._streams.unet(partial(network, {"input_ids": ids.to(torch.int32)}))
            return outputs["hidden"], outputs.get("pooled")

        return encode

    @torch.inference_mode()
    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """See NetworkRunner. Raises PlanUnfit for more rows than its plan takes."""
        repeats = len(embeddings) // len(latents)
        latents = latents.repeat(repeats, 1, 1, 1)
        inputs = {"sample": latents, "timestep": timesteps.float().repeat(repeats)}
        inputs |= self._text_inputs(embeddings, latents)
        return self._streams.unet(lambda: self._networks["unet"](inputs))["output"]

    def _text_inputs(self, embeddings: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """Return the UNet's inputs from the texts; SDXL's also reads pooled texts and the size."""
        hidden_states, pooled = self._text_encoder.parts(embeddings)
        if pooled is None:
            return {"encoder_hidden_states": hidden_states}
        height, width = (side * self.pixels_per_latent for side in latents.shape[2:])
        size = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        return {
            "encoder_hidden_states": hidden_states,
            "text_embeds": pooled,
            "time_ids": size.float().expand(len(latents), -1),
        }

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoding:
        """See NetworkRunner; beside the UNet's stream."""
        network = self._networks["vae_decoder"]
        chunks = latents.split(network.max_rows)
        return self._streams.decode(
            latents, lambda: [_to_pixels(network({"latents": chunk})["image"]) for chunk in chunks]
        )


def _to_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixels, [B, height, width, 3], and which of the images are finite."""
    finite = images.isfinite().flatten(1).all(dim=1)
    levels = (images / 2 + 0.5).clamp_(0, 1).mul_(255).round_().nan_to_num_()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite


def _image_copies(pixels: Tensor, finite: Tensor) -> list[Pixels | None]:
    """Return copies: the tensors' pinned memory is freed."""
    images = zip(pixels.numpy(), finite.tolist(), strict=True)
    return [image.copy() if is_finite else None for image, is_finite in images]


class CudaStreams:
    """Two streams of a GPU, for the UNet and the decoder. On a CPU nothing overlaps."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._unet = torch.cuda.Stream(device) if is_gpu else None
        self._decoder = torch.cuda.Stream(device) if is_gpu else None
        self._last_step: torch.cuda.Event | None = None

    def unet(self, run: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Run after the current stream's work; the current stream waits for the outputs."""
        if self._unet is None:
            return run()
        if self._last_step is not None:
            self._last_step.synchronize()  # at most one step ahead of the GPU
        current = torch.cuda.current_stream()
        self._unet.wait_stream(current)
        with torch.cuda.stream(self._unet):
            outputs = run()
            self._last_step = torch.cuda.Event()
            self._last_step.record()
        current.wait_stream(self._unet)
        return outputs

    def decode(self, latents: Tensor, run: Callable[[], list[tuple[Tensor, Tensor]]]) -> Decoding:
        """Run beside the current stream, and copy the images to the host."""
        if self._decoder is None:
            return Decoded([image for decoded in run() for image in _image_copies(*decoded)])
        self._decoder.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._decoder):
            latents.record_stream(self._decoder)
            decoded = [(_on_host(pixels), _on_host(finite)) for pixels, finite in run()]
            done = torch.cuda.Event()
            done.record()
        return _ImageCopy(decoded, done)


def _on_host(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _ImageCopy:
    """A Decoding: images that are being copied to the host."""

    decoded: list[tuple[Tensor, Tensor]]
    copied: torch.cuda.Event

    def done(self) -> bool:
        """See Decoding."""
        return bool(self.copied.query())

    def images(self) -> list[Pixels | None]:
        """See Decoding."""
        self.copied.synchronize()
        return [image for decoded in self.decoded for image in _image_copies(*decoded)]
