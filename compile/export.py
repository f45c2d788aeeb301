"""Export of a model's parts to ONNX files, by torch's exporter."""

import importlib.metadata
import logging
import time
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from compile.parts import DTYPES, Part
from engine.tensorrt.plans import Export, sha256, weights_sha256

OPSETS: Final = (23, 20)  #: 23 has Attention and GroupNormalization; 20 is for older TensorRTs
ONNX: Final = "model.onnx"
EXPORT: Final = "export.json"
#: Triton ignores folders of a model whose name is not a number
ONNX_FOLDER: Final = "onnx"
EXAMPLE_ROWS: Final = 2  # never 1: torch treats a 1 as a constant


class ExportFailed(RuntimeError):
    """torch could not export this part to ONNX."""


def onnx_path(repository: Path, part: str) -> Path:
    """Return the path of a part's ONNX file; its weights are beside it."""
    return repository / part / ONNX_FOLDER / ONNX


def find_export(
    repository: Path, model_dir: Path, part: Part, *, opset: int | None = None
) -> Export | None:
    """Return the existing export if it is intact, compared, and made from these weights."""
    path = onnx_path(repository, part.name)
    try:
        export = Export.model_validate_json(path.with_name(EXPORT).read_bytes())
        is_intact = export.onnx_sha256 == onnx_sha256(path)
    except (FileNotFoundError, ValueError):
        return None
    fits = (
        (export.precision, export.inputs, export.outputs, export.versions)
        == (part.precision, part.inputs, part.outputs, versions())
        and export.weights_sha256 == weights_sha256(model_dir, part.name)
        and opset in {None, export.opset}
    )
    return export if is_intact and fits else None


def export(
    repository: Path, model_dir: Path, model: str, part: Part, module: nn.Module, *, opset: int
) -> Export:
    """Write the part's ONNX file, for any number of rows. Raises ExportFailed.

    Write its record (`write_record`) after the comparison with torch.
    """
    started = time.monotonic()
    path = onnx_path(repository, part.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.iterdir():
        stale.unlink()
    program = _program(part, module, opset)
    program.save(str(path), external_data=True)
    return Export(
        part=part.name,
        model=model,
        inputs=part.inputs,
        outputs=part.outputs,
        precision=part.precision,
        opset=opset,
        weights_sha256=weights_sha256(model_dir, part.name),
        onnx_sha256=onnx_sha256(path),
        deviation=float("inf"),
        versions=versions(),
        seconds=round(time.monotonic() - started, 1),
    )


def write_record(repository: Path, record: Export) -> None:
    """Write `export.json`: from now on the file is not exported again."""
    path = onnx_path(repository, record.part).with_name(EXPORT)
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _program(part: Part, module: nn.Module, opset: int) -> Any:
    width, height = part.fixed_size or (8 * part.unit, 9 * part.unit)
    arguments = example(part, rows=EXAMPLE_ROWS, width=width, height=height)
    # Unbounded: with bounds, torch rejects sizes because of guards from its own tracing.
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        port.name: {at: dynamic for at, dim in enumerate(port.dims) if isinstance(dim, str)}
        for port in part.inputs
    }
    # Warnings about torch's own deprecations, and about torchvision, which is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.onnx.export(
                module,
                tuple(arguments.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=[port.name for port in part.inputs],
                output_names=[port.name for port in part.outputs],
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            raise ExportFailed(f"{part.name} at opset {opset}: {error}") from error


def example(part: Part, *, rows: int, width: int, height: int, seed: int = 0) -> dict[str, Tensor]:
    """Return realistic inputs from a seed; `width` and `height` are the image's."""
    generator = torch.Generator().manual_seed(seed)
    sizes = part.sizes(rows, width, height)
    inputs: dict[str, Tensor] = {}
    for port in part.inputs:
        shape = port.shape(sizes)
        match port.name:
            case "input_ids":
                ids = torch.randint(part.vocabulary - 1, shape, generator=generator)
                ids[:, -1] = part.vocabulary - 1  # the end of the text
                inputs[port.name] = ids.to(torch.int32)
            case "timestep":
                inputs[port.name] = torch.randint(1000, shape, generator=generator).float()
            case "time_ids":
                inputs[port.name] = torch.tensor(
                    [[height, width, 0, 0, height, width]] * rows
                ).float()
            case _:
                inputs[port.name] = torch.randn(shape, generator=generator).to(DTYPES[port.dtype])
    return inputs


def onnx_sha256(path: Path) -> str:
    """Return the digest of the graph and its weights. Raises FileNotFoundError."""
    weights = path.with_name(path.name + ".data")
    return sha256(path, *([weights] if weights.exists() else []))


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine an ONNX file."""
    names = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
    return {name: importlib.metadata.version(name) for name in names}
