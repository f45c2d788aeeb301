"""Stable Diffusion's UNet and VAE decoder, optimized.

They are made from diffusers' modules, share their weights and compute the same numbers. The
differences: channels last throughout, so that nothing is reordered; norms, activations, sums and
biases in as few passes over memory as possible (`ops`); one matrix product where diffusers has
several of the same input; no copy where diffusers concatenates; and upsampling folded into the
convolution after it, which then does 4/9 of the work.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.gpu.blocks import (
    ResidualBlock,
    Transformer,
    UnsupportedNetwork,
    Upsample,
    convolve,
    kernel_of,
    matrix_of,
    repeat_rows,
)
from engine.gpu.norm import Norm
from engine.gpu.ops import add, group_norm

_DOWN: Final = {"CrossAttnDownBlock2D", "DownBlock2D"}
_UP: Final = {"CrossAttnUpBlock2D", "UpBlock2D"}

#: On Hopper cuDNN's takes half the time of the others, which run what it does not support.
_ATTENTION: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class UNet:
    """diffusers' UNet2DConditionModel, as Stable Diffusion 1, 2 and XL use it."""

    def __init__(self, unet: Any) -> None:
        """Raise UnsupportedNetwork for a network that these blocks cannot run."""
        _require_supported(unet.config)
        self._time, self._time_embedding = unet.time_proj, unet.time_embedding
        self._sizes: Any = None
        self._size_embedding: Any = None
        if unet.config.addition_embed_type == "text_time":
            self._sizes, self._size_embedding = unet.add_time_proj, unet.add_embedding
        self._first, self._first_bias = kernel_of(unet.conv_in), unet.conv_in.bias
        self._down = [_Level(block, going_down=True) for block in unet.down_blocks]
        self._mid = _Level(unet.mid_block, going_down=None)
        self._up = [_Level(block, going_down=False) for block in unet.up_blocks]
        self._last_norm = Norm.of(unet.conv_norm_out)
        self._last, self._last_bias = kernel_of(unet.conv_out), unet.conv_out.bias
        levels = [*self._down, self._mid, *self._up]
        blocks = [block for level in levels for block in level.residuals]
        # All projections of the time embedding are one product, and so are those of the text.
        self._shift = torch.cat([block.time_projection.weight for block in blocks])
        self._shift_bias = torch.cat(
            [block.time_projection.bias + block.inner_bias for block in blocks]
        )
        self._shift_widths = [len(block.inner_bias) for block in blocks]
        attentions = [
            block.cross_attention
            for level in levels
            for transformer in level.transformers
            for block in transformer.blocks
        ]
        self._text = torch.cat([attention.text_projection for attention in attentions])
        self._text_widths = [len(attention.text_projection) for attention in attentions]

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        texts: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Return the output for [B, C, h, w], float32 [B] and texts [B, tokens, features].

        XL also takes `pooled` and `sizes`. Texts may be a multiple of the latents: then each of
        the latents runs with several, and what does not depend on the text is computed once.
        """
        with sdpa_kernel(_ATTENTION, set_priority=True):
            return self._output(latents, timesteps, texts, pooled, sizes)

    def _output(
        self,
        latents: Tensor,
        timesteps: Tensor,
        texts: Tensor,
        pooled: Tensor | None,
        sizes: Tensor | None,
    ) -> Tensor:
        x = latents.permute(0, 2, 3, 1).contiguous()
        if pooled is not None:  # XL's time embedding depends on the text
            x = repeat_rows(x, texts)
        shifts = iter(self._shifts(timesteps, x.dtype, pooled, sizes))
        text = functional.linear(texts, self._text)
        keys_and_values = iter(text.split(self._text_widths, dim=-1))
        x = convolve(x, self._first) + self._first_bias
        skips = [x]
        for level in self._down:
            for skip in level.down(x, shifts, keys_and_values):
                x = skip
                skips.append(x)
        x = self._mid.middle(x, shifts, keys_and_values)
        for level in self._up:
            size = skips[-len(level.residuals) - 1].shape[1:3] if level.upsample else None
            x = level.up(x, skips, shifts, keys_and_values, size)
        x = convolve(group_norm([x], self._last_norm, silu=True), self._last)
        output: Tensor = (x + self._last_bias).permute(0, 3, 1, 2)
        return output

    def _shifts(
        self, timesteps: Tensor, dtype: torch.dtype, pooled: Tensor | None, sizes: Tensor | None
    ) -> Sequence[Tensor]:
        embedding = self._time_embedding(self._time(timesteps).to(dtype))
        if self._sizes is not None:
            assert pooled is not None
            assert sizes is not None
            added = self._sizes(sizes.flatten()).view(len(sizes), -1).to(dtype)
            added = self._size_embedding(torch.cat([pooled, added], dim=-1))
            embedding = repeat_rows(embedding, added) + added
        shifts = functional.linear(functional.silu(embedding), self._shift, self._shift_bias)
        each: Sequence[Tensor] = shifts.split(self._shift_widths, dim=-1)
        return each


class _Level:
    """One block of the UNet: residual blocks, transformers between them, and a change of size."""

    def __init__(self, block: Any, *, going_down: bool | None) -> None:
        kind = type(block).__name__
        known = {True: _DOWN, False: _UP, None: {"UNetMidBlock2DCrossAttn"}}[going_down]
        if kind not in known:
            raise UnsupportedNetwork(f"a block of kind {kind}")
        self.residuals = [ResidualBlock(residual) for residual in block.resnets]
        self.transformers = [Transformer(one) for one in getattr(block, "attentions", None) or ()]
        upsamplers = getattr(block, "upsamplers", None)
        self.upsample = Upsample(upsamplers[0]) if upsamplers else None
        downsamplers = getattr(block, "downsamplers", None)
        self._downsample = downsamplers[0].conv if downsamplers else None

    def down(
        self, x: Tensor, shifts: Iterator[Tensor], texts: Iterator[Tensor]
    ) -> Iterator[Tensor]:
        """Yield the skip connections; the last is also the output."""
        for at, residual in enumerate(self.residuals):
            x = residual([x], next(shifts))
            if self.transformers:
                x = self.transformers[at](x, texts)
            yield x
        if self._downsample is not None:
            yield convolve(x, kernel_of(self._downsample), stride=2) + self._downsample.bias

    def middle(self, x: Tensor, shifts: Iterator[Tensor], texts: Iterator[Tensor]) -> Tensor:
        """Run as the middle block."""
        first, *others = self.residuals
        x = first([x], next(shifts))
        for transformer, residual in zip(self.transformers, others, strict=True):
            x = residual([transformer(x, texts)], next(shifts))
        return x

    def up(
        self,
        x: Tensor,
        skips: list[Tensor],
        shifts: Iterator[Tensor],
        texts: Iterator[Tensor],
        size: Sequence[int] | None,
    ) -> Tensor:
        """Run with skip connections taken off the end of `skips`."""
        for at, residual in enumerate(self.residuals):
            x = residual([x, repeat_rows(skips.pop(), x)], next(shifts))
            if self.transformers:
                x = self.transformers[at](x, texts)
        if self.upsample is not None and size is not None:
            x = self.upsample(x, (size[0], size[1]))
        return x


def _require_supported(config: Any) -> None:
    """Raise UnsupportedNetwork for options that change the numbers and are not implemented."""
    unsupported = [
        name
        for name, usual in (
            ("center_input_sample", False),
            ("class_embed_type", None),
            ("num_class_embeds", None),
            ("encoder_hid_dim_type", None),
            ("time_embedding_type", "positional"),
            ("time_cond_proj_dim", None),
            ("act_fn", "silu"),
            ("mid_block_type", "UNetMidBlock2DCrossAttn"),
            ("resnet_skip_time_act", False),
            ("conv_in_kernel", 3),
            ("conv_out_kernel", 3),
            ("dual_cross_attention", False),
            ("attention_type", "default"),
            ("upcast_attention", False),
            ("downsample_padding", 1),
        )
        if getattr(config, name, usual) != usual
    ]
    if unsupported or config.addition_embed_type not in (None, "text_time"):
        raise UnsupportedNetwork(
            f"a UNet with {', '.join(unsupported) or config.addition_embed_type}"
        )


class VaeDecoder:
    """The decoder of diffusers' AutoencoderKL, from latents to images."""

    def __init__(self, vae: Any) -> None:
        """Raise UnsupportedNetwork for a network that these blocks cannot run."""
        decoder = vae.decoder
        if vae.config.act_fn != "silu":
            raise UnsupportedNetwork(f"a decoder with {vae.config.act_fn}")
        if any(type(block).__name__ != "UpDecoderBlock2D" for block in decoder.up_blocks):
            raise UnsupportedNetwork("a decoder with blocks other than UpDecoderBlock2D")
        self._scaling: float = vae.config.scaling_factor
        self._latents = vae.post_quant_conv
        self._first = decoder.conv_in
        self._residuals = [ResidualBlock(block) for block in decoder.mid_block.resnets]
        self._attentions = [one for one in decoder.mid_block.attentions if one is not None]
        self._attention_norms = [Norm.of(one.group_norm) for one in self._attentions]
        self._levels = [
            (
                [ResidualBlock(block) for block in level.resnets],
                Upsample(level.upsamplers[0]) if level.upsamplers else None,
            )
            for level in decoder.up_blocks
        ]
        self._last_norm, self._last = Norm.of(decoder.conv_norm_out), decoder.conv_out

    def __call__(self, latents: Tensor) -> Tensor:
        """Return [B, height, width, 3], about -1 to 1, for [B, C, h, w]."""
        x = latents / self._scaling
        x = x.permute(0, 2, 3, 1).to(self._first.weight.dtype)
        if self._latents is not None:
            x = functional.linear(x, matrix_of(self._latents), self._latents.bias)
        x = convolve(x, kernel_of(self._first)) + self._first.bias
        x = self._residual(self._residuals[0], x)
        for at, residual in enumerate(self._residuals[1:]):
            if self._attentions:
                x = self._attend(x, at)
            x = self._residual(residual, x)
        for residuals, upsample in self._levels:
            for residual in residuals:
                x = self._residual(residual, x)
            if upsample is not None:
                x = upsample(x, (2 * x.shape[1], 2 * x.shape[2]))
        x = convolve(group_norm([x], self._last_norm, silu=True), kernel_of(self._last))
        output: Tensor = x + self._last.bias
        return output

    def _residual(self, block: ResidualBlock, x: Tensor) -> Tensor:
        return block([x], block.inner_bias[None])

    def _attend(self, x: Tensor, at: int) -> Tensor:
        """Attend in plain PyTorch: the one head is too wide for the fast attention kernels."""
        attention = self._attentions[at]
        tokens = group_norm([x], self._attention_norms[at], silu=False).flatten(1, 2)
        query, key, value = (
            functional.linear(tokens, layer.weight, layer.bias)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
        attended = torch.bmm(scores.softmax(dim=-1), value)
        out = attention.to_out[0]
        return add(x, functional.linear(attended, out.weight).view(x.shape), out.bias)
