"""Runs a diffusers folder's networks with PyTorch, eagerly, on CPU or CUDA."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from engine.runner import Decoded, Decoding
from engine.schedulers import NoiseSchedule, read_noise_schedule

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
REMEMBERED_TEXTS: Final = 1024  # 77 x 768 half floats each: 120 MB for Stable Diffusion 1.5


class TorchRunner:
    """The four networks of one model, ready to be called. Not to be shared between threads."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        noise_schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.noise_schedule = noise_schedule
        self.sizes: frozenset[tuple[int, int]] | None = None
        self.device = device
        self.latent_channels: int = unet.config.in_channels
        self.pixels_per_latent: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._unet = unet
        self._vae = vae
        self._dtype = dtype
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()

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
        if threads is not None:
            torch.set_num_threads(threads)
        where, precision = torch.device(device), DTYPES[dtype]

        def network(kind: Any, folder: str) -> Any:
            # The dtype is said aloud because transformers 5 otherwise takes the file's, and
            # diffusers float32: a mixture of both fails only at the first picture.
            options = {
                "dtype": precision,
                "local_files_only": True,
                "use_safetensors": True,
            }
            if folder != "text_encoder":
                options["low_cpu_mem_usage"] = False  # True asks for the accelerate package
            loaded = kind.from_pretrained(model_dir / folder, **options)
            return loaded.eval().requires_grad_(False).to(where)

        return cls(
            tokenizer=CLIPTokenizer.from_pretrained(model_dir / "tokenizer", local_files_only=True),
            text_encoder=network(CLIPTextModel, "text_encoder"),
            # channels_last is what oneDNN's and cuDNN's convolutions want: no reordering in between
            unet=network(UNet2DConditionModel, "unet").to(memory_format=torch.channels_last),
            vae=network(AutoencoderKL, "vae").to(memory_format=torch.channels_last),
            noise_schedule=read_noise_schedule(model_dir / "scheduler" / "scheduler_config.json"),
            device=where,
            dtype=precision,
        )

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[len(prompts), tokens, features], in order. What is past the 77th token is cut off."""
        unknown = [text for text in dict.fromkeys(prompts) if text not in self._remembered]
        if unknown:
            self._remember(zip(unknown, self._encode(unknown), strict=True))
        found = [self._remembered[text] for text in prompts]
        for text in prompts:
            self._remembered.move_to_end(text)
        self._forget()
        return torch.stack(found)

    @torch.inference_mode()
    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's output in float32, [B, C, h, w]; `timesteps` is [B], one for each row."""
        sample = latents.to(self._dtype, memory_format=torch.channels_last)
        output = self._unet(sample, timesteps, encoder_hidden_states=embeddings, return_dict=False)
        return output[0].float()  # type: ignore[no-any-return]  # diffusers is not typed here

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Decoding:
        """One picture, uint8 [height, width, 3], for each of [B, C, h, w].

        None where the network made something that is not a number: a picture of it would be black.
        """
        sample = (latents / self._vae.config.scaling_factor).to(
            self._dtype, memory_format=torch.channels_last
        )
        decoded = self._vae.decode(sample, return_dict=False)[0].float()
        finite = decoded.isfinite().flatten(1).all(dim=1).tolist()
        shades = (decoded / 2 + 0.5).clamp_(0, 1).mul_(255).round_()
        pixels = shades.nan_to_num_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return Decoded([p if good else None for p, good in zip(pixels, finite, strict=True)])

    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self._text_encoder(tokens.input_ids.to(self.device))[0]  # type: ignore[no-any-return]

    def _remember(self, texts: Iterable[tuple[str, Tensor]]) -> None:
        for text, embedding in texts:
            self._remembered[text] = embedding.clone()  # a view would keep its whole batch alive

    def _forget(self) -> None:
        while len(self._remembered) > REMEMBERED_TEXTS:
            self._remembered.popitem(last=False)
