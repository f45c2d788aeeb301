"""`python -m workers replace MODEL --folder FOLDER`: a new engine for a model.

Blue and green: the new engine starts beside the one that draws, both draw the golden prompts, and
only if the pictures agree do the jobs go to the new one. The old one ends what it has begun.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ray import serve

from darkroom.errors import DarkroomError, InvalidInput, SetupError
from darkroom.generation.model_registry import Model, load_model, load_registry
from darkroom.generation.params import GenerationParams
from darkroom.settings import Settings, load_settings
from workers.deploy.golden_images import GOLDEN, ImageDifference, difference, golden_jobs
from workers.deploy.serve import deploy
from workers.generation.ray_generator import RayGenerator
from workers.ray_cluster import routing
from workers.ray_cluster.connection import connect_to_ray

LEAST_PSNR_DB: Final = 35.0  #: fp16 against fp32 of one model is 40 and more; other weights are 10

logger = logging.getLogger(__name__)


def replace(
    settings: Settings,
    model: Model,
    green_model: Model,
    prompts: Sequence[GenerationParams],
    *,
    least_psnr_db: float,
) -> bool:
    """Whether the new engine draws now; if not, it is gone again and the old one goes on."""
    blue = routing.application_of(model.name)
    green = _other_name(model.name, blue)
    agrees = False
    try:
        deploy(settings, green_model, application=green)
        found = difference(
            prompts,
            RayGenerator(settings.ray_address, application=lambda _: blue),
            RayGenerator(settings.ray_address, application=lambda _: green),
        )
        _report(found, least_psnr_db)
        agrees = min(one.psnr_db for one in found) >= least_psnr_db
    finally:
        if not agrees:
            serve.delete(green)
    if agrees:
        routing.move(model.name, green)
        time.sleep(2 * routing.FRESH_S)  # until every worker has read it
        serve.delete(blue)  # once it has drawn what it has begun
        logger.info("%s is drawn by %s, from %s", model.name, green, green_model.folder)
    return agrees


def _other_name(model: str, blue: str) -> str:
    return model if blue != model else f"{model}~green"


def _report(found: Sequence[ImageDifference], least_psnr_db: float) -> None:
    for one in found:
        verdict = "agrees" if one.psnr_db >= least_psnr_db else "DRIFTED"
        print(f"{one.psnr_db:6.1f} dB  {verdict:<8} {one.prompt}")


def _jobs(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]


def main(arguments: Sequence[str]) -> int:
    """0: the new engine draws. 1: it drifted, or could not draw; the old one goes on. 2: usage."""
    parser = argparse.ArgumentParser(prog="python -m workers replace", description=__doc__)
    parser.add_argument("model", help="its name in the registry")
    parser.add_argument("--folder", type=Path, required=True, help="the model folder to draw from")
    parser.add_argument(
        "--least-psnr", type=float, default=LEAST_PSNR_DB, metavar="DB",
        help="of the golden pictures, each (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--golden", type=Path, metavar="FILE",
        help="jobs to compare by, as JSON lines (default: six that engines have got wrong)",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = load_settings()
    try:
        registry = load_registry(settings.models_dir, settings.default_model)
        model = registry.find(asked.model)
        if model is None:
            parser.error(f"no model {asked.model!r} in {settings.models_dir}")
        green_model = load_model(asked.folder.resolve())
        prompts = golden_jobs(registry, model.name, _jobs(asked.golden) if asked.golden else GOLDEN)
    except (SetupError, InvalidInput, ValueError, OSError) as error:
        parser.error(str(error))
    connect_to_ray(settings.ray_address)
    try:
        agrees = replace(settings, model, green_model, prompts, least_psnr_db=asked.least_psnr)
    except (DarkroomError, RuntimeError) as error:  # Serve says RuntimeError of what does not start
        print(f"error: {asked.folder} could not draw: {error}", file=sys.stderr)
        agrees = False
    if not agrees:
        print(f"{model.name} goes on being drawn by what drew it before", file=sys.stderr)
    return 0 if agrees else 1
