"""What a compiled part of a model is: its plan, the record beside it, and where it may run.

`python -m compile` writes the records, the engine reads them; nothing here needs TensorRT or torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

PLAN: Final = "model.plan"  #: what Triton's tensorrt backend looks for in a version's folder
RECORD: Final = "engine.json"
VERSION: Final = "1"  #: Triton's folder of a model's only version

Builder = Literal["tensorrt", "tensorrt-rtx"]


class PlanUnfit(RuntimeError):
    """This plan cannot be used here; the message says why, and which command makes one that can."""


class Port(BaseModel):
    """A tensor that goes in or comes out. Names in `dims` stand for what differs between calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Literal["float32", "float16", "int32"]
    dims: tuple[int | str, ...]  #: "rows", and "height" and "width" in the latents' or pixels' unit

    def shape(self, sizes: "dict[str, int]") -> tuple[int, ...]:
        """Its shape, given what the names in `dims` stand for. Raises KeyError."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


class Profile(BaseModel):
    """What an engine was optimised for. It runs nothing outside its profiles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[int, int, int]  #: least, best, most
    width: int | None = None  #: of the picture, in pixels; None where the part has no size
    height: int | None = None

    def takes(self, rows: int, width: int | None, height: int | None) -> bool:
        """Whether so many rows of this size fit, when fewer than its least are filled up to it."""
        return rows <= self.rows[2] and (self.width, self.height) == (width, height)


class Export(BaseModel):
    """A part as ONNX: what it was made from, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    model: str  #: as it was given on the command line: a folder or a hub id
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: Literal["float32", "float16"]
    opset: int
    weights_sha256: str
    onnx_sha256: str
    deviation: float  #: from torch, as a share of the largest number in its output
    versions: dict[str, str]  #: of torch, onnx, …, when it was exported
    seconds: float


class PlanRecord(BaseModel):
    """`engine.json`: where a plan comes from, and the only machine that it fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    export: Export
    builder: Builder
    builder_version: str  #: of TensorRT; a plan runs on no other
    compute_capability: str  #: of the GPU, as "9.0"
    gpu: str  #: its name; empty where the builder needed none
    cuda: str  #: what the driver supported at the build; empty without a GPU
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]
    plan_sha256: str
    seconds: float
    rebuild: str  #: the command that makes it again


@dataclass(frozen=True)
class Machine:
    """What a plan must fit."""

    builder: Builder
    builder_version: str
    compute_capability: str
    gpu: str


@dataclass(frozen=True)
class Plan:
    """A plan file that is what its record says."""

    path: Path
    record: PlanRecord

    @property
    def part(self) -> str:
        """Its name in Triton's repository."""
        return self.record.export.part

    def unfit(self, why: str) -> PlanUnfit:
        """An error that names this plan, and says how to make one that fits."""
        return PlanUnfit(f"{self.part}: {why}; make it again: {self.record.rebuild}")

    def profile(self, rows: int, width: int | None, height: int | None) -> int:
        """Which profile to use: of those that fit, the one with the nearest best. Raises PlanUnfit.

        `width` and `height` are the picture's; None for a part that has no size.
        """
        fitting = [
            (abs(profile.rows[1] - rows), index)
            for index, profile in enumerate(self.record.profiles)
            if profile.takes(rows, width, height)
        ]
        if fitting:
            return min(fitting)[1]
        size = "" if width is None else f" of {width}x{height}"
        raise self.unfit(f"{rows} rows{size} are in none of its profiles ({self.profiles()})")

    def profiles(self) -> str:
        """Its profiles, in words."""
        return ", ".join(_words(profile) for profile in self.record.profiles)

    def sizes(self) -> set[tuple[int | None, int | None]]:
        """Widths and heights of pictures that it was built for."""
        return {(profile.width, profile.height) for profile in self.record.profiles}

    def most_rows(self, width: int | None, height: int | None) -> int:
        """The most rows of this size in one call; 0 when it was not built for the size."""
        fitting = [
            p.rows[2] for p in self.record.profiles if (p.width, p.height) == (width, height)
        ]
        return max(fitting, default=0)

    def refuse_other_machine(self, machine: Machine) -> None:
        """Raises PlanUnfit unless it was built by this TensorRT for this kind of GPU."""
        record = self.record
        if record.builder != machine.builder:
            raise self.unfit(f"built by {record.builder}, and here is {machine.builder}")
        if record.builder_version != machine.builder_version:
            ours = f"{machine.builder} {machine.builder_version}"
            raise self.unfit(f"built by {record.builder} {record.builder_version}, here is {ours}")
        if record.compute_capability != machine.compute_capability:
            theirs = f"{record.gpu or 'GPUs'} (compute capability {record.compute_capability})"
            ours = f"{machine.gpu} ({machine.compute_capability})"
            raise self.unfit(f"built for {theirs}, here is {ours}")


def _words(profile: Profile) -> str:
    least, best, most = profile.rows
    size = "" if profile.width is None else f" of {profile.width}x{profile.height}"
    return f"{least} to {most} rows{size}, best {best}"


def find_plan(repository: Path, part: str, *, make: str) -> Plan:
    """The plan of a part, read and checked against its record.

    Raises PlanUnfit when it is missing or not what its record says; `make` is the command to
    suggest where there is no record to name one.
    """
    folder = repository / part / VERSION
    record = _read_record(folder / RECORD, part, make)
    plan = Plan(folder / PLAN, record)
    if record.export.part != part:
        raise plan.unfit(f"{folder / RECORD} is of {record.export.part}")
    if not plan.path.is_file():
        raise plan.unfit(f"{plan.path} is missing")
    if sha256(plan.path) != record.plan_sha256:
        raise plan.unfit(f"{plan.path} is not the file that {RECORD} was written for")
    return plan


def _read_record(path: Path, part: str, make: str) -> PlanRecord:
    try:
        return PlanRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise PlanUnfit(f"{part}: {path} is missing; make it: {make}") from None
    except ValidationError as error:
        raise PlanUnfit(f"{part}: {path} cannot be read ({error}); make it again: {make}") from None


def sha256(*paths: Path) -> str:
    """Of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def refuse_other_weights(plans: Sequence[Plan], model_dir: Path, make: str) -> None:
    """Raises PlanUnfit unless every plan was made from the weights in this folder."""
    for plan in plans:
        if weights_sha256(model_dir, plan.part) != plan.record.export.weights_sha256:
            raise PlanUnfit(
                f"{plan.part}: made from other weights than {model_dir} holds; make it: {make}"
            )


#: which folder of the weights a part is made from
FOLDERS: Final = {"vae_decoder": "vae"}


def weights_sha256(model_dir: Path, part: str) -> str:
    """Of the weights and the configuration that a part is made from. Raises FileNotFoundError."""
    folder = model_dir / FOLDERS.get(part, part)
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    if len(files) == 1:
        raise FileNotFoundError(f"{folder} has no .safetensors")
    return sha256(*files)
