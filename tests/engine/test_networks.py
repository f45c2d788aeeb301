"""The optimized networks on a CPU: they compute diffusers' numbers."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from engine.gpu.blocks import UnsupportedNetwork
from engine.gpu.unet import UNet, VaeDecoder

CROSS, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
STABLE_DIFFUSION = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "down_block_types": (CROSS, CROSS, PLAIN_DOWN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
XL = {
    **STABLE_DIFFUSION,
    "down_block_types": (PLAIN_DOWN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


def network(kind, **config):
    """Return a network with random biases and norms; those of a fresh one have no effect."""
    torch.manual_seed(1)
    made = kind(**config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def extras(rows):
    """Return XL's additional inputs."""
    generator = torch.Generator().manual_seed(2)
    pooled = torch.randn((rows, 16), generator=generator)
    return pooled, torch.tensor([[64.0, 48, 0, 0, 64, 48]]).repeat(rows, 1)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, XL], ids=["1.5", "XL"])
@pytest.mark.parametrize("size", [(16, 12), (10, 6)], ids=["even", "odd halves"])
@pytest.mark.parametrize("times", [1, 2], ids=["a text each", "two texts each"])
def test_a_unet_is_diffusers(config, size, times):
    stock = network(UNet2DConditionModel, **config)
    latents, timesteps = torch.randn((2, 4, *size)), torch.tensor([3.0, 700.0])
    texts = torch.randn((2 * times, 7, 24))
    more = extras(2 * times) if config is XL else ()

    with torch.inference_mode():
        ours = UNet(stock)(latents, timesteps, texts, *more)
        theirs = stock(
            latents.repeat(times, 1, 1, 1),
            timesteps.repeat(times),
            encoder_hidden_states=texts,
            added_cond_kwargs={"text_embeds": more[0], "time_ids": more[1]} if more else None,
        ).sample

    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", [True, False])
def test_a_decoder_is_diffusers(attention):
    stock = network(
        AutoencoderKL,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=attention,
    )
    latents = torch.randn((2, 4, 6, 8))

    with torch.inference_mode():
        ours = VaeDecoder(stock)(latents)
        theirs = stock.decode(latents / stock.config.scaling_factor).sample

    assert theirs.std() > 0.1
    torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "residual block"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
    ],
)
def test_an_unsupported_network_is_rejected(changed, complaint):
    with pytest.raises(UnsupportedNetwork, match=complaint):
        UNet(network(UNet2DConditionModel, **{**STABLE_DIFFUSION, **changed}))
