"""ONNX files to plans, by TensorRT or by TensorRT for RTX: one API, versions 10 and 11."""

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

OPTIMIZATION_LEVEL: Final = 3  #: TensorRT's own default, said so that the record can say it
NATIVE_NORM_SINCE: Final = 21  #: the first opset that writes GroupNormalization as what it is
PICTURES: Final = (1, 4, 8)  #: least, best and most that are decoded in one call
TELL_EVERY_S: Final = 2.0

Tell = Callable[[str], None]


class BuildFailed(RuntimeError):
    """TensorRT made no plan; the message holds what it said."""


class ParserRefused(BuildFailed):
    """TensorRT does not understand the ONNX file: an older opset may do."""


@dataclass(frozen=True)
class Target:
    """Who builds, for which GPU."""

    builder: Builder
    version: str
    compute_capability: str
    gpu: str
    cuda: str
    trt: Any


def open_target(builder: Builder, compute_capability: str | None) -> Target:
    """The builder of this machine. Raises TensorRTMissing, BuildFailed.

    TensorRT builds for the GPU that is here. The RTX edition needs none: then
    `compute_capability` says which it is for.
    """
    trt = import_tensorrt(builder)
    here = this_machine(trt, builder)
    if here is None and builder == "tensorrt":
        raise BuildFailed("TensorRT builds on the GPU that will run the plan, and here is none")
    if here is None and compute_capability is None:
        raise BuildFailed("no GPU here: say --compute-capability, as 8.9 for an RTX 4090")
    if builder == "tensorrt" and here and compute_capability not in {None, here.compute_capability}:
        raise BuildFailed(f"TensorRT builds for this GPU only ({here.compute_capability})")
    wanted = compute_capability or (here.compute_capability if here else "")
    if builder == "tensorrt-rtx":
        _capability(trt, wanted)
    is_for_here = here is not None and here.compute_capability == wanted
    return Target(
        builder=builder,
        version=trt.__version__,
        compute_capability=wanted,
        gpu=here.gpu if here and is_for_here else "",
        cuda=str(torch.version.cuda or "") if here else "",
        trt=trt,
    )


def profiles_of(part: Part, rows: tuple[int, int, int], sizes: Sequence[Size]) -> list[Profile]:
    """One for each size, in which width and height are fixed; only the rows vary."""
    if not part.has_size:
        return [Profile(rows=(1, *rows[1:]))]  # texts are new one by one
    if part.name == "vae_decoder":
        rows = PICTURES
    return [Profile(rows=rows, width=width, height=height) for width, height in sizes]


def flags_of(opset: int) -> tuple[str, ...]:
    """What was asked of TensorRT, for the record."""
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
    tell: Tell,
) -> bytes:
    """The plan. Raises ParserRefused, BuildFailed."""
    trt = target.trt
    said = _listener(trt)
    builder = trt.Builder(said)
    network = _network(trt, builder)
    _parse(trt, network, said, onnx, opset)
    _let_attention_be_decomposed(trt, network)
    config = builder.create_builder_config()
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    if target.builder == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, target.compute_capability), 0)
    config.progress_monitor = _monitor(trt, part.name, tell)
    if target.builder == "tensorrt":  # the RTX edition measures at run time instead
        _load_timing_cache(config, timing_cache)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(builder, part, profile))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(f"{part.name}: TensorRT made no plan: {said.last_words()}")
    if target.builder == "tensorrt":
        _save(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _network(trt: Any, builder: Any) -> Any:
    # From 11 on all networks are strongly typed, and the flag is gone.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))


def _parse(trt: Any, network: Any, said: Any, onnx: Path, opset: int) -> None:
    parser = trt.OnnxParser(network, said)
    if opset < NATIVE_NORM_SINCE:
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(at).desc()) for at in range(parser.num_errors))
        raise ParserRefused(f"{onnx} at opset {opset}: {errors or said.last_words()}")


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """ONNX's Attention must otherwise meet a fused kernel, or there is no plan: none has 32 bits.

    Where there is a fused kernel, TensorRT takes it as before.
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
            f"TensorRT for RTX {trt.__version__} does not build for compute capability "
            f"{compute_capability}, but for {', '.join(sorted(known))}"
        )
    return known[name]


def _optimization_profile(builder: Any, part: Part, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for port in part.inputs:
        shapes = [
            port.shape(part.sizes(rows, profile.width or 0, profile.height or 0))
            for rows in profile.rows
        ]
        made.set_shape(port.name, *shapes)
    return made


def _load_timing_cache(config: Any, path: Path) -> None:
    known = path.read_bytes() if path.exists() else b""
    # One of another TensorRT or GPU is not taken, and an empty one begun.
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _listener(trt: Any) -> Any:
    """A logger that keeps warnings and errors, for when nothing comes out."""

    class Listener(trt.ILogger):  # type: ignore[misc]  # its type is known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._words: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                self._words.append(message)

        def last_words(self) -> str:
            return " | ".join(self._words[-3:]) or "it said nothing"

    return Listener()


def _monitor(trt: Any, part: str, tell: Tell) -> Any:
    """Says how far TensorRT is, every few seconds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its type is known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._told = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self._steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() - self._told > TELL_EVERY_S:
                self._told = time.monotonic()
                tell(f"{part}: building, {phase} {step} of {self._steps.get(phase, 0)}")
            return True

    return Monitor()


def sha256_of(plan: bytes) -> str:
    """As `engine.plans.sha256` of the file it becomes."""
    return hashlib.sha256(plan).hexdigest()
