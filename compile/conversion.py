"""Conversion of a model from weights to plans, part by part; files that fit are kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compile.build import (
    Log,
    OnnxRejected,
    Target,
    build,
    flags_of,
    open_target,
    profiles_of,
    sha256_of,
)
from compile.configs import config_pbtxt
from compile.export import OPSETS, ExportFailed, export, find_export, onnx_path, write_record
from compile.parity import compare
from compile.parts import Part, Precision, Size, parts_of
from engine.tensorrt.plans import (
    PLAN,
    RECORD,
    VERSION,
    Builder,
    Export,
    PlanRecord,
    PlanUnfit,
    find_plan,
)


class UnsupportedSize(ValueError):
    """The model cannot generate images of this size."""


@dataclass(frozen=True)
class CompileJob:
    """Arguments of one run."""

    model: str  #: as the user named it
    model_dir: Path
    repository: Path
    precision: Precision
    rows: tuple[int, int, int]  #: of the UNet: minimum, optimum, maximum
    sizes: tuple[Size, ...]
    opsets: tuple[int, ...]  #: to try, in this order
    builder: Builder
    compute_capability: str | None
    dry_run: bool
    command: str  #: that builds the plans again


def convert(job: CompileJob, log: Log) -> None:
    """Build the plans of every part, or stop before them (`dry_run`).

    Raises UnsupportedModel, UnsupportedSize, ExportFailed, ParityFailed, BuildFailed,
    TensorRTMissing.
    """
    fixed_size = job.sizes[0] if len(job.sizes) == 1 else None
    parts = parts_of(job.model_dir, job.precision, fixed_size=fixed_size)
    require_sizes(parts, job.sizes)
    # Before the long work: fail early if no plan can be built here.
    target = None if job.dry_run else open_target(job.builder, job.compute_capability)
    for part in parts:
        network = _LazyNetwork(part.load)
        exported = _export(job, part, network, job.opsets, log)
        if target is None:
            _write_config(job, part, exported)
            log(f"{part.name}: config.pbtxt written; no plan (dry run)")
            continue
        try:
            _build_plan(job, part, exported, target, log)
        except OnnxRejected as error:
            older = tuple(opset for opset in job.opsets if opset < exported.opset)
            if not older:
                raise
            log(f"{part.name}: {error}; trying an older opset")
            _build_plan(job, part, _export(job, part, network, older, log), target, log)


def require_sizes(parts: Sequence[Part], sizes: Sequence[Size]) -> None:
    """Raise UnsupportedSize unless all parts can run these sizes."""
    unit = max(part.unit for part in parts)
    for width, height in sizes:
        if width % unit or height % unit or min(width, height) < unit:
            raise UnsupportedSize(f"{width}x{height}: sizes must be multiples of {unit}")


class _LazyNetwork:
    """A network that is loaded at its first use: existing parts never load theirs."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._network: nn.Module | None = None

    def __call__(self) -> nn.Module:
        if self._network is None:
            self._network = self._load()
        return self._network


def _export(
    job: CompileJob, part: Part, network: _LazyNetwork, opsets: Sequence[int], log: Log
) -> Export:
    """Return the existing ONNX file, or export one and compare it with torch."""
    for opset in opsets:
        if found := find_export(job.repository, job.model_dir, part, opset=opset):
            log(f"{part.name}: ONNX of opset {opset} exists, deviation {found.deviation:.1e}")
            return found
    for opset in opsets:
        log(f"{part.name}: exporting at opset {opset}, {part.precision}")
        try:
            exported = export(
                job.repository, job.model_dir, job.model, part, network(), opset=opset
            )
        except ExportFailed as error:
            if opset == opsets[-1]:
                raise
            log(f"{error}; trying an older opset")
            continue
        log(f"{part.name}: exported in {exported.seconds} s; comparing with torch")
        onnx = onnx_path(job.repository, part.name)
        deviations = compare(part, network(), onnx, job.sizes, log=log)
        deviation = max(each.share for each in deviations)
        exported = exported.model_copy(update={"deviation": deviation})
        write_record(job.repository, exported)
        return exported
    raise ExportFailed(f"{part.name}: no opset left to try, of {OPSETS}")


def _build_plan(job: CompileJob, part: Part, exported: Export, target: Target, log: Log) -> None:
    profiles = profiles_of(part, job.rows, job.sizes)
    record = PlanRecord(
        export=exported,
        builder=target.builder,
        builder_version=target.version,
        compute_capability=target.compute_capability,
        gpu=target.gpu,
        cuda=target.cuda,
        profiles=tuple(profiles),
        flags=flags_of(exported.opset),
        plan_sha256="",
        seconds=0,
        rebuild=job.command,
    )
    if _exists(job, part, record):
        log(f"{part.name}: the plan exists")
        _write_config(job, part, exported)
        return
    log(f"{part.name}: building with {target.builder} {target.version}")
    started = time.monotonic()
    plan = build(
        onnx_path(job.repository, part.name),
        part,
        profiles,
        target,
        opset=exported.opset,
        timing_cache=job.repository / "timing.cache",
        log=log,
    )
    seconds = round(time.monotonic() - started, 1)
    record = record.model_copy(update={"plan_sha256": sha256_of(plan), "seconds": seconds})
    _write_plan(job, part, record, plan)
    _write_config(job, part, exported)
    log(f"{part.name}: plan of {len(plan) / 1e6:.1f} MB in {seconds} s")


def _exists(job: CompileJob, part: Part, record: PlanRecord) -> bool:
    """Return whether an intact plan exists with the same record, except for its build."""
    try:
        found = find_plan(job.repository, part.name, command=job.command).record
    except PlanUnfit:
        return False
    of_build = {"plan_sha256", "seconds", "rebuild", "cuda", "gpu"}
    return found.model_dump(exclude=of_build) == record.model_dump(exclude=of_build)


def _write_plan(job: CompileJob, part: Part, record: PlanRecord, plan: bytes) -> None:
    folder = job.repository / part.name / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    # At no moment is a record beside the plan of another.
    (folder / RECORD).unlink(missing_ok=True)
    unfinished = folder / f"{PLAN}.part"
    unfinished.write_bytes(plan)
    unfinished.replace(folder / PLAN)
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_config(job: CompileJob, part: Part, exported: Export) -> None:
    profiles = profiles_of(part, job.rows, job.sizes)
    config = config_pbtxt(part.name, exported.inputs, exported.outputs, profiles, job.builder)
    path = job.repository / part.name / "config.pbtxt"
    path.write_text(config, encoding="utf-8")
