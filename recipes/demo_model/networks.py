"""Networks of a small Stable Diffusion: built, deepened, loaded and exported."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from recipes.demo_model.tokens import LENGTH, Encoder

LATENT_SHAPE: Final = (4, 32, 32)  #: of an image of 256 by 256
#: Stable Diffusion's constant, so that code which hard-codes it works with this model.
SCALING: Final = 0.18215
_WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
_TEXT_PREFIX: Final = "text_model."  # transformers 4 and 5 both read the names that have it


@dataclass(frozen=True)
class Sizes:
    """How wide and deep. `layers` is for each UNet level from fine to coarse."""

    vae_channels: tuple[int, ...] = (32, 64, 96, 128)
    unet_channels: tuple[int, int, int] = (96, 160, 192)
    layers: tuple[int, int, int] = (1, 2, 1)
    text_width: int = 256
    text_layers: int = 3
    groups: int = 32


TOY: Final = Sizes((8, 8, 8, 8), (16, 16, 16), (1, 1, 1), 16, 1, 8)


class Denoiser(nn.Module):
    """UNet and text encoder: they learn together."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text = text

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """V [n, 4, h, w] for latents of that shape, timesteps [n] and tokens [n, 77]."""
        prediction: Tensor = self.unet(latents, timesteps, self.text(tokens)[0]).sample
        return prediction


@dataclass(frozen=True, eq=False)
class Networks:
    """Networks of a model folder: everything but its tokenizer."""

    vae: AutoencoderKL
    denoiser: Denoiser

    @property
    def million_parameters(self) -> float:
        modules: tuple[nn.Module, ...] = (self.vae, self.denoiser)
        return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def build(sizes: Sizes, encoder: Encoder) -> Networks:
    """Untrained networks."""
    return Networks(_vae(sizes), Denoiser(_unet(sizes), _text(sizes, encoder)))


def _vae(sizes: Sizes) -> AutoencoderKL:
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=sizes.groups // 2,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=SCALING,
    )


def _unet(sizes: Sizes) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet_channels,
        layers_per_block=sizes.layers,
        norm_num_groups=sizes.groups,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )
    nn.init.normal_(unet.conv_out.weight, std=1e-3)  # the first predictions are near zero
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def _text(sizes: Sizes, encoder: Encoder) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=encoder.size,
        hidden_size=sizes.text_width,
        intermediate_size=3 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=encoder.start,
        eos_token_id=encoder.end,
        pad_token_id=encoder.end,
        projection_dim=sizes.text_width,
    )
    return CLIPTextModel(config)


# --- going on from trained weights


def warm_start(networks: Networks, folder: Path) -> None:
    """Fill the networks with a model's weights; where the UNet is deeper, nothing changes yet."""
    networks.vae.load_state_dict(load_file(folder / "vae" / _WEIGHTS))
    unet = networks.denoiser.unet
    config = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    deepen(load_file(folder / "unet" / _WEIGHTS), _levels(config["layers_per_block"]), unet)
    load_text(networks.denoiser.text, load_file(folder / "text_encoder" / "model.safetensors"))


def _levels(layers: int | list[int]) -> tuple[int, ...]:
    return (layers,) * 3 if isinstance(layers, int) else tuple(layers)


def deepen(weights: Mapping[str, Tensor], layers: tuple[int, ...], unet: nn.Module) -> None:
    """Load a UNet of fewer layers into one of more, which then draws exactly what the other did.

    An added layer starts as the identity: its last convolution is zero (Chen et al. 2016, for
    residual networks), and on the way up its shortcut passes on the hidden half, not the skip.
    """
    wanted = unet.state_dict()
    moved = {_new_name(name, layers, unet): tensor.float() for name, tensor in weights.items()}
    added = [name for name in wanted if name not in moved]
    for name in added:
        moved[name] = wanted[name]
        if ".conv2." in name or ".proj_out." in name:
            moved[name] = torch.zeros_like(wanted[name])
        elif name.endswith("conv_shortcut.weight"):
            moved[name] = _passing_first_half(wanted[name])
        elif name.endswith("conv_shortcut.bias"):
            moved[name] = torch.zeros_like(wanted[name])
    unet.load_state_dict(moved)


def _new_name(name: str, layers: tuple[int, ...], unet: Any) -> str:
    """On the way up the old last layer stays last: it alone sees the finer level's skip."""
    parts = name.split(".")
    if parts[0] != "up_blocks" or parts[2] not in ("resnets", "attentions"):
        return name
    old, new = layers[::-1][int(parts[1])], len(unet.up_blocks[int(parts[1])].resnets) - 1
    if int(parts[3]) == old:
        parts[3] = str(new)
    return ".".join(parts)


def _passing_first_half(shortcut: Tensor) -> Tensor:
    """Return a 1x1 convolution [out, in, 1, 1] that passes its first `out` inputs."""
    identity = torch.zeros_like(shortcut)
    identity[:, : len(shortcut), 0, 0] = torch.eye(len(shortcut))
    return identity


def load_text(text: CLIPTextModel, weights: Mapping[str, Tensor]) -> None:
    """Load the weights with or without a prefix before their names, by transformers' version."""
    prefix = _TEXT_PREFIX if next(iter(text.state_dict())).startswith(_TEXT_PREFIX) else ""
    bare = {name.removeprefix(_TEXT_PREFIX): tensor for name, tensor in weights.items()}
    text.load_state_dict({prefix + name: t.float() for name, t in bare.items()}, strict=False)


# --- diffusers' folders


def load(folder: Path) -> Networks:
    """Load a model's networks in float32."""
    full = {"dtype": torch.float32, "low_cpu_mem_usage": False}
    vae = AutoencoderKL.from_pretrained(folder / "vae", **full)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **full)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    load_text(text, load_file(folder / "text_encoder" / "model.safetensors"))
    return Networks(vae, Denoiser(unet, text).eval())


def export(networks: Networks, tokenizer: Path, folder: Path, *, attribution: str) -> None:
    """Write the model in diffusers' layout, in half precision, with its attribution."""
    shutil.rmtree(folder, ignore_errors=True)
    text = networks.denoiser.text
    for name, module in (("vae", networks.vae), ("unet", networks.denoiser.unet)):
        module.save_config(folder / name)
        save_file(_half(module.state_dict()), folder / name / _WEIGHTS, {"format": "pt"})
    (folder / "text_encoder").mkdir()
    prefixed = {
        _TEXT_PREFIX + name.removeprefix(_TEXT_PREFIX): tensor
        for name, tensor in _half(text.state_dict()).items()
    }
    save_file(prefixed, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    _write_json(folder / "text_encoder" / "config.json", _text_config(text))
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(folder / "model_index.json", _INDEX)
    shutil.copytree(tokenizer, folder / "tokenizer")
    (folder / "ATTRIBUTION.md").write_text(attribution, "utf-8")


def _half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().half().contiguous().cpu()
        for name, tensor in weights.items()
        if tensor.is_floating_point()
    }


def _text_config(text: CLIPTextModel) -> dict[str, Any]:
    """Convert the configuration to names that every version of transformers reads."""
    plain = (int, float, str, bool, type(None))
    config = {name: v for name, v in text.config.to_dict().items() if isinstance(v, plain)}
    config.pop("torch_dtype", None)
    return config | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": "float32",  # a load without a dtype gives what the other networks get
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


_SCHEDULER: Final = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "thresholding": False,
}
_INDEX: Final = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
