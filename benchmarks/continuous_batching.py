"""What it brings that microbatches join a running one, against waiting until it is drawn.

`python -m benchmarks.continuous_batching [--rounds 3] [--size 128]`: one painter on a real Triton;
each round both ways, in turns. First eight jobs are drawn, and after three of their steps another
one comes: when is its first step done, when its picture, and what does that cost the eight? Then a
queue of mixed microbatches, two of them handed over at a time, as a worker does: images per second,
and how long a picture takes from the hand-over. Medians are printed, in seconds where not said.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.table import Table

from darkroom.generation.model_registry import load_registry
from darkroom.generation.params import GenerationParams
from darkroom.settings import Settings
from workers.deploy.serve_config import worker_options
from workers.generation.generator import Finished, Image, Progress
from workers.replica.triton_worker import TritonWorker

_STEPS = 12
_COMES_AFTER = 3  #: steps of the microbatch that is drawn
_HANDED_OVER = 2  #: microbatches at a time, as DARKROOM_WORKER_CONCURRENCY says


@dataclass
class Course:
    """One microbatch, in seconds from its hand-over."""

    first_step: float = 0.0
    pictures: list[float] = field(default_factory=list)


class Drawing:
    """A microbatch that is handed over, and its course so far."""

    def __init__(
        self, painter: TritonWorker, jobs: Sequence[GenerationParams], *, waits: bool
    ) -> None:
        self.course = Course()
        self.steps = 0
        self._begun = time.monotonic()
        self._happenings = painter.generate(uuid.uuid4().hex, jobs, alone=waits)
        self._count = len(jobs)

    async def ended(self) -> Course:
        """Its course, when all is drawn."""
        async with aclosing(self._happenings) as happenings:
            async for happening in happenings:
                since = time.monotonic() - self._begun
                if isinstance(happening, Progress):
                    self.course.first_step = self.course.first_step or since
                    self.steps = max(step for step, _ in happening.steps.values())
                elif isinstance(happening, Finished):
                    assert isinstance(happening.result, Image), happening
                    self.course.pictures.append(since)
        assert len(self.course.pictures) == self._count
        return self.course


def job(seed: int, size: int, steps: int = _STEPS, guidance: float = 4.0) -> GenerationParams:
    """One picture of the model's usual kind."""
    return GenerationParams(
        prompt=("a red apple", "a cat on the beach", "three red hearts")[seed % 3],
        negative_prompt="",
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=size,
        height=size,
        model="darkroom-demo",
        output_format="png",
    )


async def late_job(painter: TritonWorker, size: int, *, waits: bool) -> dict[str, float]:
    """Seconds of one that comes while eight are drawn."""
    company = Drawing(painter, [job(seed, size) for seed in range(8)], waits=waits)
    drawing = asyncio.create_task(company.ended())
    while company.steps < _COMES_AFTER:  # noqa: ASYNC110  # it is told no other way
        await asyncio.sleep(0.005)
    late = await Drawing(painter, [job(99, size)], waits=waits).ended()
    others = await drawing
    return {
        "late job: its first step after": late.first_step,
        "late job: its picture after": late.pictures[0],
        "its company of 8: last picture after": others.pictures[-1],
    }


async def queue(painter: TritonWorker, size: int, seed: int, *, waits: bool) -> dict[str, float]:
    """Of four microbatches of mixed rows."""
    dice = random.Random(seed)
    waiting = [
        [
            job(at, size, steps=dice.choice([4, 8, 12, 16]), guidance=dice.choice([1, 4, 4, 6]))
            for at in range(8)
        ]
        for _ in range(4)
    ]
    courses: list[Course] = []

    async def pump() -> None:
        while waiting:
            courses.append(await Drawing(painter, waiting.pop(0), waits=waits).ended())

    begun, cpu = time.monotonic(), cpu_seconds()
    await asyncio.gather(*(pump() for _ in range(_HANDED_OVER)))
    lasted, cpu = time.monotonic() - begun, cpu_seconds() - cpu
    pictures = [second for course in courses for second in course.pictures]
    return {
        "queue of 32: images per second": len(pictures) / lasted,
        "queue of 32: CPU seconds a picture": cpu / len(pictures),
        "queue of 32: a picture after, mean": statistics.fmean(pictures),
        "queue of 32: a picture after, p95": statistics.quantiles(pictures, n=20)[-1],
    }


def cpu_seconds() -> float:
    """What Triton and its models have used so far: the same on a busy machine."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


async def measure(rounds: int, size: int) -> dict[bool, list[dict[str, float]]]:
    """All figures of each round, by whether microbatches wait for each other."""
    settings = Settings()
    model = load_registry(settings.models_dir, settings.default_model).models["darkroom-demo"]
    painter = TritonWorker(worker_options(settings, model))
    await painter.start()
    try:
        await Drawing(painter, [job(seed, size, steps=1) for seed in range(8)], waits=True).ended()
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for number in range(rounds):
            for waits in (True, False) if number % 2 else (False, True):
                late = await late_job(painter, size, waits=waits)
                found[waits].append(late | await queue(painter, size, number, waits=waits))
                way = "waiting" if waits else "joining"
                print(f"round {number + 1}, {way}: {found[waits][-1]}", file=sys.stderr)
    finally:
        await painter.stop()
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="of the pictures, each way")
    asked = parser.parse_args()
    found = asyncio.run(measure(asked.rounds, asked.size))
    table = Table("", "waiting", "joining", "each round, waiting", "each round, joining")
    for name in found[True][0]:
        columns = [[one[name] for one in found[waits]] for waits in (True, False)]
        medians = [f"{statistics.median(column):.2f}" for column in columns]
        every = [" ".join(f"{value:.2f}" for value in column) for column in columns]
        table.add_row(name, *medians, *every)
    Console().print(table)


if __name__ == "__main__":
    main()
