"""Seconds an image takes on two CPU threads, for models of the registry, at their defaults.

`python -m benchmarks.demo_model_speed darkroom-demo-v1 darkroom-demo`: rounds alternate between the
models, so that what else the machine does meets all of them; the medians are printed. Seconds of
the CPU are those of both threads together: up to twice the seconds by the clock where nothing else
runs, and the same on a busy machine.
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


Seconds = tuple[float, float]  #: by the clock, and of the CPU


def seconds_a_picture(runner: TorchRunner, model: Model, company: int) -> Seconds:
    """Of one call with so many rows."""
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
        for number, prompt in enumerate(_PROMPTS[:company])
    ]
    begun = time.perf_counter(), time.process_time()
    drawn = [
        event
        for event in generate(runner, rows, max_unet_rows=2 * company)
        if isinstance(event, Image)
    ]
    assert len(drawn) == company
    clock, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    return clock / company, cpu / company


def main() -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names in the registry")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    settings = Settings()
    registry = load_registry(settings.models_dir, settings.default_model)
    models = [registry.models[name] for name in asked.models]
    runners = [TorchRunner.load(m.folder, dtype=m.precision, threads=asked.threads) for m in models]
    table = Table("model", "company", "s a picture (median)", "CPU s (median)", "all rounds")
    for company in (1, len(_PROMPTS)):
        for model, taken in zip(
            models, rounds(runners, models, company, asked.rounds), strict=True
        ):
            every = " ".join(f"{clock:.2f}/{cpu:.2f}" for clock, cpu in taken)
            clock, cpu = (statistics.median(one[at] for one in taken) for at in (0, 1))
            table.add_row(model.name, str(company), f"{clock:.2f}", f"{cpu:.2f}", every)
    Console().print(table)


def rounds(
    runners: Sequence[TorchRunner], models: Sequence[Model], company: int, count: int
) -> list[list[Seconds]]:
    """For each model its rounds; one more before them warms up."""
    taken: list[list[Seconds]] = [[] for _ in models]
    for number in range(count + 1):
        for runner, model, mine in zip(runners, models, taken, strict=True):
            seconds = seconds_a_picture(runner, model, company)
            if number:
                mine.append(seconds)
    return taken


if __name__ == "__main__":
    main()
