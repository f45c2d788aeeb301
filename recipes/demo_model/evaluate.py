"""Scores of a model: how often its images show what the prompt asks, at several step counts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.demo_model import measures, schedule
from recipes.demo_model.canvas import Canvas, plan_of
from recipes.demo_model.cast import Cast
from recipes.demo_model.composer import compose
from recipes.demo_model.composition import Composition
from recipes.demo_model.measures import References
from recipes.demo_model.networks import LATENT_SHAPE, Networks, load
from recipes.demo_model.pictures import decode
from recipes.demo_model.prompt_sets import HELD_OUT, Asked, composed
from recipes.demo_model.scenes import SCENES, VARIANTS
from recipes.demo_model.tokens import Encoder

GUIDANCE: Final = 4.0
_TOGETHER: Final = 64
_TOGETHER_ON_A_CPU: Final = 8  # more is slower there, and 64 take gigabytes

Numbered = tuple[int, Asked]  #: a prompt and its seed
Scores = dict[str, float]  #: by score, and "mean" of those; shares of 1


def references_from(cast: Cast, canvas: Canvas, *, scenes_seen: int = 3000) -> References:
    """One that has seen composed images only, and none of a model."""
    scenes, places = [], []
    for one in _scene_compositions(cast):
        scenes.append(plan_of(one))
        places.append(list(SCENES)[one.backdrop.scene // VARIANTS])
        if len(scenes) == scenes_seen:
            break
    pictures = [
        picture
        for start in range(0, len(scenes), _TOGETHER)
        for picture in to_bytes(canvas.draw(scenes[start : start + _TOGETHER]))
    ]
    rasters = cast.rasters
    return measures.learn(pictures, places, rasters.sprites, [f.thing for f in rasters.facts])


def _scene_compositions(cast: Cast) -> Iterator[Composition]:
    number = 0
    while True:
        one = compose(cast, f"judge-{number}")
        number += 1
        if one.backdrop.kind == "scene" and one.finish == "none":
            yield one


def ceiling(
    cast: Cast,
    canvas: Canvas,
    references: References | None,
    prompts: Sequence[Asked],
    seeds: Sequence[int],
) -> Scores:
    """Score images that are right by construction: the accuracy of the measures themselves."""
    return score(_composed_pictures(cast, canvas, prompts, seeds), prompts, references)


def measurable(cast: Cast, canvas: Canvas, numbered: Sequence[Numbered]) -> list[Numbered]:
    """Without the held-out prompts that their measure fails even where the image is right.

    Most of a thing of several hues may keep another color than the one it was given. Such a prompt
    says nothing of a model, or what is worse: it is right where the model drew a blob.
    """
    prompts = [one for _, one in numbered]
    pictures = _composed_pictures(cast, canvas, prompts, [number for number, _ in numbered])
    return [
        (number, one)
        for (number, one), picture in zip(numbered, pictures, strict=True)
        if one.score != HELD_OUT or measures.is_right(picture, one, None)
    ]


def _composed_pictures(
    cast: Cast, canvas: Canvas, prompts: Sequence[Asked], seeds: Sequence[int]
) -> list[measures.PixelArray]:
    numbered = zip(prompts, seeds, strict=True)
    plans = [plan_of(composed(cast, one, number)) for one, number in numbered]
    return [
        picture
        for start in range(0, len(plans), _TOGETHER)
        for picture in to_bytes(canvas.draw(plans[start : start + _TOGETHER]))
    ]


def score(
    pictures: Sequence[measures.PixelArray], prompts: Sequence[Asked], references: References | None
) -> Scores:
    """Return the share of right images for each score, and their mean."""
    marks: dict[str, list[bool]] = {}
    for picture, one in zip(pictures, prompts, strict=True):
        marks.setdefault(one.score, []).append(measures.is_right(picture, one, references))
    scores = {name: float(np.mean(right)) for name, right in marks.items()}
    return scores | {"mean": float(np.mean(list(scores.values())))}


def draw(
    folder: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float = GUIDANCE,
    device: torch.device,
    together: int | None = None,
) -> list[measures.PixelArray]:
    """Images [256, 256, 3] by the model in a folder, in float32, with DDIM."""
    networks = load(folder)
    networks.vae.to(device)
    networks.denoiser.to(device)
    return draw_with(
        networks, Encoder(folder / "tokenizer"), prompts, seeds,
        steps=steps, guidance=guidance, device=device, together=together,
    )  # fmt: skip


@torch.no_grad()
def draw_with(
    networks: Networks,
    encoder: Encoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float = GUIDANCE,
    device: torch.device,
    together: int | None = None,
) -> list[measures.PixelArray]:
    """As `draw`, by networks that are on the device."""
    pictures = []
    together = together or (_TOGETHER if device.type == "cuda" else _TOGETHER_ON_A_CPU)
    empty = torch.from_numpy(encoder.encode([""])).long().to(device)
    for start in range(0, len(prompts), together):
        some = slice(start, start + together)
        tokens = torch.from_numpy(encoder.encode(prompts[some])).long().to(device)
        noise = schedule.seeded_noise(list(seeds[some]), LATENT_SHAPE).to(device)
        latents = schedule.ddim(
            networks.denoiser, noise, tokens, empty, steps=steps, guidance=guidance
        )
        pictures += to_bytes(decode(networks.vae, latents))
    return pictures


def to_bytes(pictures: torch.Tensor) -> list[NDArray[np.uint8]]:
    """[256, 256, 3] each, from [n, 3, 256, 256] between -1 and 1."""
    shades = ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
    return list(shades.permute(0, 2, 3, 1).cpu().numpy())


def table(rows: Sequence[tuple[str, str, Scores]]) -> str:
    """Markdown, with (model, steps, scores) in per cent."""
    names = list(rows[0][2])
    lines = ["| model | steps | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for model, steps, scores in rows:
        cells = " | ".join(f"{100 * scores[name]:.0f}" for name in names)
        lines.append(f"| {model} | {steps} | {cells} |")
    return "\n".join(lines)
