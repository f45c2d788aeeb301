"""TensorRT runner of a model's plans: checked at load, fixed buffers, CUDA graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.tensorrt.api import import_tensorrt, this_machine
from engine.tensorrt.compiled_runner import (
    CompiledNetwork,
    CompiledRunner,
    PipelineConfig,
    Size,
    read_pipeline_config,
)
from engine.tensorrt.plans import Machine, Plan, PlanUnfit, Port, find_plan, require_weights

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "int32": torch.int32}
#: small batches are padded to one of these and replayed as a CUDA graph: launching their kernels
#: takes as long as running them
GRAPH_ROWS: Final = (1, 2, 4, 8, 16)


def load_tensorrt_runner(
    model_dir: Path, repository: Path, *, device: str, max_unet_rows: int
) -> CompiledRunner:
    """Load the plans in `repository`, built from the weights in `model_dir` by `python -m compile`.

    All checks are made here, before a row is generated. Raises PlanUnfit, which names the remedy,
    TensorRTMissing, OSError for a missing file of the model, UnsupportedSchedule.
    """
    config = read_pipeline_config(model_dir)
    plans = checked_plans(model_dir, repository, config, max_unet_rows=max_unet_rows)
    trt = import_tensorrt(plans[0].record.builder)
    target = torch.device(device)
    machine = this_machine(trt, plans[0].record.builder, target.index or 0)
    if target.type != "cuda" or machine is None:
        raise plans[0].unfit(f"plans need a GPU, but this model is configured for {device}")
    return _open(trt, config, plans, machine, target)


def _open(
    trt: Any, config: PipelineConfig, plans: Sequence[Plan], machine: Machine, device: torch.device
) -> CompiledRunner:
    for plan in plans:
        plan.require_machine(machine)
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    networks: dict[str, CompiledNetwork] = {
        plan.part: PlanNetwork(trt, runtime, plan, device, config.pixels_per_latent)
        for plan in plans
    }
    return CompiledRunner(config, networks, sizes=_sizes(plans), device=device)


def checked_plans(
    model_dir: Path, repository: Path, config: PipelineConfig, *, max_unet_rows: int
) -> list[Plan]:
    """Return a plan for each part, of these weights and wide enough. Raises PlanUnfit."""
    command = f"python -m compile {model_dir} --output {repository}"
    plans = [find_plan(repository, part, command=command) for part in config.parts]
    if any(plan.record.builder != plans[0].record.builder for plan in plans):
        raise PlanUnfit(f"the plans were built by two TensorRTs; build them again: {command}")
    require_weights(plans, model_dir, command)
    unet, decoder = plans[-2], plans[-1]
    if unet.sizes() != decoder.sizes():
        raise unet.unfit(
            f"its sizes differ from those of {decoder.part} ({decoder.profiles_text()})"
        )
    for width, height in _sizes(plans):
        if (limit := unet.max_rows(width, height)) < max_unet_rows:
            raise unet.unfit(
                f"max_unet_rows is {max_unet_rows}, but it takes at most {limit} rows of "
                f"{width}x{height} ({unet.profiles_text()}); "
                "lower the one in config.pbtxt or raise --rows"
            )
    return plans


def _sizes(plans: Sequence[Plan]) -> frozenset[Size]:
    """Return the sizes of the UNet's plan, the last but one."""
    return frozenset(
        (width, height)
        for width, height in plans[-2].sizes()
        if width is not None and height is not None
    )


@dataclass(frozen=True)
class _Execution:
    """A context that is set up for one shape, and the graph that replays it."""

    context: Any
    graph: torch.cuda.CUDAGraph | None
    inputs: dict[str, Tensor]  #: views of the buffers
    outputs: dict[str, Tensor]


class PlanNetwork:
    """One plan, executed on the current stream. Its buffers fit its largest profile."""

    def __init__(
        self, trt: Any, runtime: Any, plan: Plan, device: torch.device, pixels_per_latent: int
    ) -> None:
        self._trt, self._plan, self._device = trt, plan, device
        self._engine = runtime.deserialize_cuda_engine(plan.path.read_bytes())
        if self._engine is None:
            raise plan.unfit("TensorRT could not read it; the log has its message")
        export = plan.record.export
        self._ports = {"in": export.inputs, "out": export.outputs}
        self._pixels_per_latent = pixels_per_latent
        self.max_rows = max(profile.rows[2] for profile in plan.record.profiles)
        self._buffers = {
            port.name: self._buffer(port) for port in (*export.inputs, *export.outputs)
        }
        # All contexts of this plan share this memory: they never run at the same time.
        size = int(self._engine.device_memory_size_v2)
        self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self._executions: dict[tuple[int, int, int], _Execution] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See CompiledNetwork. Raises PlanUnfit for what is in none of its profiles."""
        first = inputs[self._ports["in"][0].name]
        rows = len(first)
        height, width = first.shape[2:] if first.dim() == 4 else (0, 0)  # noqa: PLR2004  # NCHW
        execution = self._execution(rows, width, height)
        for name, tensor in inputs.items():
            execution.inputs[name][:rows].copy_(tensor)
        if execution.graph is not None:
            execution.graph.replay()
        else:
            self._execute(execution.context)
        return {name: tensor[:rows] for name, tensor in execution.outputs.items()}

    def _execution(self, rows: int, width: int, height: int) -> _Execution:
        """Return the execution for this shape, prepared at its first use. Rows are padded."""
        unit = self._pixels_per_latent
        size = (width * unit, height * unit) if width else (None, None)
        profile = self._plan.profile(rows, *size)
        minimum, _, maximum = self._plan.record.profiles[profile].rows
        padded = padded_rows(rows, minimum, maximum)
        key = (padded, width, height)
        if key not in self._executions:
            self._executions[key] = self._prepare(padded, width, height, profile)
        return self._executions[key]

    def _prepare(self, rows: int, width: int, height: int, profile: int) -> _Execution:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise torch.OutOfMemoryError(f"no memory for a context of {self._plan.part}")
        stream = torch.cuda.current_stream(self._device)
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        stream.synchronize()
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        sizes = _named_sizes(rows, width, height, self._pixels_per_latent)
        inputs = {port.name: self._view(port, sizes) for port in self._ports["in"]}
        outputs = {port.name: self._view(port, sizes) for port in self._ports["out"]}
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._plan.unfit(f"TensorRT rejects {name} of shape {list(tensor.shape)}")
        for name, tensor in (inputs | outputs).items():
            context.set_tensor_address(name, tensor.data_ptr())
        graph = self._graph(context) if rows in GRAPH_ROWS else None
        return _Execution(context, graph, inputs, outputs)

    def _graph(self, context: Any) -> torch.cuda.CUDAGraph:
        self._execute(context)  # TensorRT's first call does work that cannot be captured
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self._device)):
            self._execute(context)
        return graph

    def _execute(self, context: Any) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not run {self._plan.part}; the log has its message")

    def _buffer(self, port: Port) -> Tensor:
        """Return a buffer for the largest batch, zeroed: padding rows must be finite, too."""
        unit = self._pixels_per_latent
        size = max(
            torch.Size(
                port.shape(
                    _named_sizes(
                        profile.rows[2],
                        (profile.width or 0) // unit,
                        (profile.height or 0) // unit,
                        unit,
                    )
                )
            ).numel()
            for profile in self._plan.record.profiles
        )
        return torch.zeros(size, dtype=_DTYPES[port.dtype], device=self._device)

    def _view(self, port: Port, sizes: dict[str, int]) -> Tensor:
        shape = torch.Size(port.shape(sizes))
        return self._buffers[port.name][: shape.numel()].view(shape)


def _named_sizes(rows: int, width: int, height: int, unit: int) -> dict[str, int]:
    """Return values for the names in ports' dims; width and height are in latents."""
    return {
        "rows": rows,
        "width": width,
        "height": height,
        "image_width": width * unit,
        "image_height": height * unit,
    }


def padded_rows(rows: int, minimum: int, maximum: int) -> int:
    """Return the batch that `rows` are padded to, within the limits of its profile."""
    needed = max(rows, minimum)
    return next((count for count in GRAPH_ROWS if needed <= count <= maximum), needed)
