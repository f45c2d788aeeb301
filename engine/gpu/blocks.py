"""What the networks are made of: convolutions, attentions and what stands between them.

Made from diffusers' modules, whose weights they share. Activations have their channels innermost,
[rows, height, width, channels] or [rows, tokens, channels].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.gpu.ops import Geglu, Norm, add, geglu, group_norm, interleave, layer_norm


class UnsupportedNetwork(ValueError):
    """The network has a part that is not laid out here; diffusers' own runs it."""


def convolve(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 1) -> Tensor:
    """Without its bias: whatever reads the output next adds it on the way."""
    y = functional.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding)
    return y.permute(0, 2, 3, 1).contiguous()  # as it is, on a GPU


def kernel_of(convolution: Any) -> Tensor:
    """The weight of a convolution, channels innermost."""
    weight: Tensor = convolution.weight
    return weight.contiguous(memory_format=torch.channels_last)


def matrix_of(module: Any) -> Tensor:
    """The weight of a linear layer, or of a convolution that is one."""
    weight: Tensor = module.weight
    return weight.flatten(1).contiguous()


def add_product(tokens: Tensor, inputs: Tensor, matrix: Tensor) -> Tensor:
    """The tokens, to which a linear layer's outputs are added in place."""
    flat = tokens.flatten(0, 1)
    return flat.addmm_(inputs.flatten(0, 1), matrix.t()).view_as(tokens)


def as_many(x: Tensor, others: Tensor) -> Tensor:
    """Its rows over and over, until they are as many as the others'."""
    times = len(others) // len(x)
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))


class ResidualBlock:
    """diffusers' ResnetBlock2D."""

    def __init__(self, block: Any) -> None:
        plain = block.time_emb_proj is None or block.time_embedding_norm == "default"
        plain = plain and block.output_scale_factor == 1
        if not plain or block.up or block.down or block.skip_time_act:
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
        """The parts stand beside each other; see kernels.group_norm for `shift`."""
        x = group_norm(parts, self._norms[0], silu=True)
        x = convolve(x, self._kernels[0])
        x = group_norm([x], self._norms[1], shift=shift, silu=True)
        x = convolve(x, self._kernels[1])
        return add(self._passed_by(parts), x, self._bias)

    def _passed_by(self, parts: Sequence[Tensor]) -> Tensor:
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
    """Each pixel doubled both ways, then a convolution of 3 by 3.

    Two of its three taps each way fall on the same pixel, so each of the four kinds of new pixels
    is a convolution of 2 by 2 of the old ones: one convolution with four times the channels.
    """

    def __init__(self, upsampler: Any) -> None:
        if upsampler.norm is not None or upsampler.use_conv_transpose or not upsampler.use_conv:
            raise UnsupportedNetwork("an upsampler of another kind")
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
    """diffusers' Attention, of tokens to each other or to a text."""

    def __init__(self, attention: Any) -> None:
        odd = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
        if (
            any(getattr(attention, name, None) for name in odd)
            or attention.rescale_output_factor != 1
        ):
            raise UnsupportedNetwork("an attention of another kind")
        self._heads: int = attention.heads
        key_and_value = torch.cat([matrix_of(attention.to_k), matrix_of(attention.to_v)])
        if attention.is_cross_attention:
            self._into, self.of_text = matrix_of(attention.to_q), key_and_value
        else:
            self._into = torch.cat([matrix_of(attention.to_q), key_and_value])
        self._out: Tensor = matrix_of(attention.to_out[0])
        self.bias: Tensor = attention.to_out[0].bias

    def to_each_other(self, tokens: Tensor, normed: Tensor) -> Tensor:
        """Added to the tokens, but for `bias`."""
        query, key, value = self._split(functional.linear(normed, self._into), 3)
        return self._added(tokens, query, key, value)

    def to_text(self, tokens: Tensor, normed: Tensor, keys_and_values: Tensor) -> Tensor:
        """`keys_and_values` is what `of_text` makes of the text."""
        [query] = self._split(functional.linear(normed, self._into), 1)
        key, value = self._split(keys_and_values, 2)
        return self._added(tokens, query, key, value)

    def _split(self, joined: Tensor, ways: int) -> Sequence[Tensor]:
        split = joined.unflatten(2, (ways, self._heads, -1))
        heads: Sequence[Tensor] = split.permute(2, 0, 3, 1, 4).unbind()
        return heads

    def _added(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = functional.scaled_dot_product_attention(query, key, value)
        return add_product(tokens, found.transpose(1, 2).flatten(2), self._out)


class TransformerBlock:
    """diffusers' BasicTransformerBlock."""

    def __init__(self, block: Any, shift: Tensor) -> None:
        """`shift` is to be added to the tokens that come; `shift` of this one to those that go."""
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
        """Overwrites the tokens."""
        normed = layer_norm(tokens, self._shifts[0], self._norms[0])
        tokens = self._attention.to_each_other(tokens, normed)
        normed = layer_norm(tokens, self._shifts[1], self._norms[1])
        tokens, normed = (as_many(each, keys_and_values) for each in (tokens, normed))
        tokens = self.cross_attention.to_text(tokens, normed, keys_and_values)
        normed = layer_norm(tokens, self._shifts[2], self._norms[2])
        hidden = geglu(normed, self._inner)
        return add_product(tokens, hidden, self._outer)


class Transformer:
    """diffusers' Transformer2DModel."""

    def __init__(self, transformer: Any) -> None:
        if not transformer.is_input_continuous:
            raise UnsupportedNetwork("a transformer of another kind")
        self._norm = Norm.of(transformer.norm)
        self._into, self._into_bias = matrix_of(transformer.proj_in), transformer.proj_in.bias
        self._back = matrix_of(transformer.proj_out)
        # Biases on the way are added up here, and where something is read that they belong to.
        shift = torch.zeros_like(self._into_bias)
        self.blocks = []
        for block in transformer.transformer_blocks:
            self.blocks.append(TransformerBlock(block, shift))
            shift = self.blocks[-1].shift
        self._back_bias = functional.linear(shift, self._back, transformer.proj_out.bias)

    def __call__(self, x: Tensor, texts: Iterator[Tensor]) -> Tensor:
        """`texts` yields each block's keys and values. Their rows may be a multiple of x's."""
        tokens = group_norm([x], self._norm, silu=False).flatten(1, 2)
        tokens = functional.linear(tokens, self._into, self._into_bias)
        for block in self.blocks:
            tokens = block(tokens, next(texts))
        back = functional.linear(tokens, self._back).unflatten(1, x.shape[1:3])
        return add(x, back, self._back_bias)
