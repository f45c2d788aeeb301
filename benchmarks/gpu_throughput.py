"""Images per second on a GPU: stock diffusers, compiled diffusers and this engine, in one run.

`python -m benchmarks.gpu_throughput [--batches 1,4,8,16,32] [--compile 1,4,8,16,32] [--no-xl]
[--profile] [--system 32]` generates with Stable Diffusion 1.5's architecture at 512 x 512, 20
guided steps, in half precision, and then with XL's at 1024 x 1024. The weights are random: speed
does not depend on them. Each figure is the median of several runs, with text encoding and image
decoding. Shares are of the rate of a large matrix product on this GPU.

torch.compile takes a minute or two for each batch size. They compile in parallel, each in its own
process, and are then measured one after the other.

`--system` measures the whole system: a temporary stack, from submission to the last image, in turn
with the engine alone in this process.
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
    flop_per_image,
    save,
    stable_diffusion,
    stable_diffusion_xl,
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

Generate = Callable[[int], None]  #: this many images


def by_diffusers(parts: Parts) -> Generate:
    """Return a function that runs the stock pipeline."""
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

    def run(count: int) -> None:
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

    return run


def by_engine(runner: Any, parts: Parts) -> Generate:
    """Return a function that runs this engine with one of its runners."""

    def run(count: int) -> None:
        events = generate(runner, rows(parts, count), max_unet_rows=MAX_UNET_ROWS)
        assert sum(isinstance(event, Image) for event in events) == count

    return run


def torch_runner(parts: Parts) -> TorchRunner:
    """Build the engine's own runner of these networks."""
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
    """Return `count` jobs, each with its own text."""
    return [
        Row(f"image {seed}", "", seed, STEPS, GUIDANCE, parts.size, parts.size)
        for seed in range(count)
    ]


def rate(run: Generate, count: int) -> float:
    """Measure images per second: the median of several runs, after a warm-up."""
    run(count)
    took: list[float] = []
    while len(took) < 2 or sum(took) < 2 or (len(took) < 3 and sum(took) < 6):
        torch.cuda.synchronize()
        began = time.monotonic()
        run(count)
        torch.cuda.synchronize()
        took.append(time.monotonic() - began)
    return count / statistics.median(took)


def compiled_rates(batches: Sequence[int]) -> dict[int, float]:
    """Measure diffusers' pipeline with UNet and decoder compiled for each batch size."""
    context = multiprocessing.get_context("spawn")
    all_compiled, one_at_a_time, results = (
        context.Barrier(len(batches)),
        context.Lock(),
        context.Queue(),
    )
    workers = [
        context.Process(target=_compiled_rate, args=(batch, all_compiled, one_at_a_time, results))
        for batch in batches
    ]
    for worker in workers:
        worker.start()
    rates = dict(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return rates


def _compiled_rate(batch: int, all_compiled: Any, one_at_a_time: Any, results: Any) -> None:
    parts = stable_diffusion("cuda")
    parts.unet.to(memory_format=torch.channels_last)
    parts.vae.to(memory_format=torch.channels_last)
    parts.unet.forward = torch.compile(parts.unet.forward, dynamic=False)
    parts.vae.decode = torch.compile(parts.vae.decode, dynamic=False)
    run = by_diffusers(parts)
    with torch.inference_mode():
        run(batch)
        all_compiled.wait()
        with one_at_a_time:
            results.put((batch, rate(run, batch)))


@torch.inference_mode()
def whole_system(batch: int) -> list[tuple[float, float]]:
    """Measure the engine alone and the whole system in turn: images per second, a pair a round."""
    parts = stable_diffusion("cuda")
    engine = by_engine(torch_runner(parts), parts)
    jobs = rows(parts, SYSTEM_MICROBATCHES * batch)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True)) as progress,
    ):
        model = Path(folder) / "models/random-weights"
        save(parts, model, max_microbatch=batch)
        os.environ |= {
            "DARKROOM_MODELS_DIR": str(model.parent),
            "DARKROOM_DEFAULT_MODEL": model.name,
            "DARKROOM_DEVICE": "cuda",
        }
        with stack(Path(folder) / "data") as address, Client(address) as client:
            system_rate(client, jobs[: 2 * batch], progress)
            rounds = []
            for _ in range(SYSTEM_ROUNDS):
                alone = rate(engine, batch)
                through, _ = system_rate(client, jobs, progress)
                rounds.append((alone, through))
                print(f"engine {alone:.2f}, system {through:.2f} images/s", file=sys.stderr)
    return rounds


def matrix_peak() -> float:
    """Measure the FLOP/s of a large half-precision matrix product."""
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


def profile(run: Generate, count: int) -> dict[str, float]:
    """Measure the GPU milliseconds of an image, by kind of kernel."""
    from torch.profiler import ProfilerActivity

    run(count)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        run(count)
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
    """Table of figures, which are also printed as they come."""

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
    """Measure and print the tables."""
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
    """Measure Stable Diffusion 1.5 in every way."""
    report = Report("SD 1.5, 512 x 512, 20 guided steps", peak, flop_per_image(stable_diffusion))
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
    """Measure SDXL at two batch sizes."""
    report = Report("SDXL, 1024 x 1024, 20 guided steps", peak, flop_per_image(stable_diffusion_xl))
    with torch.inference_mode():
        parts = stable_diffusion_xl("cuda")
        for batch in (1, 8):
            report.add(batch, "this engine", rate(by_engine(torch_runner(parts), parts), batch))
            if diffusers:
                report.add(batch, "diffusers", rate(by_diffusers(parts), batch))
    return report


def print_profile(spent: dict[str, float], batch: int) -> None:
    """Print the kernels' times, longest first."""
    total = sum(spent.values())
    print(f"GPU milliseconds per image, batch {batch}: {total:.1f}")
    for kind, ms in sorted(spent.items(), key=lambda entry: -entry[1]):
        print(f"  {ms:5.1f}  {ms / total:4.0%}  {kind}")


def print_system(rounds: Sequence[tuple[float, float]], batch: int) -> None:
    """Print the medians of the rounds."""
    ratio = statistics.median(through / alone for alone, through in rounds)
    alone, through = (statistics.median(figures) for figures in zip(*rounds, strict=True))
    print(
        f"whole system, microbatches of {batch}: {through:.2f} images/s; "
        f"engine alone {alone:.2f}; {ratio:.3f} of it (medians of {len(rounds)} rounds)"
    )


if __name__ == "__main__":
    main()
