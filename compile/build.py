"""Build of plans from ONNX files by TensorRT or TensorRT for RTX, versions 10 and 11."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from compile.parts import Part, Size
from engine.tensorrt.api import import_tensorrt, this_machine
from engine.tensorrt.plans import Builder, Profile

OPTIMIZATION_LEVEL: Final = 3  #: TensorRT's own default, explicit for the record
NATIVE_NORM_SINCE: Final = 21  #: the first opset with GroupNormalization
DECODER_ROWS: Final = (1, 4, 8)  #: minimum, optimum and maximum of images in one call
LOG_INTERVAL_S: Final = 2.0

Log = Callable[[str], None]  #: prints a line of progress


class BuildFailed(RuntimeError):
    """TensorRT built no plan; the message contains its errors."""


class OnnxRejected(BuildFailed):
    """TensorRT cannot parse the ONNX file; an older opset may work."""


@dataclass(frozen=True)
class Target:
    """The builder and the GPU that it builds for."""

    builder: Builder
    version: str
    compute_capability: str
    gpu: str
    cuda: str
    trt: Any


def open_target(builder: Builder, compute_capability: str | None) -> Target:
    """Return the target on this machine. Raises TensorRTMissing, BuildFailed.

    TensorRT builds for the GPU in this machine. The RTX edition needs none: then
    `compute_capability` selects the target.
    """
    trt = import_tensorrt(builder)
    here = this_machine(trt, builder)
    if here is None and builder == "tensorrt":
        raise BuildFailed("TensorRT builds on the GPU that will run the plan; none found")
    if here is None and compute_capability is None:
        raise BuildFailed("no GPU here: pass --compute-capability, such as 8.9 for an RTX 4090")
    if builder == "tensorrt" and here and compute_capability not in {None, here.compute_capability}:
        raise BuildFailed(f"TensorRT builds only for this GPU ({here.compute_capability})")
    target = compute_capability or (here.compute_capability if here else "")
    if builder == "tensorrt-rtx":
        _capability(trt, target)
    is_for_here = here is not None and here.compute_capability == target
    return Target(
        builder=builder,
        version=trt.__version__,
        compute_capability=target,
        gpu=here.gpu if here and is_for_here else "",
        cuda=str(torch.version.cuda or "") if here else "",
        trt=trt,
    )


def profiles_of(part: Part, rows: tuple[int, int, int], sizes: Sequence[Size]) -> list[Profile]:
    """Return one profile for each size; only its rows vary."""
    if not part.has_size:
        return [Profile(rows=(1, *rows[1:]))]  # a single new text is encoded alone
    if part.name == "vae_decoder":
        rows = DECODER_ROWS
    return [Profile(rows=rows, width=width, height=height) for width, height in sizes]


def flags_of(opset: int) -> tuple[str, ...]:
    """Return the builder's flags, for the record."""
    norm = ("native_instancenorm",) if opset < NATIVE_NORM_SINCE else ()
    return ("strongly_typed", f"optimization_level={OPTIMIZATION_LEVEL}", *norm)


def build(
    onnx: Path,
    part: Part,
    profiles: Sequence[Profile],
    target: Target,
    *,
    opset: int,
    timing_cache: Path,
    log: Log,
) -> bytes:
    """Build and return the plan. Raises OnnxRejected, BuildFailed."""
    trt = target.trt
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = _network(trt, builder)
    _parse(trt, network, logger, onnx, opset)
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    if target.builder == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, target.compute_capability), 0)
    config.progress_monitor = _monitor(trt, part.name, log)
    if target.builder == "tensorrt":  # the RTX edition measures at run time instead
        _load_timing_cache(config, timing_cache)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(builder, part, profile))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(f"{part.name}: TensorRT built no plan: {logger.last_messages()}")
    if target.builder == "tensorrt":
        _save(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _network(trt: Any, builder: Any) -> Any:
    # From 11 on all networks are strongly typed, and the flag is gone.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))


def _parse(trt: Any, network: Any, logger: Any, onnx: Path, opset: int) -> None:
    parser = trt.OnnxParser(network, logger)
    if opset < NATIVE_NORM_SINCE:
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(at).desc()) for at in range(parser.num_errors))
        raise OnnxRejected(f"{onnx} at opset {opset}: {errors or logger.last_messages()}")


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let TensorRT decompose ONNX's Attention where it has no fused kernel.

    Otherwise the build fails in float32, for which there is none.
    """
    boundary = getattr(trt, "IAttentionInputLayer", None)
    if boundary is None:
        return
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = boundary  # how TensorRT's bindings cast
            layer.attention.decomposable = True


def _capability(trt: Any, compute_capability: str) -> Any:
    name = f"SM{compute_capability.replace('.', '')}"
    known = trt.ComputeCapability.__members__
    if name not in known:
        raise BuildFailed(
            f"TensorRT for RTX {trt.__version__} does not support compute capability "
            f"{compute_capability}; it supports {', '.join(sorted(known))}"
        )
    return known[name]


def _optimization_profile(builder: Any, part: Part, profile: Profile) -> Any:
    optimization = builder.create_optimization_profile()
    for port in part.inputs:
        shapes = [
            port.shape(part.sizes(rows, profile.width or 0, profile.height or 0))
            for rows in profile.rows
        ]
        optimization.set_shape(port.name, *shapes)
    return optimization


def _load_timing_cache(config: Any, path: Path) -> None:
    known = path.read_bytes() if path.exists() else b""
    # The cache of another TensorRT or GPU is rejected: start with an empty one.
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _logger(trt: Any) -> Any:
    """Return a logger that keeps warnings and errors for a failed build."""

    class MessageLogger(trt.ILogger):  # type: ignore[misc]  # its type is known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                self._messages.append(message)

        def last_messages(self) -> str:
            return " | ".join(self._messages[-3:]) or "no message"

    return MessageLogger()


def _monitor(trt: Any, part: str, log: Log) -> Any:
    """Return a monitor that logs TensorRT's progress every few seconds."""

    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]  # its type is known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._logged = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self._steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() - self._logged > LOG_INTERVAL_S:
                self._logged = time.monotonic()
                log(f"{part}: building, {phase} {step} of {self._steps.get(phase, 0)}")
            return True

    return ProgressMonitor()


def sha256_of(plan: bytes) -> str:
    """Return the digest that `engine.tensorrt.plans.sha256` gives for the plan's file."""
    return hashlib.sha256(plan).hexdigest()
