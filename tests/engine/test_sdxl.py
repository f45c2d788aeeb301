"""Stable Diffusion XL, in small: two text encoders, and sizes as UNet input."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from engine.requests import Row
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import DEMO, by_diffusers, events, images, levels_apart

TOKENIZER = DEMO / "tokenizer"


def text_encoder(kind, width, tokenizer):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=16,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(5)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24 + 16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    pipeline = StableDiffusionXLPipeline(
        vae,
        text_encoder(CLIPTextModel, 24, tokenizer),
        text_encoder(CLIPTextModelWithProjection, 16, tokenizer),
        tokenizer,
        tokenizer,
        unet,
        DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_an_image_is_that_of_diffusers(stock, tmp_path, guidance_scale):
    stock.save_pretrained(tmp_path)
    wanted = Row("a red rose", "fog", 3, 4, guidance_scale, 32, 24)
    other = Row("a lighthouse", "", 4, 6, 3.0, 32, 24)
    theirs = by_diffusers(stock, wanted)

    runner = TorchRunner.load(tmp_path, threads=None)
    ours = images(events(runner, wanted, other))[0]

    assert theirs.std() > 10
    assert levels_apart(ours, theirs) <= 1
