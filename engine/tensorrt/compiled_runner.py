"""Runs a model's compiled parts, whoever executes them: what goes in, what comes out, in chunks."""

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

Size = tuple[int, int]  #: width and height of a picture, in pixels


class Network(Protocol):
    """One compiled part."""

    most_rows: int  #: in one call

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Its outputs, on the current stream; valid until the next call."""
        ...


@dataclass(frozen=True)
class PipelineConfig:
    """What the model's folder says besides its weights."""

    tokenizers: tuple[Any, ...]  #: of text_encoder, and SDXL's text_encoder_2
    noise_schedule: NoiseSchedule
    latent_channels: int
    pixels_per_latent: int

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """One for each tokenizer."""
        return ("text_encoder", "text_encoder_2")[: len(self.tokenizers)]

    @property
    def parts(self) -> tuple[str, ...]:
        """All that is compiled."""
        return (*self.text_encoders, "unet", "vae_decoder")


def read_pipeline_config(model_dir: Path) -> PipelineConfig:
    """Raises OSError for a missing file, UnsupportedSchedule."""
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
    """A NetworkRunner of networks that take what their ports say. Not to be shared by threads."""

    def __init__(
        self,
        facts: PipelineConfig,
        networks: Mapping[str, Network],
        *,
        sizes: frozenset[Size] | None,
        device: torch.device,
    ) -> None:
        self.noise_schedule = facts.noise_schedule
        self.latent_channels = facts.latent_channels
        self.pixels_per_latent = facts.pixels_per_latent
        self.sizes = sizes
        self.device = device
        self._networks = networks
        self._lanes = CudaStreams(device)
        self._texts = TextEncoder(
            facts.tokenizers,
            [self._encoder(networks[part]) for part in facts.text_encoders],
            device,
            most_rows=networks["text_encoder"].most_rows,
        )
        self.encode = self._texts.encode

    def _encoder(self, network: Network) -> Encoder:
        def encode(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            outputs = self._lanes.unet(partial(network, {"input_ids": ids.to(torch.int32)}))
            return outputs["hidden"], outputs.get("pooled")

        return encode

    @torch.inference_mode()
    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """See NetworkRunner. Raises PlanUnfit for more rows than its plan takes."""
        texts_each = len(embeddings) // len(latents)
        latents = latents.repeat(texts_each, 1, 1, 1)
        inputs = {"sample": latents, "timestep": timesteps.float().repeat(texts_each)}
        inputs |= self._told(embeddings, latents)
        return self._lanes.unet(lambda: self._networks["unet"](inputs))["output"]

    def _told(self, embeddings: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """What the UNet is told of the texts; SDXL's also reads a summary and the size."""
        words, summary = self._texts.parts(embeddings)
        if summary is None:
            return {"encoder_hidden_states": words}
        height, width = (side * self.pixels_per_latent for side in latents.shape[2:])
        size = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        return {
            "encoder_hidden_states": words,
            "text_embeds": summary,
            "time_ids": size.float().expand(len(latents), -1),
        }

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoding:
        """See NetworkRunner; beside the UNet's stream."""
        network = self._networks["vae_decoder"]
        chunks = latents.split(network.most_rows)
        return self._lanes.decode(
            latents, lambda: [_shades(network({"latents": chunk})["picture"]) for chunk in chunks]
        )


def _shades(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels, [B, height, width, 3], and which of the pictures are made of numbers."""
    finite = pictures.isfinite().flatten(1).all(dim=1)
    shades = (pictures / 2 + 0.5).clamp_(0, 1).mul_(255).round_().nan_to_num_()
    return shades.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite


def _pictures(pixels: Tensor, finite: Tensor) -> list[Pixels | None]:
    """Copies: the tensors' memory goes back to where it came from."""
    both = zip(pixels.numpy(), finite.tolist(), strict=True)
    return [picture.copy() if good else None for picture, good in both]


class CudaStreams:
    """Two streams of a GPU: the UNet's and the decoder's. On a CPU there is nothing to overlap."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._unet = torch.cuda.Stream(device) if is_gpu else None
        self._decoder = torch.cuda.Stream(device) if is_gpu else None
        self._last_step: torch.cuda.Event | None = None

    def unet(self, run: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Run after what the current stream holds; that goes on with the outputs."""
        if self._unet is None:
            return run()
        if self._last_step is not None:
            self._last_step.synchronize()  # a step ahead of the GPU, and no more
        current = torch.cuda.current_stream()
        self._unet.wait_stream(current)
        with torch.cuda.stream(self._unet):
            outputs = run()
            self._last_step = torch.cuda.Event()
            self._last_step.record()
        current.wait_stream(self._unet)
        return outputs

    def decode(self, latents: Tensor, run: Callable[[], list[tuple[Tensor, Tensor]]]) -> Decoding:
        """Run beside the current stream, and copy what comes out to the host."""
        if self._decoder is None:
            return Decoded([picture for made in run() for picture in _pictures(*made)])
        self._decoder.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._decoder):
            latents.record_stream(self._decoder)
            made = [(_on_host(pixels), _on_host(finite)) for pixels, finite in run()]
            done = torch.cuda.Event()
            done.record()
        return _Copying(made, done)


def _on_host(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _Copying:
    """Pictures on their way to the host."""

    made: list[tuple[Tensor, Tensor]]
    ready: torch.cuda.Event

    def done(self) -> bool:
        """See Decoding."""
        return bool(self.ready.query())

    def pictures(self) -> list[Pixels | None]:
        """See Decoding."""
        self.ready.synchronize()
        return [picture for made in self.made for picture in _pictures(*made)]
