"""Stable Diffusions in diffusers' layout that export in seconds: real parts, random weights."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

DEMO = Path(__file__).parents[2] / "models/darkroom-demo"
VOCABULARY = 4096  #: of the demo model's tokenizer, which these borrow


def tiny_sd(folder):
    """Like Stable Diffusion 1.5."""
    torch.manual_seed(1)
    _text_encoder(CLIPTextModel, 16).save_pretrained(folder / "text_encoder")
    _unet(
        ("CrossAttnDownBlock2D", "DownBlock2D"),
        ("UpBlock2D", "UpBlock2D"),
        channels=(8, 16),
        heads=4,
        features=16,
    ).save_pretrained(folder / "unet")
    _rest(folder, "StableDiffusionPipeline", ["tokenizer"])
    return folder


def tiny_xl(folder):
    """Like SDXL: two text encoders, and a UNet that also reads the size."""
    torch.manual_seed(2)
    _text_encoder(CLIPTextModel, 32).save_pretrained(folder / "text_encoder")
    _text_encoder(CLIPTextModelWithProjection, 64).save_pretrained(folder / "text_encoder_2")
    _unet(
        ("DownBlock2D", "CrossAttnDownBlock2D"),
        ("CrossAttnUpBlock2D", "UpBlock2D"),
        channels=(32, 64),
        heads=2,
        features=32 + 64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
        use_linear_projection=True,
    ).save_pretrained(folder / "unet")
    _rest(folder, "StableDiffusionXLPipeline", ["tokenizer", "tokenizer_2"])
    return folder


def _text_encoder(kind, width):
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    return kind(config)


def _unet(down, up, *, channels, heads, features, **more):
    return UNet2DConditionModel(
        block_out_channels=channels,
        layers_per_block=1,
        sample_size=16,
        cross_attention_dim=features,
        down_block_types=down,
        up_block_types=up,
        mid_block_type=None,
        norm_num_groups=4,
        attention_head_dim=heads,
        **more,
    )


def _rest(folder, kind, tokenizers):
    AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    for name in tokenizers:
        shutil.copytree(DEMO / "tokenizer", folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
