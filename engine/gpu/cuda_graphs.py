"""Networks whose launches a GPU has recorded: a replay costs the CPU nothing."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

REMEMBERED_SHAPES: Final = 64

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # [times, bucket, ...]
    output: Tensor


class CudaGraphRunner:
    """A network of which each shape is recorded when it first comes, rounded up to a bucket.

    The rows of the first input count; the others may have as many, or a multiple: then they are as
    many times the rows, one time after the other. The output is valid until the next call.
    """

    def __init__(self, network: Network, buckets: Sequence[int]) -> None:
        self._network = network
        self._buckets = sorted(buckets)
        self._recorded: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()
        self._memory: Any = None  # one pool: only one of them runs at a time

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The network's output for the inputs."""
        rows = len(inputs[0])
        bucket = next((size for size in self._buckets if size >= rows), None)
        if bucket is None:  # so wide that launching is nothing beside the work
            return self._network(*inputs)
        folded = [tensor.unflatten(0, (-1, rows)) for tensor in inputs]
        key = (bucket, *((len(tensor), *tensor.shape[2:], tensor.dtype) for tensor in folded))
        recording = self._recorded.get(key) or self._record(bucket, folded)
        self._recorded[key] = recording
        self._recorded.move_to_end(key)
        while len(self._recorded) > REMEMBERED_SHAPES:
            self._recorded.popitem(last=False)
        for place, tensor in zip(recording.inputs, folded, strict=True):
            place[:, :rows].copy_(tensor)
        recording.graph.replay()
        if rows == bucket:
            return recording.output
        output: Tensor = recording.output.unflatten(0, (-1, bucket))[:, :rows].flatten(0, 1)
        return output

    def _record(self, bucket: int, folded: Sequence[Tensor]) -> _Recording:
        inputs = [tensor.new_zeros((len(tensor), bucket, *tensor.shape[2:])) for tensor in folded]
        for place, tensor in zip(inputs, folded, strict=True):
            place[:, : tensor.shape[1]].copy_(tensor)
        flat = [place.flatten(0, 1) for place in inputs]
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._network(*flat)  # libraries choose their kernels, Triton compiles
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = self._network(*flat)
        self._memory = self._memory or graph.pool()
        return _Recording(graph, inputs, output)
