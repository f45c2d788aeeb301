"""Building blocks of the networks: residual blocks, attentions and transformers.

They are made from diffusers' modules and share their weights. Activations are channels-last,
[rows, height, width, channels] or [rows, tokens, channels].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.gpu.norm import Norm
from engine.gpu.ops import Geglu, add, geglu, group_norm, interleave, layer_norm


class UnsupportedNetwork(ValueError):
    """A network with a part that is not implemented here; diffusers' own module runs it."""


def convolve(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 1) -> Tensor:
    """Convolve without the bias, which the next operation adds."""
    y = functional.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding)
    return y.permute(0, 2, 3, 1).contiguous()  # no copy on a GPU


def kernel_of(convolution: Any) -> Tensor:
    """Return the weight of a convolution, channels last."""
    weight: Tensor = convolution.weight
    return weight.contiguous(memory_format=torch.channels_last)


def matrix_of(module: Any) -> Tensor:
    """Return the weight of a linear layer, or of a 1x1 convolution."""
    weight: Tensor = module.weight
    return weight.flatten(1).contiguous()


def add_product(tokens: Tensor, inputs: Tensor, matrix: Tensor) -> Tensor:
    """Add a linear layer's outputs to the tokens in place and return them."""
    flat = tokens.flatten(0, 1)
    return flat.addmm_(inputs.flatten(0, 1), matrix.t()).view_as(tokens)


def repeat_rows(x: Tensor, others: Tensor) -> Tensor:
    """Repeat the rows of x until they are as many as those of `others`."""
    times = len(others) // len(x)
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))


class ResidualBlock:
    """diffusers' ResnetBlock2D."""

    def __init__(self, block: Any) -> None:
        supported = block.time_emb_proj is None or block.time_embedding_norm == "default"
        supported = supported and block.output_scale_factor == 1
        if not supported or block.up or block.down or block.skip_time_act:
            raise UnsupportedNetwork(f"a residual block of kind {block.time_embedding_norm}")
        self._norms = Norm.of(block.norm1), Norm.of(block.norm2)
        self._kernels = kernel_of(block.conv1), kernel_of(block.conv2)
        self._bias = block.conv2.bias
        #: of the first convolution; the time embedding's share is added to it
        self.inner_bias: Tensor = block.conv1.bias
        self.time_projection: Any = block.time_emb_proj
        self._shortcut = None if block.conv_shortcut is None else matrix_of(block.conv_shortcut)
        if block.conv_shortcut is not None:
            self._bias = block.conv2.bias + block.conv_shortcut.bias

    def __call__(self, parts: Sequence[Tensor], shift: Tensor) -> Tensor:
        """Run on the parts concatenated by channel; see ops.group_norm for `shift`."""
        x = group_norm(parts, self._norms[0], silu=True)
        x = convolve(x, self._kernels[0])
        x = group_norm([x], self._norms[1], shift=shift, silu=True)
        x = convolve(x, self._kernels[1])
        return add(self._shortcut_output(parts), x, self._bias)

    def _shortcut_output(self, parts: Sequence[Tensor]) -> Tensor:
        if self._shortcut is None:
            return parts[0]
        widths = [part.shape[-1] for part in parts]
        matrices = self._shortcut.split(widths, dim=1)
        total = functional.linear(parts[0], matrices[0])
        flat = total.view(-1, total.shape[-1])
        for part, matrix in zip(parts[1:], matrices[1:], strict=True):
            flat.addmm_(part.reshape(-1, part.shape[-1]), matrix.t())
        return total


class Upsample:
    """Nearest-neighbor upsampling by two, then a convolution of 3 by 3.

    Two of the three taps each way fall on the same pixel, so each of the four phases of new pixels
    is a convolution of 2 by 2 of the old ones: one convolution with four times the channels.
    """

    def __init__(self, upsampler: Any) -> None:
        if upsampler.norm is not None or upsampler.use_conv_transpose or not upsampler.use_conv:
            raise UnsupportedNetwork("an upsampler that is not nearest-neighbor with a convolution")
        self._kernel = kernel_of(upsampler.conv)
        self._bias = upsampler.conv.bias
        weight = upsampler.conv.weight.float()
        taps = (
            torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2),
            torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2),
        )
        phases = [
            torch.stack(pair, 3)
            for rows in taps
            for pair in (
                (rows[..., 0], rows[..., 1] + rows[..., 2]),
                (rows[..., 0] + rows[..., 1], rows[..., 2]),
            )
        ]
        self._phases = (
            torch.cat(phases)
            .to(upsampler.conv.weight.dtype)
            .contiguous(memory_format=torch.channels_last)
        )

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if size == (2 * x.shape[1], 2 * x.shape[2]):
            return interleave(convolve(x, self._phases), self._bias)
        larger = functional.interpolate(x.permute(0, 3, 1, 2), size=size, mode="nearest")
        convolved: Tensor = convolve(larger.permute(0, 2, 3, 1), self._kernel) + self._bias
        return convolved


class Attention:
    """diffusers' Attention, self-attention or cross-attention to a text."""

    def __init__(self, attention: Any) -> None:
        unsupported = (
            "spatial_norm",
            "group_norm",
            "norm_q",
            "norm_k",
            "norm_cross",
            "added_kv_proj_dim",
        )
        if (
            any(getattr(attention, name, None) for name in unsupported)
            or attention.rescale_output_factor != 1
        ):
            raise UnsupportedNetwork("an attention with extra norms or projections")
        self._heads: int = attention.heads
        key_and_value = torch.cat([matrix_of(attention.to_k), matrix_of(attention.to_v)])
        if attention.is_cross_attention:
            self._input_projection, self.text_projection = matrix_of(attention.to_q), key_and_value
        else:
            self._input_projection = torch.cat([matrix_of(attention.to_q), key_and_value])
        self._out: Tensor = matrix_of(attention.to_out[0])
        self.bias: Tensor = attention.to_out[0].bias

    def attend_to_self(self, tokens: Tensor, normed: Tensor) -> Tensor:
        """Add the self-attention to the tokens, without `bias`."""
        query, key, value = self._split(functional.linear(normed, self._input_projection), 3)
        return self._attend(tokens, query, key, value)

    def attend_to_text(self, tokens: Tensor, normed: Tensor, keys_and_values: Tensor) -> Tensor:
        """Add the cross-attention to `keys_and_values`, the `text_projection` of a text."""
        [query] = self._split(functional.linear(normed, self._input_projection), 1)
        key, value = self._split(keys_and_values, 2)
        return self._attend(tokens, query, key, value)

    def _split(self, joined: Tensor, ways: int) -> Sequence[Tensor]:
        split = joined.unflatten(2, (ways, self._heads, -1))
        heads: Sequence[Tensor] = split.permute(2, 0, 3, 1, 4).unbind()
        return heads

    def _attend(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = functional.scaled_dot_product_attention(query, key, value)
        return add_product(tokens, attended.transpose(1, 2).flatten(2), self._out)


class TransformerBlock:
    """diffusers' BasicTransformerBlock."""

    def __init__(self, block: Any, shift: Tensor) -> None:
        """Add `shift` to the incoming tokens; `self.shift` belongs to the outgoing ones."""
        if block.norm_type != "layer_norm" or block.only_cross_attention or block.pos_embed:
            raise UnsupportedNetwork(f"a transformer block with {block.norm_type}")
        if type(block.ff.net[0]).__name__ != "GEGLU":
            raise UnsupportedNetwork("a transformer block without GEGLU")
        self._norms = [Norm.of(norm) for norm in (block.norm1, block.norm2, block.norm3)]
        self._attention, self.cross_attention = Attention(block.attn1), Attention(block.attn2)
        self._inner, self._outer = Geglu.of(block.ff.net[0].proj), matrix_of(block.ff.net[2])
        after_attention = shift + self._attention.bias
        after_text = after_attention + self.cross_attention.bias
        self._shifts = shift, after_attention, after_text
        self.shift = after_text + block.ff.net[2].bias

    def __call__(self, tokens: Tensor, keys_and_values: Tensor) -> Tensor:
        """Return the block's output, in the memory of `tokens`."""
        normed = layer_norm(tokens, self._shifts[0], self._norms[0])
        tokens = self._attention.attend_to_self(tokens, normed)
        normed = layer_norm(tokens, self._shifts[1], self._norms[1])
        tokens, normed = (repeat_rows(each, keys_and_values) for each in (tokens, normed))
        tokens = self.cross_attention.attend_to_text(tokens, normed, keys_and_values)
        normed = layer_norm(tokens, self._shifts[2], self._norms[2])
        hidden = geglu(normed, self._inner)
        return add_product(tokens, hidden, self._outer)


class Transformer:
    """diffusers' Transformer2DModel."""

    def __init__(self, transformer: Any) -> None:
        if not transformer.is_input_continuous:
            raise UnsupportedNetwork("a transformer without continuous input")
        self._norm = Norm.of(transformer.norm)
        self._input_matrix, self._input_bias = (
            matrix_of(transformer.proj_in),
            transformer.proj_in.bias,
        )
        self._output_matrix = matrix_of(transformer.proj_out)
        # Biases of the blocks are summed here, and added where their output is read.
        shift = torch.zeros_like(self._input_bias)
        self.blocks = []
        for block in transformer.transformer_blocks:
            self.blocks.append(TransformerBlock(block, shift))
            shift = self.blocks[-1].shift
        self._output_bias = functional.linear(shift, self._output_matrix, transformer.proj_out.bias)

    def __call__(self, x: Tensor, texts: Iterator[Tensor]) -> Tensor:
        """Run with each block's keys and values, `texts`, whose rows may be a multiple of x's."""
        tokens = group_norm([x], self._norm, silu=False).flatten(1, 2)
        tokens = functional.linear(tokens, self._input_matrix, self._input_bias)
        for block in self.blocks:
            tokens = block(tokens, next(texts))
        output = functional.linear(tokens, self._output_matrix).unflatten(1, x.shape[1:3])
        return add(x, output, self._output_bias)
