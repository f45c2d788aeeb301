"""Operations between convolutions and matrix products, each in as few passes as possible.

Activations are [rows, height, width, channels] or [rows, tokens, channels], contiguous. On CUDA
these are Triton kernels. Elsewhere they are plain PyTorch, in place where possible: large new
tensors cost a CPU more than the arithmetic in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from engine.gpu.norm import Norm


def group_norm(
    parts: Sequence[Tensor], norm: Norm, *, shift: Tensor | None = None, silu: bool
) -> Tensor:
    """Normalize the parts concatenated by channel, [rows, ..., channels].

    `shift` [some rows, channels] is added first, its rows repeated; then there is only one part.
    """
    if parts[0].is_cuda:
        from engine.gpu import triton_ops

        return triton_ops.group_norm(parts, norm, shift, silu=silu)
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
    if shift is not None:
        added = shift.view(len(shift), *[1] * (joined.dim() - 2), -1)
        joined = (joined.unflatten(0, (-1, len(shift))) + added).view(joined.shape)
    channels_first = joined.movedim(-1, 1)
    normed = functional.group_norm(channels_first, norm.groups, norm.weight, norm.bias, norm.eps)
    return (functional.silu(normed, inplace=True) if silu else normed).movedim(1, -1).contiguous()


def layer_norm(tokens: Tensor, shift: Tensor, norm: Norm) -> Tensor:
    """Normalize each token, after adding `shift` [channels] to it."""
    if tokens.is_cuda:
        from engine.gpu import triton_ops

        return triton_ops.layer_norm(tokens, shift, norm)
    shifted = tokens + shift
    return functional.layer_norm(shifted, shift.shape, norm.weight, norm.bias, norm.eps)


def add(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    """Add both and `bias` [channels]. `one` may have fewer rows, which are repeated."""
    if one.is_cuda:
        from engine.gpu import triton_ops

        return triton_ops.add(one, other, bias)
    total: Tensor = other.unflatten(0, (-1, len(one))) + one
    return total.add_(bias).view(other.shape)


@dataclass(frozen=True)
class Geglu:
    """A linear layer; the second half of its outputs gates the first (Shazeer 2020)."""

    weight: Tensor
    bias: Tensor
    is_paired: bool  #: the weight's rows are in the order of `triton_ops.geglu`

    @classmethod
    def of(cls, linear: Any) -> Self:
        """Return that of a torch.nn.Linear."""
        weight: Tensor = linear.weight
        if weight.is_cuda and weight.element_size() == torch.float16.itemsize:
            from engine.gpu import triton_ops

            if (paired := triton_ops.paired(weight)) is not None:
                return cls(paired, linear.bias, is_paired=True)
        return cls(weight, linear.bias, is_paired=False)


def geglu(tokens: Tensor, layer: Geglu) -> Tensor:
    """Multiply the first half of the layer's outputs by the GELU of the second."""
    if layer.is_paired:
        from engine.gpu import triton_ops

        return triton_ops.geglu(tokens, layer.weight, layer.bias)
    value, gate = functional.linear(tokens, layer.weight, layer.bias).chunk(2, dim=-1)
    return functional.gelu(gate).mul_(value)


def interleave(phases: Tensor, bias: Tensor) -> Tensor:
    """Reorder [rows, h + 1, w + 1, 4 * channels] to [rows, 2h, 2w, channels], and add `bias`.

    The pixel (2y + i, 2x + j) is phase 2i + j of (y + i, x + j). See `blocks.Upsample`.
    """
    if phases.is_cuda:
        from engine.gpu import triton_ops

        return triton_ops.interleave(phases, bias)
    rows, height, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
    pixels = phases.new_empty((rows, height, 2, width, 2, len(bias)))
    for at, phase in enumerate(phases.chunk(4, dim=-1)):
        down, right = divmod(at, 2)
        part = phase[:, down : down + height, right : right + width]
        torch.add(part, bias, out=pixels[:, :, down, :, right])
    return pixels.view(rows, 2 * height, 2 * width, -1)
