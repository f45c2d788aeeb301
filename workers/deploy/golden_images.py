"""Golden images: how much two engines differ for the same prompts and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from darkroom.errors import DarkroomError
from darkroom.generation.model_registry import ModelRegistry
from darkroom.generation.params import GenerationParams, JobInput
from workers.generation.generator import Finished, Image, ImageGenerator

Pixels = npt.NDArray[np.uint8]

#: One of each kind that engines got wrong: plain, long, high guidance, none, few steps, many.
GOLDEN: Final[tuple[dict[str, object], ...]] = (
    {"prompt": "a red apple", "seed": 1},
    {"prompt": "a lighthouse on a cliff at night, stars above it, waves below", "seed": 2},
    {"prompt": "two dogs in the snow", "seed": 3, "guidance_scale": 7.5},
    {"prompt": "a blue bicycle on a yellow background", "seed": 4, "guidance_scale": 1.0},
    {"prompt": "an owl", "seed": 5, "num_inference_steps": 4},
    {"prompt": "a castle", "seed": 6, "negative_prompt": "clouds", "num_inference_steps": 20},
)


class GoldenImagesFailed(DarkroomError):
    """An engine generated no image for a golden prompt."""


@dataclass(frozen=True)
class ImageDifference:
    """Similarity of both engines' images of one golden prompt."""

    prompt: str
    psnr_db: float  #: infinite if they are equal


def golden_jobs(
    registry: ModelRegistry, model: str, jobs: Sequence[Mapping[str, object]] = GOLDEN
) -> list[GenerationParams]:
    """Return the jobs with the model's defaults. Raises InvalidInput, and pydantic's errors."""
    inputs = (JobInput.model_validate({**fields, "model": model}) for fields in jobs)
    return [registry.resolve(job) for job in inputs]


def difference(
    prompts: Sequence[GenerationParams], before: ImageGenerator, after: ImageGenerator
) -> list[ImageDifference]:
    """Generate all prompts with both. Raises GoldenImagesFailed and the errors of a generator."""
    pairs = zip(prompts, _generate(prompts, before), _generate(prompts, after), strict=True)
    return [ImageDifference(params.prompt, psnr_db(one, other)) for params, one, other in pairs]


def psnr_db(one: Pixels, other: Pixels) -> float:
    """Return the peak signal-to-noise ratio of 8-bit images; 0 if their sizes differ."""
    if one.shape != other.shape:
        return 0.0
    error = float(np.square(one.astype(np.float64) - other).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _generate(prompts: Sequence[GenerationParams], generator: ImageGenerator) -> Iterator[Pixels]:
    """Generate each prompt in a call of its own, so that only the engines are compared."""
    for params in prompts:
        call = generator.start([params])
        for event in call.events(timeout_s=600, step_timeout_s=120):
            match event:
                case Finished(_, Image(pixels)):
                    yield pixels
                case Finished(_, failure):
                    raise GoldenImagesFailed(f"no image of {params.prompt!r}: {failure}")
