"""Comparison of an ONNX file with torch, by onnxruntime at several batch sizes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compile.export import example
from compile.parts import Part

ROWS: Final = (1, 2, 5)  #: torch traced the network with the second only
#: largest allowed difference, as a share of the largest value in torch's output
BOUNDS: Final = {"float32": 5e-4, "float16": 2e-2}


class ParityFailed(RuntimeError):
    """The ONNX file does not compute what torch computes."""


@dataclass(frozen=True)
class Deviation:
    """Deviation of an output of onnxruntime from torch's, in one batch."""

    part: str
    output: str
    rows: int
    width: int
    height: int
    largest: float  #: absolute difference
    scale: float  #: largest value in torch's output

    @property
    def share(self) -> float:
        """Difference as a share of the scale; infinite for NaN."""
        share = self.largest / (self.scale or 1.0)
        return share if np.isfinite(share) else float("inf")

    def __str__(self) -> str:
        """Return a line of a report."""
        size = f" {self.width}x{self.height}" if self.width else ""
        return (
            f"{self.part}.{self.output}, {self.rows} rows{size}: "
            f"off by {self.largest:.1e} of {self.scale:.1f} ({self.share:.1e})"
        )


def compare(
    part: Part,
    module: nn.Module,
    onnx: Path,
    sizes: Iterable[tuple[int, int]],
    *,
    rows: Sequence[int] = ROWS,
    log: Callable[[str], None],
) -> list[Deviation]:
    """Run both and compare, at every batch size and image size.

    Logs all deviations, then raises ParityFailed if one exceeds the bound of the part's precision.
    """
    session = _session(onnx)
    image_sizes = list(sizes) if part.has_size else [(0, 0)]
    deviations = []
    for width, height in image_sizes:
        for count in rows:
            for deviation in _deviations(part, module, session, count, width, height):
                log(str(deviation))
                deviations.append(deviation)
    bound = BOUNDS[part.precision]
    if excessive := [str(each) for each in deviations if not each.share <= bound]:
        raise ParityFailed(f"more than {bound:.0e} off: {'; '.join(excessive)}")
    return deviations


def _deviations(
    part: Part, module: nn.Module, session: "Session", rows: int, width: int, height: int
) -> list[Deviation]:
    inputs = example(part, rows=rows, width=width, height=height, seed=rows)
    with torch.inference_mode():
        expected = [output.float().numpy() for output in module(*inputs.values())]
    outputs = session({name: tensor.numpy() for name, tensor in inputs.items()})
    return [
        Deviation(
            part=part.name,
            output=port.name,
            rows=rows,
            width=width,
            height=height,
            largest=float(np.abs(theirs - ours.astype(np.float32)).max()),
            scale=float(np.abs(theirs).max()),
        )
        for port, theirs, ours in zip(part.outputs, expected, outputs, strict=True)
    ]


Session = Callable[[dict[str, NDArray[np.generic]]], list[NDArray[np.generic]]]


def _session(onnx: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run(None, inputs))
