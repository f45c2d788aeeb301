"""Images per second on a GPU: diffusers as it comes, compiled, and this engine, in one run.

`python benchmarks/gpu.py [--batches 1,4,8,16,32] [--compile 1,4,8,16,32] [--no-xl] [--profile]`
draws with Stable Diffusion 1.5's architecture, 512 x 512, 20 guided steps, in half precision, and
then with XL's at 1024 x 1024. The weights are random: speed does not depend on them. Each figure is
the median of several drawings, text encoding and picture decoding included. Shares are of what a
large matrix product reaches here.

torch.compile takes a minute or two for each batch size. They compile beside each other, each in a
process of its own, and are then measured one after the other.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.draw import draw
from engine.rows import Picture, Row
from engine.schedulers import read_noise_schedule
from engine.texts import Texts, clip_encoders
from engine.torch_runner import TorchRunner

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "models/darkroom-demo/tokenizer"
STEPS = 20
GUIDANCE = 7.5
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MAX_UNET_ROWS = 64

Draw = Callable[[int], None]  #: so many images


@dataclass(frozen=True)
class Parts:
    """The networks of a model, as diffusers' and transformers' modules."""

    name: str
    size: int  #: of a picture, pixels each way
    unet: Any
    vae: Any
    tokenizers: list[Any]
    text_encoders: list[Any]


def stable_diffusion(device: str) -> Parts:
    """Version 1.5, with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, act_fn="silu"
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
                projection_dim=768,
                eos_token_id=49407,
            )
        )
    return _ready(Parts("SD 1.5", 512, unet, _vae(device, 0.18215), _tokenizers(1), [text]))


def stable_diffusion_xl(device: str) -> Parts:
    """With random weights, and the decoder that half precision suffices for."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        small = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
                projection_dim=768,
                eos_token_id=49407,
            )
        )
        large = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_attention_heads=20,
                num_hidden_layers=32,
                projection_dim=1280,
                eos_token_id=49407,
                hidden_act="gelu",
            )
        )
    parts = Parts("SDXL", 1024, unet, _vae(device, 0.13025), _tokenizers(2), [small, large])
    return _ready(parts)


def _vae(device: str, scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    with torch.device(device):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
            scaling_factor=scaling_factor,
            force_upcast=False,
        )


def _tokenizers(count: int) -> list[Any]:
    from transformers import CLIPTokenizer

    return [CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True) for _ in range(count)]


def _ready(parts: Parts) -> Parts:
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.half().eval().requires_grad_(False)
    return parts


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
        events = draw(runner, rows(parts, count), max_unet_rows=MAX_UNET_ROWS)
        assert sum(isinstance(event, Picture) for event in events) == count

    return paint


def torch_runner(parts: Parts) -> TorchRunner:
    """The engine's own runner of these networks."""
    device = torch.device("cuda")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(SCHEDULE, file)
        file.flush()
        schedule = read_noise_schedule(Path(file.name))
    return TorchRunner(
        texts=Texts(parts.tokenizers, clip_encoders(parts.text_encoders), device),
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


def work(make: Callable[[str], Parts]) -> float:
    """FLOP of one image, by diffusers' networks: two UNet rows a step, and its decoding."""
    from torch.utils.flop_counter import FlopCounterMode

    parts = make("meta")
    side = parts.size // 8
    config = parts.unet.config
    added = None
    if config.addition_embed_type:
        added = {
            "text_embeds": torch.empty(1, 1280, device="meta", dtype=torch.float16),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    latents = torch.empty(1, 4, side, side, device="meta", dtype=torch.float16)
    text = torch.empty(1, 77, config.cross_attention_dim, device="meta", dtype=torch.float16)
    with FlopCounterMode(display=False) as unet:
        parts.unet(
            latents,
            torch.empty(1, device="meta"),
            encoder_hidden_states=text,
            added_cond_kwargs=added,
        )
    with FlopCounterMode(display=False) as decoder:
        parts.vae.decode(latents)
    return float(2 * STEPS * unet.get_total_flops() + decoder.get_total_flops())


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
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    arguments = parser.parse_args()
    batches, to_compile = (
        [int(batch) for batch in text.split(",") if batch]
        for text in (arguments.batches, arguments.compile)
    )
    peak = matrix_peak()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {peak / 1e12:.0f} TFLOP/s")
    with torch.inference_mode():
        parts = stable_diffusion("cuda")
        report = Report("SD 1.5, 512 x 512, 20 guided steps", peak, work(stable_diffusion))
        engine = by_engine(torch_runner(parts), parts)
        for batch in batches:
            report.add(batch, "this engine", rate(engine, batch))
        spent = profile(engine, max(batches)) if arguments.profile else {}
        if not arguments.no_diffusers:
            stock = by_diffusers(parts)
            for batch in batches:
                report.add(batch, "diffusers", rate(stock, batch))
            del stock
    del parts, engine
    torch.cuda.empty_cache()
    if to_compile:
        for batch, images_per_s in sorted(compiled_rates(to_compile).items()):
            report.add(batch, "diffusers, torch.compile", images_per_s)
    if not arguments.no_xl:
        xl = measured_xl(peak, diffusers=not arguments.no_diffusers)
    report.show()
    if spent:
        total = sum(spent.values())
        print(f"milliseconds of the GPU an image, batch {max(batches)}: {total:.1f}")
        for kind, ms in sorted(spent.items(), key=lambda entry: -entry[1]):
            print(f"  {ms:5.1f}  {ms / total:4.0%}  {kind}")
    if not arguments.no_xl:
        xl.show()


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


if __name__ == "__main__":
    main()
