"""Runs a model's plans with TensorRT: checked at load, buffers kept, small calls as graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.tensorrt.api import import_tensorrt, this_machine
from engine.tensorrt.compiled_runner import (
    CompiledRunner,
    Network,
    PipelineConfig,
    Size,
    read_pipeline_config,
)
from engine.tensorrt.plans import Machine, Plan, PlanUnfit, Port, find_plan, refuse_other_weights

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "int32": torch.int32}
#: small calls are filled up to one of these and replayed as a CUDA graph: there, launching the
#: kernels takes as long as they do
GRAPHED_ROWS: Final = (1, 2, 4, 8, 16)


def load_tensorrt_runner(
    model_dir: Path, repository: Path, *, device: str, max_unet_rows: int
) -> CompiledRunner:
    """The plans of `repository`, made of the weights in `model_dir` by `python -m compile`.

    Everything that can be wrong is found here, before a row is drawn. Raises PlanUnfit, which says
    what to do, TensorRTMissing, OSError for a missing file of the model, UnsupportedSchedule.
    """
    facts = read_pipeline_config(model_dir)
    plans = checked_plans(model_dir, repository, facts, max_unet_rows=max_unet_rows)
    trt = import_tensorrt(plans[0].record.builder)
    where = torch.device(device)
    machine = this_machine(trt, plans[0].record.builder, where.index or 0)
    if where.type != "cuda" or machine is None:
        raise plans[0].unfit(f"plans need a GPU, and this model was to run on {device}")
    return _opened(trt, facts, plans, machine, where)


def _opened(
    trt: Any, facts: PipelineConfig, plans: Sequence[Plan], machine: Machine, device: torch.device
) -> CompiledRunner:
    for plan in plans:
        plan.refuse_other_machine(machine)
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    networks: dict[str, Network] = {
        plan.part: PlanNetwork(trt, runtime, plan, device, facts.pixels_per_latent)
        for plan in plans
    }
    return CompiledRunner(facts, networks, sizes=_sizes(plans), device=device)


def checked_plans(
    model_dir: Path, repository: Path, facts: PipelineConfig, *, max_unet_rows: int
) -> list[Plan]:
    """A plan for every part, whole, of these weights, and wide enough. Raises PlanUnfit."""
    make = f"python -m compile {model_dir} --output {repository}"
    plans = [find_plan(repository, part, make=make) for part in facts.parts]
    if any(plan.record.builder != plans[0].record.builder for plan in plans):
        raise PlanUnfit(f"the plans are of two TensorRTs; make them again: {make}")
    refuse_other_weights(plans, model_dir, make)
    unet, decoder = plans[-2], plans[-1]
    if unet.sizes() != decoder.sizes():
        raise unet.unfit(f"it has other sizes than {decoder.part} ({decoder.profiles()})")
    for width, height in _sizes(plans):
        if (most := unet.most_rows(width, height)) < max_unet_rows:
            raise unet.unfit(
                f"max_unet_rows is {max_unet_rows}, and it takes {most} rows of {width}x{height} "
                f"at most ({unet.profiles()}); lower the one in config.pbtxt or raise --rows"
            )
    return plans


def _sizes(plans: Sequence[Plan]) -> frozenset[Size]:
    """What the UNet, the last but one, was built for."""
    return frozenset(
        (width, height)
        for width, height in plans[-2].sizes()
        if width is not None and height is not None
    )


@dataclass(frozen=True)
class _Call:
    """A context with everything set for calls of one shape, and the graph that replays them."""

    context: Any
    graph: torch.cuda.CUDAGraph | None
    inputs: dict[str, Tensor]  #: views of the buffers
    outputs: dict[str, Tensor]


class PlanNetwork:
    """One plan, executed on the current stream. Its buffers are as large as its profiles allow."""

    def __init__(
        self, trt: Any, runtime: Any, plan: Plan, device: torch.device, pixels_per_latent: int
    ) -> None:
        self._trt, self._plan, self._device = trt, plan, device
        self._engine = runtime.deserialize_cuda_engine(plan.path.read_bytes())
        if self._engine is None:
            raise plan.unfit("TensorRT could not read it; what it said is in the log")
        export = plan.record.export
        self._ports = {"in": export.inputs, "out": export.outputs}
        self._pixels_per_latent = pixels_per_latent
        self.most_rows = max(profile.rows[2] for profile in plan.record.profiles)
        self._buffers = {
            port.name: self._buffer(port) for port in (*export.inputs, *export.outputs)
        }
        # One piece of memory for all contexts of this plan: they never run at the same time.
        size = int(self._engine.device_memory_size_v2)
        self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self._calls: dict[tuple[int, int, int], _Call] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See Network. Raises PlanUnfit for what is in none of its profiles."""
        first = inputs[self._ports["in"][0].name]
        rows = len(first)
        height, width = first.shape[2:] if first.dim() == 4 else (0, 0)  # noqa: PLR2004  # NCHW
        call = self._call(rows, width, height)
        for name, tensor in inputs.items():
            call.inputs[name][:rows].copy_(tensor)
        if call.graph is not None:
            call.graph.replay()
        else:
            self._execute(call.context)
        return {name: tensor[:rows] for name, tensor in call.outputs.items()}

    def _call(self, rows: int, width: int, height: int) -> _Call:
        """Prepared when first wanted. Rows are filled up: what is in the rest is of no interest."""
        unit = self._pixels_per_latent
        size = (width * unit, height * unit) if width else (None, None)
        profile = self._plan.profile(rows, *size)
        least, _, most = self._plan.record.profiles[profile].rows
        filled = filled_up(rows, least, most)
        key = (filled, width, height)
        if key not in self._calls:
            self._calls[key] = self._prepared(filled, width, height, profile)
        return self._calls[key]

    def _prepared(self, rows: int, width: int, height: int, profile: int) -> _Call:
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
                raise self._plan.unfit(f"TensorRT refuses {name} of shape {list(tensor.shape)}")
        for name, tensor in (inputs | outputs).items():
            context.set_tensor_address(name, tensor.data_ptr())
        graph = self._graph(context) if rows in GRAPHED_ROWS else None
        return _Call(context, graph, inputs, outputs)

    def _graph(self, context: Any) -> torch.cuda.CUDAGraph:
        self._execute(context)  # once before: what TensorRT does at the first call is no kernel
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self._device)):
            self._execute(context)
        return graph

    def _execute(self, context: Any) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not run {self._plan.part}; the log says why")

    def _buffer(self, port: Port) -> Tensor:
        """Room for the largest call. Of zeros: rows that nobody asked for are numbers, too."""
        unit = self._pixels_per_latent
        most = max(
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
        return torch.zeros(most, dtype=_DTYPES[port.dtype], device=self._device)

    def _view(self, port: Port, sizes: dict[str, int]) -> Tensor:
        shape = torch.Size(port.shape(sizes))
        return self._buffers[port.name][: shape.numel()].view(shape)


def _named_sizes(rows: int, width: int, height: int, unit: int) -> dict[str, int]:
    """What the names in ports' dims stand for; width and height in latents."""
    return {
        "rows": rows,
        "width": width,
        "height": height,
        "picture_width": width * unit,
        "picture_height": height * unit,
    }


def filled_up(rows: int, least: int, most: int) -> int:
    """How many rows a call of `rows` is made of, within what its profile takes."""
    wanted = max(rows, least)
    graphed = (count for count in GRAPHED_ROWS if wanted <= count <= most)
    return next(graphed, wanted)
