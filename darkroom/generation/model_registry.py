"""What can be drawn with: the models, their limits and their defaults.

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
    random_seed,
    revision_in,
)

CARD: Final = "darkroom.toml"


class IntLimits(BaseModel):
    """An integer parameter: its default and the values allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: int = Field(description="Value of a job that names none.")
    minimum: int = Field(description="Smallest value.")
    maximum: int = Field(description="Largest value.")
    multiple_of: int = Field(1, description="Values are multiples of it.")


class FloatLimits(BaseModel):
    """A real parameter: its default and the values allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: float = Field(description="Value of a job that names none.")
    minimum: float = Field(description="Smallest value.")
    maximum: float = Field(description="Largest value.")


class Model(BaseModel):
    """Weights that draw, and what may be asked of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")
    revision: str = Field(pattern=r"^[0-9a-f]{12}$")  #: of the weights, see `weights_revision`
    description: str
    license: str
    scheduler: Literal["ddim", "euler", "dpmsolver++"]
    precision: Literal["float32", "float16", "bfloat16"]
    max_microbatch: int = Field(ge=1)  #: jobs of one model call
    #: the widest UNet batch, guided jobs take two rows; None leaves it to the model's config.pbtxt
    max_unet_rows: int | None = Field(default=None, ge=2)
    revision_of: str | None = None  #: the model that this is an older revision of
    on_demand: bool = False  #: no replica until there is work for it, and none a while after
    width: IntLimits
    height: IntLimits
    num_inference_steps: IntLimits
    guidance_scale: FloatLimits
    folder: Path = Field(exclude=True)

    def microbatch_key(self, params: GenerationParams) -> str:
        """See `darkroom.params.microbatch_key`."""
        return microbatch_key(
            model=self.name,
            revision=self.revision,
            width=params.width,
            height=params.height,
            precision=self.precision,
        )


@dataclass(frozen=True)
class ModelRegistry:
    """The models of this installation by name, and which one a job gets that names none."""

    models: Mapping[str, Model]
    default: str

    def find(self, name: str) -> Model | None:
        """By its name, or as NAME@REVISION: that revision of it, if it was kept."""
        name, _, revision = name.partition("@")
        return self._kept(name, revision) if revision else self.models.get(name)

    def model_for(self, name: str, key: str) -> Model:
        """The model to draw a job of this model and microbatch key with.

        Of the revision that the job was accepted for, if it is still there.
        """
        return self._kept(name, revision_in(key)) or self.models[name]

    def model_for_key(self, key: str) -> Model | None:
        """The model that draws jobs of this microbatch key; None if it is not there any more."""
        name = key.partition("@")[0]
        return self.model_for(name, key) if name in self.models else None

    def _kept(self, name: str, revision: str) -> Model | None:
        for model in self.models.values():
            if model.revision == revision and name in {model.name, model.revision_of}:
                return model
        return None

    def resolve(self, job: JobInput) -> GenerationParams:
        """Fill in the model's defaults. Raises InvalidInput naming every field out of bounds."""
        model = self.find(job.model or self.default)
        if model is None:
            known = ", ".join(sorted(self.models))
            raise InvalidInput(
                [InputProblem(("model",), "unknown_model", f"no such model; known: {known}")]
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
    """Whether nothing is out of bounds; asked of each row of large files, so without a loop."""
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
    """Read every model's card. Raises SetupError when one is wrong or the default is missing."""
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
    """Read one model's card. Raises SetupError when it is missing or wrong."""
    card = folder / CARD
    try:
        return Model(folder=folder, **tomllib.loads(card.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise SetupError(f"{card} is not a valid model card: {error}") from error


def weights_revision(folder: Path) -> str:
    """The first 12 hex digits of a SHA-256 over all that decides a model's pictures."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".safetensors", ".json", ".txt"}:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
