"""Triton kernels of `engine.gpu.ops`. Sums are in float32, whatever the activations are."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.gpu.norm import Norm

_POSITIONS = 64  # of a tile
_CHANNELS = 64  # of a tile: 128 bytes of halves side by side
_PROGRAMS = 1024  # enough to fill a GPU

_GEGLU_PAIR = 64  # outputs whose values and gates are adjacent in the weight
_GEGLU_DEPTH = 64
_GEGLU_MANY = 4096  # with at least this many tokens, wider tiles are faster


@triton.jit
def _sums_kernel(
    x, shift, sums, positions, channels, total, offset, per_part, shift_rows, shift_stride,
    HAS_SHIFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = column < channels
    x += row.to(tl.int64) * positions * channels
    added = tl.zeros([BLOCK_C], tl.float32)
    if HAS_SHIFT:
        added = tl.load(shift + row % shift_rows * shift_stride + column, mask=within, other=0)
        added = added.to(tl.float32)
    once = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squared = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(part * per_part, (part + 1) * per_part, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        mask = (position < positions)[:, None] & within[None, :]
        value = tl.load(x + position[:, None] * channels + column[None, :], mask=mask, other=0)
        value = tl.where(mask, value.to(tl.float32) + added[None, :], 0)
        once += value
        squared += value * value
    at = ((row * tl.num_programs(0) + part) * total + offset + column) * 2
    tl.store(sums + at, tl.sum(once, 0), mask=within)
    tl.store(sums + at + 1, tl.sum(squared, 0), mask=within)


@triton.jit
def _factors_kernel(
    sums, weight, bias, shift, factors, parts, positions, total, per_group, eps, shift_rows,
    shift_stride,
    HAS_SHIFT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, BLOCK_C)
    within = member < per_group
    column = group * per_group + member
    once = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    squared = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_T):
        part = start + tl.arange(0, BLOCK_T)
        mask = (part < parts)[:, None] & within[None, :]
        at = ((row * parts + part[:, None]) * total + column[None, :]) * 2
        once += tl.load(sums + at, mask=mask, other=0)
        squared += tl.load(sums + at + 1, mask=mask, other=0)
    count = positions * per_group
    mean = tl.sum(tl.sum(once, 0), 0) / count
    variance = tl.sum(tl.sum(squared, 0), 0) / count - mean * mean
    spread = tl.rsqrt(tl.maximum(variance, 0) + eps)
    keep = tl.load(weight + column, mask=within, other=0).to(tl.float32) * spread
    move = tl.load(bias + column, mask=within, other=0).to(tl.float32) - mean * keep
    if HAS_SHIFT:
        shift += row % shift_rows * shift_stride
        move += keep * tl.load(shift + column, mask=within, other=0)
    tl.store(factors + (row * total + column) * 2, keep, mask=within)
    tl.store(factors + (row * total + column) * 2 + 1, move, mask=within)


@triton.jit
def _normed_kernel(
    x, factors, out, positions, channels, total, offset,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = column < channels
    mask = (position < positions)[:, None] & within[None, :]
    at = (row * total + offset + column) * 2
    keep = tl.load(factors + at, mask=within, other=0)
    move = tl.load(factors + at + 1, mask=within, other=0)
    x += row * positions * channels
    value = tl.load(x + position[:, None] * channels + column[None, :], mask=mask, other=0)
    value = value.to(tl.float32) * keep[None, :] + move[None, :]
    if SILU:
        value = value * tl.sigmoid(value)
    out += row * positions * total + offset
    tl.store(out + position[:, None] * total + column[None, :], value, mask=mask)


def group_norm(parts: Sequence[Tensor], norm: Norm, shift: Tensor | None, *, silu: bool) -> Tensor:
    """See ops.group_norm."""
    first = parts[0]
    rows, positions = first.shape[0], first[0, ..., 0].numel()
    total = sum(part.shape[-1] for part in parts)
    # Slices of the positions are summed separately: enough to fill the GPU, no more.
    slices = triton.cdiv(_PROGRAMS, rows * triton.cdiv(total, _CHANNELS))
    slices = max(slices, triton.cdiv(positions, 1024))
    per_slice = triton.cdiv(triton.cdiv(positions, slices), _POSITIONS) * _POSITIONS
    slices = triton.cdiv(positions, per_slice)
    sums = first.new_empty((rows, slices, total, 2), dtype=torch.float32)
    factors = first.new_empty((rows, total, 2), dtype=torch.float32)
    out = first.new_empty((*first.shape[:-1], total))
    tile: dict[str, Any] = {"BLOCK_P": _POSITIONS, "BLOCK_C": _CHANNELS}
    given = {"HAS_SHIFT": shift is not None}
    shift = factors[:, :, 0] if shift is None else shift
    shift_rows, stride = len(shift), shift.stride(0)
    offset = 0
    for part in parts:
        channels = part.shape[-1]
        _sums_kernel[slices, triton.cdiv(channels, _CHANNELS), rows](
            part, shift, sums, positions, channels, total, offset, per_slice, shift_rows, stride,
            **given, **tile,
        )  # fmt: skip
        offset += channels
    per_group = total // norm.groups
    _factors_kernel[norm.groups, rows](
        sums, norm.weight, norm.bias, shift, factors, slices, positions, total, per_group, norm.eps,
        shift_rows, stride, **given, BLOCK_T=min(16, triton.next_power_of_2(slices)),
        BLOCK_C=triton.next_power_of_2(per_group), num_warps=1 if slices == 1 else 4,
    )  # fmt: skip
    offset = 0
    for part in parts:
        channels = part.shape[-1]
        grid = (triton.cdiv(positions, _POSITIONS), triton.cdiv(channels, _CHANNELS), rows)
        _normed_kernel[grid](
            part, factors, out, positions, channels, total, offset, SILU=silu, **tile
        )
        offset += channels
    return out


@triton.jit
def _layer_norm_kernel(
    x, shift, out, weight, bias, tokens, channels, eps,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_C)
    within = column < channels
    mask = (token < tokens)[:, None] & within[None, :]
    at = token[:, None] * channels + column[None, :]
    value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    value += tl.load(shift + column, mask=within, other=0).to(tl.float32)[None, :]
    mean = tl.sum(value, 1) / channels
    value = tl.where(mask, value - mean[:, None], 0)
    spread = tl.rsqrt(tl.sum(value * value, 1) / channels + eps)
    keep = tl.load(weight + column, mask=within, other=0).to(tl.float32)
    move = tl.load(bias + column, mask=within, other=0).to(tl.float32)
    tl.store(out + at, value * spread[:, None] * keep[None, :] + move[None, :], mask=mask)


def layer_norm(tokens: Tensor, shift: Tensor, norm: Norm) -> Tensor:
    """See ops.layer_norm."""
    channels = tokens.shape[-1]
    count = tokens.numel() // channels
    out = torch.empty_like(tokens)
    width = triton.next_power_of_2(channels)
    together = max(1, 4096 // width) if count > 4096 else 1
    _layer_norm_kernel[triton.cdiv(count, together),](
        tokens, shift, out, norm.weight, norm.bias, count, channels, norm.eps,
        BLOCK_T=together, BLOCK_C=width, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _add_kernel(
    one, other, bias, out, size_of_one, size, channels: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = tl.load(one + at % size_of_one, mask=mask).to(tl.float32)
    value += tl.load(other + at, mask=mask) + tl.load(bias + at % channels, mask=mask)
    tl.store(out + at, value, mask=mask)


def add(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    """See ops.add."""
    out = torch.empty_like(other)
    size = other.numel()
    _add_kernel[triton.cdiv(size, 2048),](
        one, other, bias, out, one.numel(), size, one.shape[-1], BLOCK=2048, num_warps=8
    )
    return out


@triton.jit
def _interleave_kernel(
    phases, bias, out, height, width, channels: tl.constexpr, BLOCK: tl.constexpr
):
    line, row = tl.program_id(1), tl.program_id(2)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < 2 * width * channels
    x, channel = at // channels, at % channels
    down, right = line % 2, x % 2
    source = (row.to(tl.int64) * (height + 1) + line // 2 + down) * (width + 1) + x // 2 + right
    source = source * 4 * channels + (2 * down + right) * channels + channel
    value = tl.load(phases + source, mask=mask).to(tl.float32) + tl.load(bias + channel, mask=mask)
    out += (row.to(tl.int64) * 2 * height + line) * 2 * width * channels
    tl.store(out + at, value, mask=mask)


def interleave(phases: Tensor, bias: Tensor) -> Tensor:
    """See ops.interleave."""
    rows, height, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
    channels = phases.shape[-1] // 4
    out = phases.new_empty((rows, 2 * height, 2 * width, channels))
    grid = (triton.cdiv(2 * width * channels, 1024), 2 * height, rows)
    _interleave_kernel[grid](phases, bias, out, height, width, channels, BLOCK=1024)
    return out


@triton.jit
def _erf(x):
    # Abramowitz and Stegun 7.1.26, to 1.5e-7: tl.erf takes longer than the matrix product
    t = 1 / (1 + 0.3275911 * tl.abs(x))
    poly = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    value = 1 - poly * tl.exp(-x * x)
    return tl.where(x < 0, -value, value)


@triton.jit
def _geglu_kernel(
    x, weight, bias, out, tokens, outputs, inputs, tiles,
    BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, PAIR: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = PAIRS * PAIR
    across = outputs // wide
    # As many programs as the GPU has multiprocessors, each with tile after tile: flattened into one
    # loop, the next tile's numbers load while this one's GELU is computed.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        # Neighboring tiles share what they read: GROUP rows of tiles at a time.
        band = tile // (GROUP * across)
        high = min(tl.cdiv(tokens, BLOCK_M) - band * GROUP, GROUP)
        top = (band * GROUP + (tile % (GROUP * across)) % high) * BLOCK_M
        left = (tile % (GROUP * across)) // high * wide
        both = tl.zeros([BLOCK_M, 2 * wide], tl.float32)
        for k in range(0, inputs, BLOCK_K):  # out of bounds reads as zero
            both = tl.dot(x.load([top, k]), weight.load([2 * left, k]).T, both)
        value, gate = both.reshape(BLOCK_M, PAIRS, 2, PAIR).permute(0, 1, 3, 2).split()
        value, gate = value.reshape(BLOCK_M, wide), gate.reshape(BLOCK_M, wide)
        token, column = top + tl.arange(0, BLOCK_M), left + tl.arange(0, wide)
        value += tl.load(bias + column)[None, :]
        gate += tl.load(bias + outputs + column)[None, :]
        value *= 0.5 * gate * (1 + _erf(gate * 0.7071067811865476))
        mask = (token < tokens)[:, None]
        tl.store(out + token.to(tl.int64)[:, None] * outputs + column[None, :], value, mask=mask)


def paired(weight: Tensor) -> Tensor | None:
    """Return a linear layer's rows in `geglu`'s order; None unless the values are whole pairs.

    Blocks of values and of their gates alternate: a tile of both is one product, whose matrix
    units work twice as long for what they read as in two products of half the width.
    """
    values, gates = weight.chunk(2)
    if len(values) % _GEGLU_PAIR:
        return None
    blocks = [half.unflatten(0, (-1, _GEGLU_PAIR)) for half in (values, gates)]
    return torch.stack(blocks, dim=1).flatten(0, 2).contiguous()


def geglu(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ops.geglu. For float16, and a `paired` weight."""
    inputs, outputs = tokens.shape[-1], weight.shape[0] // 2
    count = tokens.numel() // inputs
    out = tokens.new_empty((*tokens.shape[:-1], outputs))
    pairs = 2 if count >= _GEGLU_MANY and outputs % (2 * _GEGLU_PAIR) == 0 else 1
    tall, wide = 128, pairs * _GEGLU_PAIR
    tiles = triton.cdiv(count, tall) * (outputs // wide)
    programs = torch.cuda.get_device_properties(tokens.device).multi_processor_count
    _geglu_kernel[min(tiles, programs),](
        TensorDescriptor.from_tensor(tokens.view(count, inputs), [tall, _GEGLU_DEPTH]),
        TensorDescriptor.from_tensor(weight, [2 * wide, _GEGLU_DEPTH]),
        bias, out, count, outputs, inputs, tiles, BLOCK_M=tall, PAIRS=pairs, PAIR=_GEGLU_PAIR,
        BLOCK_K=_GEGLU_DEPTH, GROUP=8, num_warps=8, num_stages=4,
    )  # fmt: skip
    return out
