"""How far the pictures of one engine are from those of another, for the same prompts and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from darkroom.errors import DarkroomError
from darkroom.generation.model_registry import Catalogue
from darkroom.generation.params import GenerationParams, JobInput
from workers.generation.generator import Finished, ImageGenerator, Picture

Pixels = npt.NDArray[np.uint8]

#: One of each kind that engines have got wrong: plain, long, guided hard, unguided, small, wide.
GOLDEN: Final[tuple[dict[str, object], ...]] = (
    {"prompt": "a red apple", "seed": 1},
    {"prompt": "a lighthouse on a cliff at night, stars above it, waves below", "seed": 2},
    {"prompt": "two dogs in the snow", "seed": 3, "guidance_scale": 7.5},
    {"prompt": "a blue bicycle on a yellow background", "seed": 4, "guidance_scale": 1.0},
    {"prompt": "an owl", "seed": 5, "num_inference_steps": 4},
    {"prompt": "a castle", "seed": 6, "negative_prompt": "clouds", "num_inference_steps": 20},
)


class GoldenNotDrawn(DarkroomError):
    """A golden prompt could not be drawn at all."""


@dataclass(frozen=True)
class Drift:
    """One golden prompt, and how alike both pictures of it are."""

    prompt: str
    psnr_db: float  #: infinite where they are equal


def golden(
    catalogue: Catalogue, model: str, jobs: Sequence[Mapping[str, object]] = GOLDEN
) -> list[GenerationParams]:
    """The jobs with the model's defaults. Raises InvalidInput, and pydantic's ValidationError."""
    asked = (JobInput.model_validate({**fields, "model": model}) for fields in jobs)
    return [catalogue.resolve(job) for job in asked]


def drift(
    prompts: Sequence[GenerationParams], before: ImageGenerator, after: ImageGenerator
) -> list[Drift]:
    """Draw all with both. Raises GoldenNotDrawn, and what a generator raises."""
    pairs = zip(prompts, _drawn(prompts, before), _drawn(prompts, after), strict=True)
    return [Drift(params.prompt, psnr_db(one, other)) for params, one, other in pairs]


def psnr_db(one: Pixels, other: Pixels) -> float:
    """Peak signal to noise of 8-bit pictures; 0 where their sizes differ."""
    if one.shape != other.shape:
        return 0.0
    error = float(np.square(one.astype(np.float64) - other).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _drawn(prompts: Sequence[GenerationParams], generator: ImageGenerator) -> Iterator[Pixels]:
    """One call for each prompt: what is compared is the engine, not its company."""
    for params in prompts:
        call = generator.begin([params])
        for happening in call.happenings(timeout_s=600, silence_s=120):
            match happening:
                case Finished(_, Picture(pixels)):
                    yield pixels
                case Finished(_, mishap):
                    raise GoldenNotDrawn(f"{params.prompt!r} was not drawn: {mishap}")
