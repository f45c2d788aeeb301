"""Continuous batching: microbatches that join a running one, against waiting for its end.

`python -m benchmarks.continuous_batching [--rounds 3] [--size 128]`: one `TritonWorker` on a real
Triton; each round runs both ways, in turn. First, eight jobs run, and after three of their steps
another one arrives: when are its first step and its image done, and what does that cost the eight?
Then a queue of mixed microbatches, two in flight as a worker keeps them: images per second, and the
seconds from an image's submission. Medians are printed, in seconds unless stated.
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
_ARRIVES_AFTER = 3  #: steps of the running microbatch
_IN_FLIGHT = 2  #: microbatches at once, the default of DARKROOM_WORKER_CONCURRENCY


@dataclass
class MicrobatchTimes:
    """Times of one microbatch, in seconds from its submission."""

    first_step: float = 0.0
    images: list[float] = field(default_factory=list)


class RunningMicrobatch:
    """Submitted microbatch, and its times so far."""

    def __init__(
        self, worker: TritonWorker, jobs: Sequence[GenerationParams], *, waits: bool
    ) -> None:
        self.times = MicrobatchTimes()
        self.steps = 0
        self._started = time.monotonic()
        self._events = worker.generate(uuid.uuid4().hex, jobs, alone=waits)
        self._count = len(jobs)

    async def finished(self) -> MicrobatchTimes:
        """Return its times once all images are generated."""
        async with aclosing(self._events) as events:
            async for event in events:
                elapsed = time.monotonic() - self._started
                if isinstance(event, Progress):
                    self.times.first_step = self.times.first_step or elapsed
                    self.steps = max(step for step, _ in event.steps.values())
                elif isinstance(event, Finished):
                    assert isinstance(event.result, Image), event
                    self.times.images.append(elapsed)
        assert len(self.times.images) == self._count
        return self.times


def job(seed: int, size: int, steps: int = _STEPS, guidance: float = 4.0) -> GenerationParams:
    """Return the parameters of one image."""
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


async def late_job(worker: TritonWorker, size: int, *, waits: bool) -> dict[str, float]:
    """Measure one job that arrives while eight run."""
    running = RunningMicrobatch(worker, [job(seed, size) for seed in range(8)], waits=waits)
    task = asyncio.create_task(running.finished())
    while running.steps < _ARRIVES_AFTER:  # noqa: ASYNC110  # it offers no event to wait for
        await asyncio.sleep(0.005)
    late = await RunningMicrobatch(worker, [job(99, size)], waits=waits).finished()
    others = await task
    return {
        "late job: first step after": late.first_step,
        "late job: image after": late.images[0],
        "the other 8: last image after": others.images[-1],
    }


async def queue(worker: TritonWorker, size: int, seed: int, *, waits: bool) -> dict[str, float]:
    """Measure four microbatches of mixed rows."""
    rng = random.Random(seed)
    waiting = [
        [
            job(seed_, size, steps=rng.choice([4, 8, 12, 16]), guidance=rng.choice([1, 4, 4, 6]))
            for seed_ in range(8)
        ]
        for _ in range(4)
    ]
    finished: list[MicrobatchTimes] = []

    async def run_queue() -> None:
        while waiting:
            finished.append(await RunningMicrobatch(worker, waiting.pop(0), waits=waits).finished())

    started, cpu = time.monotonic(), cpu_seconds()
    await asyncio.gather(*(run_queue() for _ in range(_IN_FLIGHT)))
    elapsed, cpu = time.monotonic() - started, cpu_seconds() - cpu
    images = [second for times in finished for second in times.images]
    return {
        "queue of 32: images per second": len(images) / elapsed,
        "queue of 32: CPU seconds per image": cpu / len(images),
        "queue of 32: an image after, mean": statistics.fmean(images),
        "queue of 32: an image after, p95": statistics.quantiles(images, n=20)[-1],
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of Triton and its models: the same on a busy machine."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


async def measure(rounds: int, size: int) -> dict[bool, list[dict[str, float]]]:
    """Measure all rounds, by whether microbatches wait for each other."""
    settings = Settings()
    model = load_registry(settings.models_dir, settings.default_model).models["darkroom-demo"]
    worker = TritonWorker(worker_options(settings, model))
    await worker.start()
    try:
        await RunningMicrobatch(
            worker, [job(seed, size, steps=1) for seed in range(8)], waits=True
        ).finished()
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for number in range(rounds):
            for waits in (True, False) if number % 2 else (False, True):
                late = await late_job(worker, size, waits=waits)
                found[waits].append(late | await queue(worker, size, number, waits=waits))
                way = "waiting" if waits else "joining"
                print(f"round {number + 1}, {way}: {found[waits][-1]}", file=sys.stderr)
    finally:
        await worker.stop()
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument(
        "--size", type=int, default=128, help="width and height of the images (default 128)"
    )
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.rounds, arguments.size))
    table = Table("", "waiting", "joining", "each round, waiting", "each round, joining")
    for name in found[True][0]:
        columns = [[one[name] for one in found[waits]] for waits in (True, False)]
        medians = [f"{statistics.median(column):.2f}" for column in columns]
        every = [" ".join(f"{value:.2f}" for value in column) for column in columns]
        table.add_row(name, *medians, *every)
    Console().print(table)


if __name__ == "__main__":
    main()
