"""Images per second of the bare engine loop and of the whole system, in one run.

`python -m benchmarks.end_to_end [--jobs 200] [--rounds 3]` starts a stack of its own and
alternates: some microbatches drawn by the engine alone in this process, then the same jobs as a
batch through API, PostgreSQL, Celery, Ray Serve, Triton and storage. Ratios are of medians. Jobs
are mixed: three sizes' worth of keys, 4 to 16 steps, guidance with and without, so that fill is not
a gift.
"""

import argparse
import csv
import io
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sqlalchemy import func, select

from benchmarks._support import stack
from darkroom.client.http import Client
from darkroom.db.connection import open_sessions
from darkroom.db.tables import Dispatch, Job
from darkroom.generation.model_registry import load_registry
from darkroom.settings import Settings
from darkroom.status import BatchStatus
from engine.generate import generate
from engine.requests import Image, Row
from engine.torch_runner import TorchRunner

SIZES = ((256, 256), (192, 256), (128, 128))
SHARES = (8, 3, 1)  #: of the sizes among the jobs
MAX_UNET_ROWS = 32
_POLL_S = 0.25  # the system's own clients ask less often; each answer costs the drawing a few ms


@dataclass(frozen=True)
class Round:
    """Images per second each way, and how full the microbatches were."""

    engine: float
    system: float
    fill: float


def mixed_rows(count: int, seed: int) -> list[Row]:
    """Jobs as a client with several wishes would send them, in random order."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        width, height = dice.choices(SIZES, SHARES)[0]
        rows.append(
            Row(
                prompt=dice.choice(["a red apple", "a cat on the beach", "three red hearts"]),
                negative_prompt="",
                seed=number,
                num_inference_steps=dice.choice([4, 8, 12, 16]),
                guidance_scale=dice.choice([1.0, 4.0, 4.0, 6.0]),
                width=width,
                height=height,
            )
        )
    return rows


def microbatches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """The rows as the queue would group them at best: by size, full but for the last."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.width, row.height), []).append(row)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def engine_rate(runner: TorchRunner, rows: Sequence[Row], size: int, tick: Progress) -> float:
    """Images per second of the denoise loop alone: no encoding, no queue, no storage."""
    task = tick.add_task("engine alone", total=len(rows))
    began = time.monotonic()
    for group in microbatches(rows, size):
        events = generate(runner, group, max_unet_rows=MAX_UNET_ROWS)
        assert sum(isinstance(event, Image) for event in events) == len(group)
        tick.advance(task, len(group))
    return len(rows) / (time.monotonic() - began)


def system_rate(client: Client, rows: Sequence[Row], tick: Progress) -> tuple[float, str]:
    """Images per second from submission to the last job's end, and the batch's id."""
    with tempfile.NamedTemporaryFile("w", suffix=".csv", newline="") as file:
        file.write(_csv(rows))
        file.flush()
        task = tick.add_task("whole system", total=len(rows))
        began = time.monotonic()
        batch = client.submit_file(Path(file.name))
    while batch["status"] != BatchStatus.COMPLETED:
        time.sleep(_POLL_S)
        batch = client.batch(batch["id"])
        tick.update(task, completed=batch["counts"]["succeeded"])
    elapsed = time.monotonic() - began
    assert batch["counts"]["succeeded"] == len(rows), batch
    return len(rows) / elapsed, batch["id"]


def _csv(rows: Sequence[Row]) -> str:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["prompt", "seed", "steps", "cfg", "width", "height"])
    for row in rows:
        writer.writerow(
            [
                *(row.prompt, row.seed, row.num_inference_steps),
                *(row.guidance_scale, row.width, row.height),
            ]
        )
    return table.getvalue()


def fill_of(database_url: str, batch_id: str, size: int) -> float:
    """Jobs per seat of the dispatches that drew this batch."""
    sessions = open_sessions(database_url, pool_size=1)
    with sessions.begin() as session:
        drawn = select(Job.dispatch_id).where(Job.batch_id == batch_id).distinct()
        jobs, dispatches = session.execute(
            select(func.sum(Dispatch.size), func.count()).where(Dispatch.id.in_(drawn))
        ).one()
    return float(jobs) / (dispatches * size)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="of one round (default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    arguments = parser.parse_args()
    settings = Settings()
    model = load_registry(settings.models_dir, settings.default_model).models[
        settings.default_model
    ]
    size = model.max_microbatch
    runner = TorchRunner.load(model.folder, dtype=model.precision, threads=None)
    rounds = []
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder) / "data") as address:
        secret = Path(folder) / "data" / "secrets" / "darkroom_database_url"
        with Client(address) as client, Progress(console=Console(stderr=True)) as tick:
            warm = mixed_rows(8, seed=999)
            engine_rate(runner, warm, size, tick)
            system_rate(client, warm, tick)
            for number in range(arguments.rounds):
                rows = mixed_rows(arguments.jobs, seed=number)
                alone = engine_rate(runner, rows, size, tick)
                through, batch_id = system_rate(client, rows, tick)
                rounds.append(Round(alone, through, fill_of(secret.read_text(), batch_id, size)))
    print_table(rounds)


def print_table(rounds: Sequence[Round]) -> None:
    """One line a round, then the medians and their ratio."""
    table = Table("round", "engine, images/s", "system, images/s", "ratio", "fill")
    for number, one in enumerate(rounds, start=1):
        ratio = one.system / one.engine
        table.add_row(
            str(number), f"{one.engine:.3f}", f"{one.system:.3f}", f"{ratio:.3f}", f"{one.fill:.3f}"
        )
    engine = statistics.median(one.engine for one in rounds)
    system = statistics.median(one.system for one in rounds)
    fill = statistics.median(one.fill for one in rounds)
    ratio = statistics.median(one.system / one.engine for one in rounds)
    table.add_row("median", f"{engine:.3f}", f"{system:.3f}", f"{ratio:.3f}", f"{fill:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
