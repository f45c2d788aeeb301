"""Networks replayed as CUDA graphs: a replay costs the CPU nothing."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

CACHED_GRAPHS: Final = 64

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class _CapturedGraph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # [times, bucket, ...]
    output: Tensor


class CudaGraphRunner:
    """A network that is captured once per shape, with its rows padded to a bucket.

    The first input determines the rows; the others may have as many or a multiple of them, then
    repeated block by block. The output is valid until the next call.
    """

    def __init__(self, network: Network, buckets: Sequence[int]) -> None:
        self._network = network
        self._buckets = sorted(buckets)
        self._captured: OrderedDict[tuple[object, ...], _CapturedGraph] = OrderedDict()
        self._memory: Any = None  # one pool: only one graph runs at a time

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the network's output for the inputs."""
        rows = len(inputs[0])
        bucket = next((size for size in self._buckets if size >= rows), None)
        if bucket is None:  # so wide that launch overhead does not matter
            return self._network(*inputs)
        folded = [tensor.unflatten(0, (-1, rows)) for tensor in inputs]
        key = (bucket, *((len(tensor), *tensor.shape[2:], tensor.dtype) for tensor in folded))
        captured = self._captured.get(key) or self._capture(bucket, folded)
        self._captured[key] = captured
        self._captured.move_to_end(key)
        while len(self._captured) > CACHED_GRAPHS:
            self._captured.popitem(last=False)
        for buffer, tensor in zip(captured.inputs, folded, strict=True):
            buffer[:, :rows].copy_(tensor)
        captured.graph.replay()
        if rows == bucket:
            return captured.output
        output: Tensor = captured.output.unflatten(0, (-1, bucket))[:, :rows].flatten(0, 1)
        return output

    def _capture(self, bucket: int, folded: Sequence[Tensor]) -> _CapturedGraph:
        inputs = [tensor.new_zeros((len(tensor), bucket, *tensor.shape[2:])) for tensor in folded]
        for buffer, tensor in zip(inputs, folded, strict=True):
            buffer[:, : tensor.shape[1]].copy_(tensor)
        flat = [buffer.flatten(0, 1) for buffer in inputs]
        current = torch.cuda.current_stream()
        warmup = torch.cuda.Stream()
        warmup.wait_stream(current)
        with torch.cuda.stream(warmup):
            self._network(*flat)  # libraries choose their kernels, Triton compiles
        current.wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = self._network(*flat)
        self._memory = self._memory or graph.pool()
        return _CapturedGraph(graph, inputs, output)
