"""Registry of models, with their limits and defaults.

A model is a folder in diffusers' layout with a `darkroom.toml` beside `model_index.json`.
"""

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from darkroom.errors import InputProblem, InvalidInput, SetupError
from darkroom.generation.params import (
    GenerationParams,
    JobInput,
    microbatch_key,
    model_of,
    random_seed,
    revision_in,
)

CARD: Final = "darkroom.toml"


class IntLimits(BaseModel):
    """Default and limits of an integer parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: int = Field(description="Value of a job that names none.")
    minimum: int = Field(description="Smallest value.")
    maximum: int = Field(description="Largest value.")
    multiple_of: int = Field(1, description="Values are multiples of it.")


class FloatLimits(BaseModel):
    """Default and limits of a real parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: float = Field(description="Value of a job that names none.")
    minimum: float = Field(description="Smallest value.")
    maximum: float = Field(description="Largest value.")


class Model(BaseModel):
    """Model, as its card describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")
    revision: str = Field(pattern=r"^[0-9a-f]{12}$")  #: of the weights, see `weights_revision`
    description: str
    license: str
    scheduler: Literal["ddim", "euler", "dpmsolver++"]
    precision: Literal["float32", "float16", "bfloat16"]
    max_microbatch: int = Field(ge=1)  #: jobs per model call
    #: most rows of a UNet batch, a guided job takes two; None: as in the model's config.pbtxt
    max_unet_rows: int | None = Field(default=None, ge=2)
    revision_of: str | None = None  #: name of the model that has a newer revision
    on_demand: bool = False  #: has replicas only while jobs need it
    width: IntLimits
    height: IntLimits
    num_inference_steps: IntLimits
    guidance_scale: FloatLimits
    folder: Path = Field(exclude=True)

    def microbatch_key(self, params: GenerationParams) -> str:
        """Return the microbatch key of a job with these parameters."""
        return microbatch_key(
            model=self.name,
            revision=self.revision,
            width=params.width,
            height=params.height,
            precision=self.precision,
        )


@dataclass(frozen=True)
class ModelRegistry:
    """Models of this installation by name, and the name of the default one."""

    models: Mapping[str, Model]
    default: str

    def find(self, name: str) -> Model | None:
        """Return a model by NAME, or by NAME@REVISION if that revision was kept."""
        name, _, revision = name.partition("@")
        return self._older_revision(name, revision) if revision else self.models.get(name)

    def model_for(self, name: str, key: str) -> Model:
        """Return the model for a job of this model and key: the key's revision, if it was kept."""
        return self._older_revision(name, revision_in(key)) or self.models[name]

    def model_for_key(self, key: str) -> Model | None:
        """Return the model for jobs of this microbatch key; None if it was removed."""
        name = model_of(key)
        return self.model_for(name, key) if name in self.models else None

    def _older_revision(self, name: str, revision: str) -> Model | None:
        for model in self.models.values():
            if model.revision == revision and name in {model.name, model.revision_of}:
                return model
        return None

    def resolve(self, job: JobInput) -> GenerationParams:
        """Fill in the model's defaults. Raises InvalidInput naming all fields out of bounds."""
        model = self.find(job.model or self.default)
        if model is None:
            known = ", ".join(sorted(self.models))
            raise InvalidInput(
                [InputProblem(("model",), "unknown_model", f"unknown model; known: {known}")]
            )
        params = GenerationParams(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            model=model.name,
            width=_or_default(job.width, model.width),
            height=_or_default(job.height, model.height),
            num_inference_steps=_or_default(job.num_inference_steps, model.num_inference_steps),
            guidance_scale=(
                model.guidance_scale.default if job.guidance_scale is None else job.guidance_scale
            ),
            seed=random_seed() if job.seed is None else job.seed,
            output_format=job.output_format,
        )
        if not _within(params, model):
            raise InvalidInput(list(_out_of_bounds(params, model)))
        return params


def _or_default(value: int | None, limits: IntLimits) -> int:
    return limits.default if value is None else value


def _within(params: GenerationParams, model: Model) -> bool:
    """Return whether all is within bounds; without a loop, as each row of large files asks."""
    width, height = model.width, model.height
    steps, guidance = model.num_inference_steps, model.guidance_scale
    return (
        width.minimum <= params.width <= width.maximum
        and height.minimum <= params.height <= height.maximum
        and steps.minimum <= params.num_inference_steps <= steps.maximum
        and guidance.minimum <= params.guidance_scale <= guidance.maximum
        and not params.width % width.multiple_of
        and not params.height % height.multiple_of
        and not params.num_inference_steps % steps.multiple_of
    )


def _out_of_bounds(params: GenerationParams, model: Model) -> Iterator[InputProblem]:
    for field in ("width", "height", "num_inference_steps", "guidance_scale"):
        limits: IntLimits | FloatLimits = getattr(model, field)
        value = getattr(params, field)
        if not limits.minimum <= value <= limits.maximum:
            message = f"must be between {limits.minimum} and {limits.maximum}"
            yield InputProblem((field,), "out_of_range", f"{message} for {model.name}")
        elif isinstance(limits, IntLimits) and value % limits.multiple_of:
            message = f"must be a multiple of {limits.multiple_of} for {model.name}"
            yield InputProblem((field,), "not_a_multiple", message)


def load_registry(models_dir: Path, default: str) -> ModelRegistry:
    """Read every model's card. Raises SetupError if one is invalid or the default is missing."""
    cards = sorted(models_dir.glob(f"*/{CARD}"))
    models = {model.name: model for model in (load_model(card.parent) for card in cards)}
    if default not in models:
        known = ", ".join(models) or "none"
        raise SetupError(
            f"default model {default!r} is not in {models_dir} (found: {known}); "
            "set DARKROOM_MODELS_DIR or DARKROOM_DEFAULT_MODEL"
        )
    return ModelRegistry(models, default)


def load_model(folder: Path) -> Model:
    """Read one model's card. Raises SetupError if it is missing or invalid."""
    card = folder / CARD
    try:
        return Model(folder=folder, **tomllib.loads(card.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise SetupError(f"{card} is not a valid model card: {error}") from error


def weights_revision(folder: Path) -> str:
    """Return 12 hex digits of the SHA-256 over the files that determine a model's images."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".safetensors", ".json", ".txt"}:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
