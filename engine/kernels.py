"""What lies between convolutions and matrix products, each in as few passes as it takes.

Activations are [rows, height, width, channels] or [rows, tokens, channels], contiguous. On CUDA
these are Triton's kernels; elsewhere the same in plain PyTorch, for the tests to compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Norm:
    """The numbers of a group norm, or of a layer norm (`groups` 1, each token by itself)."""

    weight: Tensor
    bias: Tensor
    eps: float
    groups: int = 1

    @classmethod
    def of(cls, module: Any) -> Self:
        """Of a torch.nn.GroupNorm or LayerNorm."""
        return cls(module.weight, module.bias, module.eps, getattr(module, "num_groups", 1))


def group_norm(
    parts: Sequence[Tensor], norm: Norm, *, shift: Tensor | None = None, silu: bool
) -> Tensor:
    """Of the parts beside each other, [rows, ..., channels].

    `shift` [some rows, channels] is added first, its rows in turn; then there is only one part.
    """
    if parts[0].is_cuda:
        from engine import triton_kernels

        return triton_kernels.group_norm(parts, norm, shift, silu=silu)
    joined = torch.cat(list(parts), dim=-1)
    if shift is not None:
        added = shift.repeat(len(joined) // len(shift), 1)
        joined = joined + added.view(len(joined), *[1] * (joined.dim() - 2), -1)
    channels_first = joined.movedim(-1, 1)
    normed = functional.group_norm(channels_first, norm.groups, norm.weight, norm.bias, norm.eps)
    return (functional.silu(normed) if silu else normed).movedim(1, -1).contiguous()


def layer_norm(tokens: Tensor, shift: Tensor, norm: Norm) -> Tensor:
    """Of each token, after `shift` [channels] was added to it."""
    if tokens.is_cuda:
        from engine import triton_kernels

        return triton_kernels.layer_norm(tokens, shift, norm)
    shifted = tokens + shift
    return functional.layer_norm(shifted, shift.shape, norm.weight, norm.bias, norm.eps)


def add(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    """The sum of both and of `bias` [channels]. `one` may have fewer rows, which come in turn."""
    if one.is_cuda:
        from engine import triton_kernels

        return triton_kernels.add(one, other, bias)
    return one.repeat(len(other) // len(one), *[1] * (one.dim() - 1)) + other + bias


def geglu(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Shazeer 2020: the first half of a linear layer's outputs times the GELU of the second."""
    if tokens.is_cuda and tokens.element_size() == torch.float16.itemsize:
        from engine import triton_kernels

        return triton_kernels.geglu(tokens, weight, bias)
    value, gate = functional.linear(tokens, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def interleave(phases: Tensor, bias: Tensor) -> Tensor:
    """[rows, h + 1, w + 1, 4 * channels] to [rows, 2h, 2w, channels], `bias` added.

    The pixel (2y + i, 2x + j) is phase 2i + j of (y + i, x + j). See `networks.Upsample`.
    """
    if phases.is_cuda:
        from engine import triton_kernels

        return triton_kernels.interleave(phases, bias)
    rows, height, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
    one, two, three, four = phases.chunk(4, dim=-1)
    upper = torch.stack([one[:, :-1, :-1], two[:, :-1, 1:]], dim=3)  # [rows, h, w, 2, channels]
    lower = torch.stack([three[:, 1:, :-1], four[:, 1:, 1:]], dim=3)
    return torch.stack([upper, lower], dim=2).reshape(rows, 2 * height, 2 * width, -1) + bias
