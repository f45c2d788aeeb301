"""A model's way from weights to plans, part by part; what is there and fits is not made again."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compile.build import (
    ParserRefused,
    Target,
    Tell,
    build,
    flags_of,
    open_target,
    profiles_of,
    sha256_of,
)
from compile.configs import config_pbtxt
from compile.export import OPSETS, ExportFailed, export, find_export, keep, onnx_path
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


class ImpossibleSize(ValueError):
    """The model draws no pictures of this size."""


@dataclass(frozen=True)
class Order:
    """What is to be made."""

    model: str  #: as the user named it
    model_dir: Path
    repository: Path
    precision: Precision
    rows: tuple[int, int, int]  #: of the UNet: least, best, most
    sizes: tuple[Size, ...]
    opsets: tuple[int, ...]  #: to try, in this order
    builder: Builder
    compute_capability: str | None
    dry_run: bool
    command: str  #: that makes it again


def convert(order: Order, tell: Tell) -> None:
    """Make the plans of every part, or only what comes before them (`dry_run`).

    Raises UnsupportedModel, ImpossibleSize, ExportFailed, ParityFailed, BuildFailed,
    TensorRTMissing.
    """
    only = order.sizes[0] if len(order.sizes) == 1 else None
    parts = parts_of(order.model_dir, order.precision, fixed_size=only)
    refuse_impossible(parts, order.sizes)
    # Before the long work: whether the last step can be taken at all.
    target = None if order.dry_run else open_target(order.builder, order.compute_capability)
    for part in parts:
        network = _Lazy(part.load)
        exported = _exported(order, part, network, order.opsets, tell)
        if target is None:
            _write_config(order, part, exported)
            tell(f"{part.name}: config.pbtxt written; no plan (dry run)")
            continue
        try:
            _planned(order, part, exported, target, tell)
        except ParserRefused as refusal:
            older = tuple(opset for opset in order.opsets if opset < exported.opset)
            if not older:
                raise
            tell(f"{part.name}: {refusal}; trying an older opset")
            _planned(order, part, _exported(order, part, network, older, tell), target, tell)


def refuse_impossible(parts: Sequence[Part], sizes: Sequence[Size]) -> None:
    """Raises ImpossibleSize."""
    unit = max(part.unit for part in parts)
    for width, height in sizes:
        if width % unit or height % unit or min(width, height) < unit:
            raise ImpossibleSize(f"{width}x{height}: sizes must be multiples of {unit}")


class _Lazy:
    """A network that is read when first wanted: parts that are there already are never read."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._network: nn.Module | None = None

    def __call__(self) -> nn.Module:
        if self._network is None:
            self._network = self._load()
        return self._network


def _exported(
    order: Order, part: Part, network: _Lazy, opsets: Sequence[int], tell: Tell
) -> Export:
    """The ONNX file that is there, or a new one that was compared with torch."""
    for opset in opsets:
        if found := find_export(order.repository, order.model_dir, part, opset=opset):
            tell(f"{part.name}: ONNX of opset {opset} is there, off by {found.deviation:.1e}")
            return found
    for opset in opsets:
        tell(f"{part.name}: exporting at opset {opset}, {part.precision}")
        try:
            made = export(
                order.repository, order.model_dir, order.model, part, network(), opset=opset
            )
        except ExportFailed as failure:
            if opset == opsets[-1]:
                raise
            tell(f"{failure}; trying an older opset")
            continue
        tell(f"{part.name}: exported in {made.seconds} s; comparing with torch")
        onnx = onnx_path(order.repository, part.name)
        found_off = compare(part, network(), onnx, order.sizes, tell=tell)
        made = made.model_copy(update={"deviation": max(each.share for each in found_off)})
        keep(order.repository, made)
        return made
    raise ExportFailed(f"{part.name}: no opset to try, of {OPSETS}")


def _planned(order: Order, part: Part, exported: Export, target: Target, tell: Tell) -> None:
    profiles = profiles_of(part, order.rows, order.sizes)
    wanted = PlanRecord(
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
        rebuild=order.command,
    )
    if _is_there(order, part, wanted):
        tell(f"{part.name}: the plan is there")
        _write_config(order, part, exported)
        return
    tell(f"{part.name}: building with {target.builder} {target.version}")
    began = time.monotonic()
    plan = build(
        onnx_path(order.repository, part.name),
        part,
        profiles,
        target,
        opset=exported.opset,
        timing_cache=order.repository / "timing.cache",
        tell=tell,
    )
    seconds = round(time.monotonic() - began, 1)
    record = wanted.model_copy(update={"plan_sha256": sha256_of(plan), "seconds": seconds})
    _write_plan(order, part, record, plan)
    _write_config(order, part, exported)
    tell(f"{part.name}: plan of {len(plan) / 1e6:.1f} MB in {seconds} s")


def _is_there(order: Order, part: Part, wanted: PlanRecord) -> bool:
    """Whether a whole plan lies there that differs from the wanted in its making only."""
    try:
        found = find_plan(order.repository, part.name, command=order.command).record
    except PlanUnfit:
        return False
    unlike = {"plan_sha256", "seconds", "rebuild", "cuda", "gpu"}
    return found.model_dump(exclude=unlike) == wanted.model_dump(exclude=unlike)


def _write_plan(order: Order, part: Part, record: PlanRecord, plan: bytes) -> None:
    folder = order.repository / part.name / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    # No moment at which a record stands beside a plan that is not its own.
    (folder / RECORD).unlink(missing_ok=True)
    unfinished = folder / f"{PLAN}.part"
    unfinished.write_bytes(plan)
    unfinished.replace(folder / PLAN)
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_config(order: Order, part: Part, exported: Export) -> None:
    profiles = profiles_of(part, order.rows, order.sizes)
    config = config_pbtxt(part.name, exported.inputs, exported.outputs, profiles, order.builder)
    path = order.repository / part.name / "config.pbtxt"
    path.write_text(config, encoding="utf-8")
