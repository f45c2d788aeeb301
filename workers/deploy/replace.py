"""`python -m workers replace MODEL --folder FOLDER`: a new engine for a model.

Blue-green deployment: the new engine starts beside the old one, both generate the golden images,
and jobs go to the new one only if these agree. The old one finishes its microbatches.
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

LEAST_PSNR_DB: Final = 35.0  #: fp16 and fp32 of one model agree to 40 or more; other weights to 10

logger = logging.getLogger(__name__)


def replace(
    settings: Settings,
    model: Model,
    green_model: Model,
    prompts: Sequence[GenerationParams],
    *,
    least_psnr_db: float,
) -> bool:
    """Return whether the new engine is in use; if not, it was removed and the old one stays."""
    blue = routing.application_for(model.name)
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
        routing.route(model.name, green)
        time.sleep(2 * routing.FRESH_S)  # until every worker has read it
        serve.delete(blue)  # after it has finished its microbatches
        logger.info("model %s now runs as %s, from %s", model.name, green, green_model.folder)
    return agrees


def _other_name(model: str, blue: str) -> str:
    return model if blue != model else f"{model}~green"


def _report(found: Sequence[ImageDifference], least_psnr_db: float) -> None:
    for one in found:
        result = "agrees" if one.psnr_db >= least_psnr_db else "DIFFERS"
        print(f"{one.psnr_db:6.1f} dB  {result:<8} {one.prompt}")


def _jobs(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the new engine is in use, 1 if it differs or fails and the old one stays."""
    parser = argparse.ArgumentParser(prog="python -m workers replace", description=__doc__)
    parser.add_argument("model", help="name of the model in the registry")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of the new engine's model"
    )
    parser.add_argument(
        "--least-psnr", type=float, default=LEAST_PSNR_DB, metavar="DB",
        help="least agreement of each golden image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--golden", type=Path, metavar="FILE",
        help="jobs to compare, as JSON lines (default: six that engines got wrong)",
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
    except (DarkroomError, RuntimeError) as error:  # Serve's, if a replica does not start
        print(f"error: the engine in {asked.folder} failed: {error}", file=sys.stderr)
        agrees = False
    if not agrees:
        print(f"{model.name} was not replaced: its old engine stays", file=sys.stderr)
    return 0 if agrees else 1
