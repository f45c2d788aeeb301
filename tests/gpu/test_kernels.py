"""The Triton kernels against plain PyTorch, in single precision on a CPU."""

import pytest
import torch
from torch import Tensor

from engine.gpu import ops
from engine.gpu.norm import Norm
from engine.gpu.ops import Geglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
    pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "single"]),
]
TOLERANCE = {torch.float16: 1e-3, torch.float32: 1e-5}


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.float().cpu()


def assert_same(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    apart = (on_cpu(ours) - reference).norm() / reference.norm()
    assert apart <= TOLERANCE[dtype]  # also false for NaN


def norm_of(channels: int, groups: int, dtype: torch.dtype) -> tuple[Norm, Norm]:
    norm = Norm(numbers(channels, dtype=dtype), numbers(channels, dtype=dtype), 1e-5, groups)
    return norm, Norm(on_cpu(norm.weight), on_cpu(norm.bias), 1e-5, groups)


@pytest.mark.parametrize("widths", [(320,), (640, 320), (96,), (160, 96), (1280, 1280)])
@pytest.mark.parametrize("side", [1, 8, 33])
def test_group_norm(widths, side, dtype):
    norm, reference = norm_of(sum(widths), 32, dtype)
    parts = [numbers(4, side, side, width, dtype=dtype) * 2 + 3 for width in widths]
    shift = numbers(2, 3 * widths[0], dtype=dtype)[:, : widths[0]] if len(widths) == 1 else None

    ours = ops.group_norm(parts, norm, shift=shift, silu=True)

    on_the_cpu = [on_cpu(part) for part in parts]
    cpu_shift = None if shift is None else on_cpu(shift)
    assert_same(ours, ops.group_norm(on_the_cpu, reference, shift=cpu_shift, silu=True), dtype)


@pytest.mark.parametrize("channels", [160, 320, 1280])
@pytest.mark.parametrize("tokens", [1, 77, 4097])
def test_layer_norm(channels, tokens, dtype):
    norm, reference = norm_of(channels, 1, dtype)
    x, shift = numbers(2, tokens, channels, dtype=dtype), numbers(channels, dtype=dtype)
    ours = ops.layer_norm(x, shift, norm)
    assert_same(ours, ops.layer_norm(on_cpu(x), on_cpu(shift), reference), dtype)


def test_the_rows_of_a_shorter_summand_repeat(dtype):
    one, other = (numbers(rows, 9, 7, 96, dtype=dtype) for rows in (2, 6))
    bias = numbers(96, dtype=dtype)
    reference = ops.add(on_cpu(one), on_cpu(other), on_cpu(bias))
    assert_same(ops.add(one, other, bias), reference, dtype)


@pytest.mark.parametrize("tokens", [5, 3000, 20000])
@pytest.mark.parametrize("inputs", [24, 160, 208, 320])
def test_geglu(tokens, inputs, dtype):
    x = numbers(1, tokens, inputs, dtype=dtype)
    linear = torch.nn.Linear(inputs, 8 * inputs, device="cuda", dtype=dtype)
    layer = Geglu.of(linear)
    assert layer.is_paired is (dtype is torch.float16 and inputs % 16 == 0)
    ours = ops.geglu(x, layer)
    assert_same(ours, ops.geglu(on_cpu(x), Geglu.of(linear.float().cpu())), dtype)


def test_interleaved_phases(dtype):
    phases, bias = numbers(3, 9, 6, 4 * 96, dtype=dtype), numbers(96, dtype=dtype)
    reference = ops.interleave(on_cpu(phases), on_cpu(bias))
    assert_same(ops.interleave(phases, bias), reference, dtype)
