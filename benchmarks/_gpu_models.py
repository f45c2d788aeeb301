"""Stable Diffusion 1.5's and XL's architecture with random weights: speed does not depend on them.

For `gpu_throughput.py`: as modules, as a folder in diffusers' layout, and as a number of FLOP.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from darkroom.generation.model_registry import CARD, weights_revision

STEPS: Final = 20
GUIDANCE: Final = 7.5
SCHEDULE: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_TOKENIZER: Final = Path(__file__).parents[1] / "models/darkroom-demo/tokenizer"
_CARD: Final = """name = "{name}"
revision = "{revision}"
description = "Random weights, to measure with."
license = "none"
scheduler = "ddim"
precision = "float16"
max_microbatch = {max_microbatch}
max_unet_rows = {rows}
width = {{ default = 512, minimum = 512, maximum = 512 }}
height = {{ default = 512, minimum = 512, maximum = 512 }}
num_inference_steps = {{ default = {steps}, minimum = 1, maximum = 50 }}
guidance_scale = {{ default = {guidance}, minimum = 1.0, maximum = 20.0 }}
"""


@dataclass(frozen=True)
class Parts:
    """Networks of a model, as diffusers' and transformers' modules."""

    name: str
    size: int  #: of an image, pixels each way
    unet: Any
    vae: Any
    tokenizers: list[Any]
    text_encoders: list[Any]


def stable_diffusion(device: str) -> Parts:
    """Build version 1.5 with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, act_fn="silu"
        )
        text = CLIPTextModel(_clip(768, layers=12, heads=12))
    return _half_precision(
        Parts("SD 1.5", 512, unet, _vae(device, 0.18215), _tokenizers(1), [text])
    )


def stable_diffusion_xl(device: str) -> Parts:
    """Build SDXL with random weights, and with the decoder for which half precision suffices."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        small = CLIPTextModel(_clip(768, layers=12, heads=12))
        large = CLIPTextModelWithProjection(_clip(1280, layers=32, heads=20, hidden_act="gelu"))
    parts = Parts("SDXL", 1024, unet, _vae(device, 0.13025), _tokenizers(2), [small, large])
    return _half_precision(parts)


def _clip(width: int, *, layers: int, heads: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        projection_dim=width,
        eos_token_id=49407,
        **more,
    )


def _vae(device: str, scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    with torch.device(device):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
            scaling_factor=scaling_factor,
            force_upcast=False,
        )


def _tokenizers(count: int) -> list[Any]:
    from transformers import CLIPTokenizer

    return [CLIPTokenizer.from_pretrained(_TOKENIZER, local_files_only=True) for _ in range(count)]


def _half_precision(parts: Parts) -> Parts:
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.half().eval().requires_grad_(False)
    return parts


def save(parts: Parts, folder: Path, *, max_microbatch: int) -> None:
    """Save a model for the registry, with microbatches of `max_microbatch` guided jobs."""
    parts.unet.save_pretrained(folder / "unet")
    parts.vae.save_pretrained(folder / "vae")
    [tokenizer], [text_encoder] = parts.tokenizers, parts.text_encoders
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULE))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    card = _CARD.format(
        name=folder.name,
        revision=weights_revision(folder),
        max_microbatch=max_microbatch,
        rows=2 * max_microbatch,
        steps=STEPS,
        guidance=GUIDANCE,
    )
    (folder / CARD).write_text(card)


def flop_per_image(make: Callable[[str], Parts]) -> float:
    """Count the FLOP of one image by diffusers' networks: two UNet rows a step, and decoding."""
    from torch.utils.flop_counter import FlopCounterMode

    parts = make("meta")
    side = parts.size // 8
    config = parts.unet.config
    added = None
    if config.addition_embed_type:
        added = {
            "text_embeds": torch.empty(1, 1280, device="meta", dtype=torch.float16),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    latents = torch.empty(1, 4, side, side, device="meta", dtype=torch.float16)
    text = torch.empty(1, 77, config.cross_attention_dim, device="meta", dtype=torch.float16)
    with FlopCounterMode(display=False) as unet:
        parts.unet(
            latents,
            torch.empty(1, device="meta"),
            encoder_hidden_states=text,
            added_cond_kwargs=added,
        )
    with FlopCounterMode(display=False) as decoder:
        parts.vae.decode(latents)
    return float(2 * STEPS * unet.get_total_flops() + decoder.get_total_flops())
