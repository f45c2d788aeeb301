"""Parts of a Stable Diffusion that are compiled: their networks, inputs and outputs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from engine.tensorrt.plans import Port

Precision = Literal["float32", "float16"]

Size = tuple[int, int]  #: width and height of an image, in pixels

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "int32": torch.int32}
TIME_IDS: Final = (
    6  #: of SDXL: original height and width, the crop's corner, target height and width
)


class UnsupportedModel(ValueError):
    """A model that cannot be compiled."""


@dataclass(frozen=True)
class Part:
    """One network, not loaded yet."""

    name: str  #: in Triton's repository
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: Precision
    pixels_per_unit: int  #: image pixels per unit of the inputs' width and height; 0: no size
    unit: int  #: width and height must be multiples of it
    vocabulary: int  #: token ids are below this; 0 where there are none
    fixed_size: "Size | None"  #: None: any size
    load: Callable[[], nn.Module]

    @property
    def has_size(self) -> bool:
        """True if its inputs depend on the image's size."""
        return self.pixels_per_unit > 0

    def sizes(self, rows: int, width: int, height: int) -> dict[str, int]:
        """Return values for the names in its inputs' dims, for an image of this size."""
        unit = self.pixels_per_unit or 1
        return {"rows": rows, "width": width // unit, "height": height // unit}


def parts_of(
    model_dir: Path, precision: Precision, *, fixed_size: Size | None = None
) -> list[Part]:
    """Return all parts of a local diffusers folder, in the order in which they run.

    Those that depend on the image's size take every size, or only `fixed_size`: TensorRT optimizes
    a network better if it knows the shapes.

    Raises UnsupportedModel, which names what is not supported, and FileNotFoundError.
    """
    index = _json(model_dir / "model_index.json")
    kind = index.get("_class_name")
    if kind not in {"StableDiffusionPipeline", "StableDiffusionXLPipeline"}:
        raise UnsupportedModel(f"{model_dir} is a {kind}, not a Stable Diffusion 1, 2 or XL")
    is_xl = kind == "StableDiffusionXLPipeline"
    unet, vae = _json(model_dir / "unet/config.json"), _json(model_dir / "vae/config.json")
    _require_supported(unet, vae)
    encoders = ["text_encoder", "text_encoder_2"] if is_xl else ["text_encoder"]
    texts = [_text_encoder(model_dir, name, precision, is_xl=is_xl) for name in encoders]
    return [
        *texts,
        _unet(model_dir, unet, vae, texts, precision, fixed_size),
        _vae_decoder(model_dir, vae, _vae_precision(vae, precision, is_xl=is_xl), fixed_size),
    ]


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _require_supported(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise UnsupportedModel(
            "its UNet takes more than latents: inpainting models are not supported"
        )
    if unet.get("class_embed_type") or unet.get("time_cond_proj_dim"):
        raise UnsupportedModel("its UNet is conditioned on classes or guidance: not supported")
    if unet.get("addition_embed_type") not in {None, "text_time"}:
        raise UnsupportedModel(
            f"its UNet needs {unet['addition_embed_type']} embeddings, which are not supported"
        )


def _vae_precision(vae: Mapping[str, Any], precision: Precision, *, is_xl: bool) -> Precision:
    # SDXL's own decoder overflows in float16; repaired ones have `force_upcast: false`.
    return "float32" if is_xl and vae.get("force_upcast", True) else precision


def _text_encoder(model_dir: Path, name: str, precision: Precision, *, is_xl: bool) -> Part:
    config = _json(model_dir / name / "config.json")
    tokens, width = config.get("max_position_embeddings", 77), config["hidden_size"]
    outputs = [Port(name="hidden", dtype=precision, dims=("rows", tokens, width))]
    if is_pooled := name == "text_encoder_2":
        pooled = config.get("projection_dim", 512)
        outputs.append(Port(name="pooled", dtype=precision, dims=("rows", pooled)))

    def load() -> nn.Module:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if is_pooled else CLIPTextModel
        encoder = _read(kind, model_dir / name, precision)
        return ExportedTextEncoder(encoder, is_penultimate=is_xl, is_pooled=is_pooled)

    return Part(
        name=name,
        inputs=(Port(name="input_ids", dtype="int32", dims=("rows", tokens)),),
        outputs=tuple(outputs),
        precision=precision,
        pixels_per_unit=0,
        unit=1,
        vocabulary=config["vocab_size"],
        fixed_size=None,
        load=load,
    )


def _unet(
    model_dir: Path,
    config: Mapping[str, Any],
    vae: Mapping[str, Any],
    texts: Sequence[Part],
    precision: Precision,
    fixed_size: Size | None,
) -> Part:
    latents = ("rows", config.get("in_channels", 4), *_area(fixed_size, _pixels_per_latent(vae)))
    features = sum(int(text.outputs[0].dims[-1]) for text in texts)
    inputs = [
        Port(name="sample", dtype="float32", dims=latents),
        Port(name="timestep", dtype="float32", dims=("rows",)),
        Port(
            name="encoder_hidden_states",
            dtype=precision,
            dims=("rows", texts[0].outputs[0].dims[1], features),
        ),
    ]
    if is_xl := config.get("addition_embed_type") == "text_time":
        inputs.append(Port(name="text_embeds", dtype=precision, dims=texts[-1].outputs[1].dims))
        inputs.append(Port(name="time_ids", dtype="float32", dims=("rows", TIME_IDS)))

    def load() -> nn.Module:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        unet = _read(UNet2DConditionModel, model_dir / "unet", precision)
        return ExportedXlUNet(unet) if is_xl else ExportedUNet(unet)

    return Part(
        name="unet",
        inputs=tuple(inputs),
        outputs=(Port(name="output", dtype="float32", dims=latents),),
        precision=precision,
        pixels_per_unit=_pixels_per_latent(vae),
        unit=_pixels_per_latent(vae) * 2 ** (len(config["block_out_channels"]) - 1),
        vocabulary=0,
        fixed_size=fixed_size,
        load=load,
    )


def _vae_decoder(
    model_dir: Path, config: Mapping[str, Any], precision: Precision, fixed_size: Size | None
) -> Part:
    def load() -> nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return ExportedDecoder(_read(AutoencoderKL, model_dir / "vae", precision))

    area = _area(fixed_size, _pixels_per_latent(config))
    pixels = ("image_height", "image_width") if fixed_size is None else fixed_size[::-1]
    latents = ("rows", config.get("latent_channels", 4), *area)
    return Part(
        name="vae_decoder",
        inputs=(Port(name="latents", dtype="float32", dims=latents),),
        outputs=(Port(name="image", dtype="float32", dims=("rows", 3, *pixels)),),
        precision=precision,
        pixels_per_unit=_pixels_per_latent(config),
        unit=_pixels_per_latent(config),
        vocabulary=0,
        fixed_size=fixed_size,
        load=load,
    )


def _area(fixed_size: Size | None, pixels_per_unit: int) -> tuple[int | str, int | str]:
    """Return height and width of latents."""
    if fixed_size is None:
        return "height", "width"
    width, height = fixed_size
    return height // pixels_per_unit, width // pixels_per_unit


def _pixels_per_latent(vae: Mapping[str, Any]) -> int:
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def _read(kind: Any, folder: Path, precision: Precision) -> Any:
    # diffusers needs the accelerate package without this option
    options = {} if "text_encoder" in folder.name else {"low_cpu_mem_usage": False}
    network = kind.from_pretrained(
        folder, dtype=DTYPES[precision], local_files_only=True, use_safetensors=True, **options
    )
    return network.eval().requires_grad_(False)


class ExportedTextEncoder(nn.Module):
    """Text encoder that returns the last hidden states, or SDXL's last but one."""

    def __init__(self, encoder: Any, *, is_penultimate: bool, is_pooled: bool) -> None:
        super().__init__()
        self._encoder, self._is_penultimate, self._is_pooled = encoder, is_penultimate, is_pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return [rows, tokens, features], and SDXL's second also pooled texts."""
        output = self._encoder(input_ids, output_hidden_states=self._is_penultimate)
        hidden = output.hidden_states[-2] if self._is_penultimate else output.last_hidden_state
        return (hidden, output.text_embeds) if self._is_pooled else (hidden,)


class ExportedUNet(nn.Module):
    """UNet with latents in float32, whatever precision it computes in."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the output for each row, at its own timestep."""
        states = sample.to(self._unet.dtype)
        return (self._unet(states, timestep, encoder_hidden_states, return_dict=False)[0].float(),)


class ExportedXlUNet(nn.Module):
    """SDXL's UNet, which also reads pooled texts and the image's size."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the output for each row, at its own timestep."""
        output = self._unet(
            sample.to(self._unet.dtype),
            timestep,
            encoder_hidden_states,
            # in one type: diffusers concatenates them with float32 numbers
            added_cond_kwargs={"text_embeds": text_embeds.float(), "time_ids": time_ids},
            return_dict=False,
        )
        return (output[0].float(),)


class ExportedDecoder(nn.Module):
    """VAE decoder with the scaling before it: `vae.decode`, not `vae.decoder` alone."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self._vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Return images in [-1, 1], in float32, so that an overflow is visible."""
        scaled = (latents / self._vae.config.scaling_factor).to(self._vae.dtype)
        return (self._vae.decode(scaled, return_dict=False)[0].float(),)


def default_size(model_dir: Path) -> Size:
    """Return the image size of the model's training. Raises FileNotFoundError."""
    unet, vae = _json(model_dir / "unet/config.json"), _json(model_dir / "vae/config.json")
    side = int(unet.get("sample_size") or 64) * _pixels_per_latent(vae)
    return side, side
