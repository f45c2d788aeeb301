"""Parts of a model as ONNX files, through torch's own exporter."""

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
#: Triton passes over folders of a model whose name is no number
ONNX_FOLDER: Final = "onnx"
EXAMPLE_ROWS: Final = 2  # never 1: torch takes a 1 for a constant


class ExportFailed(RuntimeError):
    """torch could not put this part into ONNX."""


def onnx_path(repository: Path, part: str) -> Path:
    """Where a part's ONNX file is; its weights are beside it."""
    return repository / part / ONNX_FOLDER / ONNX


def find_export(
    repository: Path, model_dir: Path, part: Part, *, opset: int | None = None
) -> Export | None:
    """The export that is there already, if it is whole, compared, and made of this: else None."""
    path = onnx_path(repository, part.name)
    try:
        export = Export.model_validate_json(path.with_name(EXPORT).read_bytes())
        is_whole = export.onnx_sha256 == onnx_sha256(path)
    except (FileNotFoundError, ValueError):
        return None
    fits = (
        (export.precision, export.inputs, export.outputs, export.versions)
        == (part.precision, part.inputs, part.outputs, versions())
        and export.weights_sha256 == weights_sha256(model_dir, part.name)
        and opset in {None, export.opset}
    )
    return export if is_whole and fits else None


def export(
    repository: Path, model_dir: Path, model: str, part: Part, module: nn.Module, *, opset: int
) -> Export:
    """Write the part's ONNX file, for any number of rows. Raises ExportFailed.

    Its record is to be kept (`keep`) once the file was compared with torch.
    """
    began = time.monotonic()
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
        seconds=round(time.monotonic() - began, 1),
    )


def keep(repository: Path, record: Export) -> None:
    """Write `export.json`: from now on the file is not made again."""
    path = onnx_path(repository, record.part).with_name(EXPORT)
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _program(part: Part, module: nn.Module, opset: int) -> Any:
    width, height = part.fixed_size or (8 * part.unit, 9 * part.unit)
    arguments = example(part, rows=EXAMPLE_ROWS, width=width, height=height)
    # Unbounded on purpose: with bounds, torch refuses sizes for guards that its own tracing made.
    free = torch.export.Dim.DYNAMIC
    shapes = {
        port.name: {at: free for at, dim in enumerate(port.dims) if isinstance(dim, str)}
        for port in part.inputs
    }
    # It warns of its own future, and of torchvision that is not there.
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
    """Inputs as a drawing has them, from a seed; `width` and `height` are the picture's."""
    dice = torch.Generator().manual_seed(seed)
    sizes = part.sizes(rows, width, height)
    made: dict[str, Tensor] = {}
    for port in part.inputs:
        shape = port.shape(sizes)
        match port.name:
            case "input_ids":
                ids = torch.randint(part.vocabulary - 1, shape, generator=dice)
                ids[:, -1] = part.vocabulary - 1  # a text ends
                made[port.name] = ids.to(torch.int32)
            case "timestep":
                made[port.name] = torch.randint(1000, shape, generator=dice).float()
            case "time_ids":
                made[port.name] = torch.tensor(
                    [[height, width, 0, 0, height, width]] * rows
                ).float()
            case _:
                made[port.name] = torch.randn(shape, generator=dice).to(DTYPES[port.dtype])
    return made


def onnx_sha256(path: Path) -> str:
    """Of the graph and of its weights. Raises FileNotFoundError."""
    weights = path.with_name(path.name + ".data")
    return sha256(path, *([weights] if weights.exists() else []))


def versions() -> dict[str, str]:
    """Of what has a say in an ONNX file."""
    names = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
    return {name: importlib.metadata.version(name) for name in names}
