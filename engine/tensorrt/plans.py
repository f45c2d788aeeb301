"""Compiled parts of a model: plans, their records, and the machines that can run them.

`python -m compile` writes the records, the engine reads them. This module imports neither TensorRT
nor torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

PLAN: Final = "model.plan"  #: the file name of Triton's tensorrt backend
RECORD: Final = "engine.json"
VERSION: Final = "1"  #: Triton's folder of a model's only version

Builder = Literal["tensorrt", "tensorrt-rtx"]


class PlanUnfit(RuntimeError):
    """A plan cannot be used here; the message says why, and the command that builds another."""


class Port(BaseModel):
    """An input or output tensor. Names in `dims` stand for sizes that vary between calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Literal["float32", "float16", "int32"]
    dims: tuple[int | str, ...]  #: "rows", and "height" and "width" in the latents' or pixels' unit

    def shape(self, sizes: "dict[str, int]") -> tuple[int, ...]:
        """Return the shape for these values of the names in `dims`. Raises KeyError."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


class Profile(BaseModel):
    """Sizes that a plan was optimized for. It runs nothing outside its profiles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[int, int, int]  #: minimum, optimum, maximum
    width: int | None = None  #: of the image, in pixels; None where the part has no size
    height: int | None = None

    def takes(self, rows: int, width: int | None, height: int | None) -> bool:
        """Return whether it runs this many rows of this size; fewer than its minimum are padded."""
        return rows <= self.rows[2] and (self.width, self.height) == (width, height)


class Export(BaseModel):
    """Record of a part's ONNX file: its sources and options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    model: str  #: as given on the command line: a folder or a hub id
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: Literal["float32", "float16"]
    opset: int
    weights_sha256: str
    onnx_sha256: str
    deviation: float  #: from torch, as a share of the largest value of its output
    versions: dict[str, str]  #: of torch, onnx, …, when it was exported
    seconds: float


class PlanRecord(BaseModel):
    """`engine.json`: the sources of a plan, and the only machine that can run it."""

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

    def unfit(self, reason: str) -> PlanUnfit:
        """Return an error that names this plan and the command that builds another."""
        return PlanUnfit(f"{self.part}: {reason}; build it again: {self.record.rebuild}")

    def profile(self, rows: int, width: int | None, height: int | None) -> int:
        """Return the index of the fitting profile with the nearest optimum. Raises PlanUnfit.

        `width` and `height` are the image's; None for a part that has no size.
        """
        fitting = [
            (abs(profile.rows[1] - rows), index)
            for index, profile in enumerate(self.record.profiles)
            if profile.takes(rows, width, height)
        ]
        if fitting:
            return min(fitting)[1]
        size = "" if width is None else f" of {width}x{height}"
        raise self.unfit(f"{rows} rows{size} are in none of its profiles ({self.profiles_text()})")

    def profiles_text(self) -> str:
        """Return its profiles for messages."""
        return ", ".join(_profile_text(profile) for profile in self.record.profiles)

    def sizes(self) -> set[tuple[int | None, int | None]]:
        """Return the widths and heights of images that it was built for."""
        return {(profile.width, profile.height) for profile in self.record.profiles}

    def max_rows(self, width: int | None, height: int | None) -> int:
        """Return the most rows of this size in one call; 0 for another size."""
        fitting = [
            p.rows[2] for p in self.record.profiles if (p.width, p.height) == (width, height)
        ]
        return max(fitting, default=0)

    def require_machine(self, machine: Machine) -> None:
        """Raise PlanUnfit unless it was built by this TensorRT for this kind of GPU."""
        record = self.record
        if record.builder != machine.builder:
            raise self.unfit(f"built by {record.builder}, but {machine.builder} is installed")
        if record.builder_version != machine.builder_version:
            ours = f"{machine.builder} {machine.builder_version}"
            raise self.unfit(
                f"built by {record.builder} {record.builder_version}, but {ours} is installed"
            )
        if record.compute_capability != machine.compute_capability:
            theirs = f"{record.gpu or 'GPUs'} (compute capability {record.compute_capability})"
            ours = f"{machine.gpu} ({machine.compute_capability})"
            raise self.unfit(f"built for {theirs}, but the GPU here is {ours}")


def _profile_text(profile: Profile) -> str:
    minimum, optimum, maximum = profile.rows
    size = "" if profile.width is None else f" of {profile.width}x{profile.height}"
    return f"{minimum} to {maximum} rows{size}, optimum {optimum}"


def find_plan(repository: Path, part: str, *, command: str) -> Plan:
    """Read a part's plan and check it against its record.

    Raises PlanUnfit when it is missing or differs from its record; `command` builds it, for the
    message when there is no record to name one.
    """
    folder = repository / part / VERSION
    record = _read_record(folder / RECORD, part, command)
    plan = Plan(folder / PLAN, record)
    if record.export.part != part:
        raise plan.unfit(f"{folder / RECORD} is the record of {record.export.part}")
    if not plan.path.is_file():
        raise plan.unfit(f"{plan.path} is missing")
    if sha256(plan.path) != record.plan_sha256:
        raise plan.unfit(f"{plan.path} is not the file that {RECORD} was written for")
    return plan


def _read_record(path: Path, part: str, command: str) -> PlanRecord:
    try:
        return PlanRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise PlanUnfit(f"{part}: {path} is missing; build it: {command}") from None
    except ValidationError as error:
        raise PlanUnfit(
            f"{part}: {path} cannot be read ({error}); build it again: {command}"
        ) from None


def sha256(*paths: Path) -> str:
    """Return the digest of the files' concatenated contents."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def require_weights(plans: Sequence[Plan], model_dir: Path, command: str) -> None:
    """Raise PlanUnfit unless every plan was made from the weights in this folder."""
    for plan in plans:
        if weights_sha256(model_dir, plan.part) != plan.record.export.weights_sha256:
            raise PlanUnfit(
                f"{plan.part}: made from other weights than those in {model_dir}; "
                f"build it: {command}"
            )


#: folder of the weights that a part is made from, where it is not named like the part
FOLDERS: Final = {"vae_decoder": "vae"}


def weights_sha256(model_dir: Path, part: str) -> str:
    """Return the digest of a part's weights and configuration. Raises FileNotFoundError."""
    folder = model_dir / FOLDERS.get(part, part)
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    if len(files) == 1:
        raise FileNotFoundError(f"{folder} contains no .safetensors file")
    return sha256(*files)
