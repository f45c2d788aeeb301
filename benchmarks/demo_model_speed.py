"""Seconds per image on two CPU threads, for models of the registry at their defaults.

`python -m benchmarks.demo_model_speed darkroom-demo-v1 darkroom-demo`: rounds alternate between the
models, so that other load on the machine affects all of them; the medians are printed. CPU seconds
are those of both threads together: up to twice the wall-clock seconds on an idle machine, and the
same on a busy one.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from darkroom.generation.model_registry import Model, load_registry
from darkroom.settings import Settings
from engine.generate import generate
from engine.requests import Image, Row
from engine.torch_runner import TorchRunner

_PROMPTS = (
    "a red apple", "a cat on the beach", "two dogs", "a castle at night", "a blue rose",
    "an owl on a green background", "a rocket in space", "a robot to the left of a tree",
)  # fmt: skip


Seconds = tuple[float, float]  #: wall clock, CPU


def seconds_per_image(runner: TorchRunner, model: Model, batch: int) -> Seconds:
    """Time one call with `batch` rows."""
    rows = [
        Row(
            prompt=prompt,
            negative_prompt="",
            seed=number,
            num_inference_steps=model.num_inference_steps.default,
            guidance_scale=model.guidance_scale.default,
            width=model.width.default,
            height=model.height.default,
        )
        for number, prompt in enumerate(_PROMPTS[:batch])
    ]
    begun = time.perf_counter(), time.process_time()
    images = [
        event
        for event in generate(runner, rows, max_unet_rows=2 * batch)
        if isinstance(event, Image)
    ]
    assert len(images) == batch
    clock, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    return clock / batch, cpu / batch


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names in the registry")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings()
    registry = load_registry(settings.models_dir, settings.default_model)
    models = [registry.models[name] for name in arguments.models]
    runners = [
        TorchRunner.load(m.folder, dtype=m.precision, threads=arguments.threads) for m in models
    ]
    table = Table("model", "batch", "s per image (median)", "CPU s (median)", "all rounds")
    for batch in (1, len(_PROMPTS)):
        for model, measured in zip(
            models, rounds(runners, models, batch, arguments.rounds), strict=True
        ):
            every = " ".join(f"{clock:.2f}/{cpu:.2f}" for clock, cpu in measured)
            clock, cpu = (statistics.median(one[at] for one in measured) for at in (0, 1))
            table.add_row(model.name, str(batch), f"{clock:.2f}", f"{cpu:.2f}", every)
    Console().print(table)


def rounds(
    runners: Sequence[TorchRunner], models: Sequence[Model], batch: int, count: int
) -> list[list[Seconds]]:
    """Run the rounds of every model, after one to warm up."""
    measured: list[list[Seconds]] = [[] for _ in models]
    for number in range(count + 1):
        for runner, model, own in zip(runners, models, measured, strict=True):
            seconds = seconds_per_image(runner, model, batch)
            if number:
                own.append(seconds)
    return measured


if __name__ == "__main__":
    main()
