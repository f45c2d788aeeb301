"""Images per second on a GPU: diffusers as it comes, compiled, and this engine, in one run.

`python -m benchmarks.gpu_throughput [--batches 1,4,8,16,32] [--compile 1,4,8,16,32] [--no-xl]
[--profile] [--system 32]` draws with Stable Diffusion 1.5's architecture, 512 x 512, 20 guided
steps, in half precision, and then with XL's at 1024 x 1024. The weights are random: speed does not
depend on them. Each figure is the median of several drawings, text encoding and picture decoding
included. Shares are of what a large matrix product reaches here.

torch.compile takes a minute or two for each batch size. They compile beside each other, each in a
process of its own, and are then measured one after the other.

`--system` is the whole of it at last: a stack of its own draws jobs, from their submission to the
last one's end, in turns with the engine alone in this process.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks._gpu_models import (
    GUIDANCE,
    SCHEDULE,
    STEPS,
    Parts,
    save,
    stable_diffusion,
    stable_diffusion_xl,
    work,
)
from benchmarks._support import stack
from benchmarks.end_to_end import system_rate
from darkroom.client.http import Client
from engine.generate import generate
from engine.requests import Image, Row
from engine.schedulers import read_noise_schedule
from engine.text_encoding import TextEncoder, clip_encoders
from engine.torch_runner import TorchRunner

MAX_UNET_ROWS = 64
SYSTEM_MICROBATCHES = 8  #: of a round of the whole system
SYSTEM_ROUNDS = 3

Draw = Callable[[int], None]  #: so many images


def by_diffusers(parts: Parts) -> Draw:
    """The stock pipeline, as it comes."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    scheduler = DDIMScheduler(**SCHEDULE)
    if len(parts.tokenizers) == 1:
        pipeline = StableDiffusionPipeline(
            parts.vae,
            parts.text_encoders[0],
            parts.tokenizers[0],
            parts.unet,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            parts.vae, *parts.text_encoders, *parts.tokenizers, parts.unet, scheduler
        )
    pipeline.set_progress_bar_config(disable=True)

    def paint(count: int) -> None:
        pipeline(
            [row.prompt for row in rows(parts, count)],
            negative_prompt=[""] * count,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=parts.size,
            width=parts.size,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
            output_type="np",
        )

    return paint


def by_engine(runner: Any, parts: Parts) -> Draw:
    """This engine with one of its runners."""

    def paint(count: int) -> None:
        events = generate(runner, rows(parts, count), max_unet_rows=MAX_UNET_ROWS)
        assert sum(isinstance(event, Image) for event in events) == count

    return paint


def torch_runner(parts: Parts) -> TorchRunner:
    """The engine's own runner of these networks."""
    device = torch.device("cuda")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(SCHEDULE, file)
        file.flush()
        schedule = read_noise_schedule(Path(file.name))
    return TorchRunner(
        text_encoder=TextEncoder(parts.tokenizers, clip_encoders(parts.text_encoders), device),
        unet=parts.unet,
        vae=parts.vae,
        noise_schedule=schedule,
        device=device,
        dtype=torch.float16,
    )


def rows(parts: Parts, count: int) -> list[Row]:
    """So many jobs, each with a text of its own."""
    return [
        Row(f"picture {seed}", "", seed, STEPS, GUIDANCE, parts.size, parts.size)
        for seed in range(count)
    ]


def rate(paint: Draw, count: int) -> float:
    """Images per second: the median of several drawings, after one to warm up."""
    paint(count)
    took: list[float] = []
    while len(took) < 2 or sum(took) < 2 or (len(took) < 3 and sum(took) < 6):
        torch.cuda.synchronize()
        began = time.monotonic()
        paint(count)
        torch.cuda.synchronize()
        took.append(time.monotonic() - began)
    return count / statistics.median(took)


def compiled_rates(batches: Sequence[int]) -> dict[int, float]:
    """Of diffusers' pipeline with UNet and decoder compiled for each batch size."""
    context = multiprocessing.get_context("spawn")
    everybody, turn, results = context.Barrier(len(batches)), context.Lock(), context.Queue()
    workers = [
        context.Process(target=_compiled_rate, args=(batch, everybody, turn, results))
        for batch in batches
    ]
    for worker in workers:
        worker.start()
    rates = dict(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return rates


def _compiled_rate(batch: int, everybody: Any, turn: Any, results: Any) -> None:
    parts = stable_diffusion("cuda")
    parts.unet.to(memory_format=torch.channels_last)
    parts.vae.to(memory_format=torch.channels_last)
    parts.unet.forward = torch.compile(parts.unet.forward, dynamic=False)
    parts.vae.decode = torch.compile(parts.vae.decode, dynamic=False)
    paint = by_diffusers(parts)
    with torch.inference_mode():
        paint(batch)
        everybody.wait()
        with turn:
            results.put((batch, rate(paint, batch)))


@torch.inference_mode()
def whole_system(together: int) -> list[tuple[float, float]]:
    """Images per second of the engine alone and of the system, in turns: a pair each round."""
    parts = stable_diffusion("cuda")
    engine = by_engine(torch_runner(parts), parts)
    jobs = rows(parts, SYSTEM_MICROBATCHES * together)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as tick:
        model = Path(folder) / "models/random-weights"
        save(parts, model, together=together)
        os.environ |= {
            "DARKROOM_MODELS_DIR": str(model.parent),
            "DARKROOM_DEFAULT_MODEL": model.name,
            "DARKROOM_DEVICE": "cuda",
        }
        with stack(Path(folder) / "data") as address, Client(address) as client:
            system_rate(client, jobs[: 2 * together], tick)
            rounds = []
            for _ in range(SYSTEM_ROUNDS):
                alone = rate(engine, together)
                through, _ = system_rate(client, jobs, tick)
                rounds.append((alone, through))
                print(f"engine {alone:.2f}, system {through:.2f} images/s", file=sys.stderr)
    return rounds


def matrix_peak() -> float:
    """FLOP/s of a large product of halves."""
    side = 8192
    one, other = (torch.randn(side, side, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(3):
        one @ other
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        one @ other
    end.record()
    torch.cuda.synchronize()
    return float(20 * 2 * side**3 / (start.elapsed_time(end) / 1000))


def profile(paint: Draw, count: int) -> dict[str, float]:
    """Milliseconds an image on the GPU, by what its kernels do."""
    from torch.profiler import ProfilerActivity

    paint(count)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        paint(count)
        torch.cuda.synchronize()
    kinds = {
        "attention": ("sdpa", "flash", "fmha"),
        "GEGLU, fused": ("_geglu",),
        "convolutions": ("xmma", "fprop", "conv"),
        "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
        "norms, sums, upsampling": ("_kernel",),
    }
    spent = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in seen.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in kinds.items() if any(w in name for w in words)), "the rest")
        spent[kind] += event.self_device_time_total / 1000 / count
    return spent


class Report:
    """One table, filled as figures come."""

    def __init__(self, title: str, peak: float, flop: float) -> None:
        self._table = Table("batch", "by", "images/s", "TFLOP/s", "of the peak", title=title)
        self._peak, self._flop = peak, flop
        self.figures: list[dict[str, Any]] = []

    def add(self, batch: int, by: str, images_per_s: float) -> None:
        speed = images_per_s * self._flop
        self.figures.append({"batch": batch, "by": by, "images_per_s": images_per_s})
        share = f"{speed / self._peak:.0%}"
        self._table.add_row(str(batch), by, f"{images_per_s:.2f}", f"{speed / 1e12:.0f}", share)
        print(f"{by}, batch {batch}: {images_per_s:.2f} images/s", file=sys.stderr, flush=True)

    def show(self) -> None:
        Console(width=100).print(self._table)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", default="1,4,8,16,32", help="of SD 1.5, images at a time")
    parser.add_argument("--compile", default="1,4,8,16,32", help="batches for torch.compile; or ''")
    parser.add_argument("--no-diffusers", action="store_true", help="this engine alone")
    parser.add_argument("--no-xl", action="store_true", help="leave SDXL out")
    parser.add_argument("--system", type=int, default=0, metavar="BATCH", help="the whole, too")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    arguments = parser.parse_args()
    batches, to_compile = (
        [int(batch) for batch in text.split(",") if batch]
        for text in (arguments.batches, arguments.compile)
    )
    diffusers = not arguments.no_diffusers
    peak = matrix_peak()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {peak / 1e12:.0f} TFLOP/s")
    report = measured(peak, batches, to_compile, diffusers=diffusers, profiled=arguments.profile)
    report.show()
    if not arguments.no_xl:
        measured_xl(peak, diffusers=diffusers).show()
    if arguments.system:
        print_system(whole_system(arguments.system), arguments.system)


def measured(
    peak: float,
    batches: Sequence[int],
    to_compile: Sequence[int],
    *,
    diffusers: bool,
    profiled: bool,
) -> Report:
    """Stable Diffusion 1.5 every way."""
    report = Report("SD 1.5, 512 x 512, 20 guided steps", peak, work(stable_diffusion))
    with torch.inference_mode():
        parts = stable_diffusion("cuda")
        engine = by_engine(torch_runner(parts), parts)
        for batch in batches:
            report.add(batch, "this engine", rate(engine, batch))
        if profiled:
            print_profile(profile(engine, max(batches)), max(batches))
        stock = by_diffusers(parts)
        for batch in batches if diffusers else ():
            report.add(batch, "diffusers", rate(stock, batch))
    del parts, engine, stock
    torch.cuda.empty_cache()
    if to_compile:
        for batch, images_per_s in sorted(compiled_rates(to_compile).items()):
            report.add(batch, "diffusers, torch.compile", images_per_s)
    return report


def measured_xl(peak: float, *, diffusers: bool) -> Report:
    """SDXL at two batch sizes."""
    report = Report("SDXL, 1024 x 1024, 20 guided steps", peak, work(stable_diffusion_xl))
    with torch.inference_mode():
        parts = stable_diffusion_xl("cuda")
        for batch in (1, 8):
            report.add(batch, "this engine", rate(by_engine(torch_runner(parts), parts), batch))
            if diffusers:
                report.add(batch, "diffusers", rate(by_diffusers(parts), batch))
    return report


def print_profile(spent: dict[str, float], batch: int) -> None:
    """The longest first."""
    total = sum(spent.values())
    print(f"milliseconds of the GPU an image, batch {batch}: {total:.1f}")
    for kind, ms in sorted(spent.items(), key=lambda entry: -entry[1]):
        print(f"  {ms:5.1f}  {ms / total:4.0%}  {kind}")


def print_system(rounds: Sequence[tuple[float, float]], batch: int) -> None:
    """Medians."""
    ratio = statistics.median(through / alone for alone, through in rounds)
    alone, through = (statistics.median(figures) for figures in zip(*rounds, strict=True))
    print(
        f"whole system, microbatches of {batch}: {through:.2f} images/s; "
        f"engine alone {alone:.2f}; {ratio:.3f} of it (medians of {len(rounds)} rounds)"
    )


if __name__ == "__main__":
    main()
