"""Images generated on a GPU: those of diffusers, and the same in any batch."""

import pytest
import torch

from engine.batcher import ContinuousBatch
from engine.generate import generate
from engine.requests import BatchRequest, Image, Pixels, Row, Step
from engine.torch_runner import TorchRunner
from tests.support import engine_requests
from tests.support.engine_requests import DEMO, by_diffusers, canceled_rows, events, psnr_db

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
    # raised inside the libraries
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

ALIKE_DB = 40.0


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, device="cuda", dtype="float16", threads=None)


def row(prompt: str = "a red apple", **changed: object) -> Row:
    usual = {"seed": 7, "num_inference_steps": 12, "guidance_scale": 4.0}
    return engine_requests.row(prompt, **(usual | {"width": 256, "height": 256} | changed))


def images(runner: TorchRunner, *rows: Row, max_unet_rows: int = 64) -> list[Pixels]:
    found = engine_requests.images(events(runner, *rows, max_unet_rows=max_unet_rows))
    return [found[index] for index in range(len(rows))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["single", "half"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_is_that_of_diffusers(runner, guidance_scale, dtype, record_property):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(
        DEMO, dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
    ).to("cuda")
    stock.set_progress_bar_config(disable=True)
    for prompt, seed in (("a red apple", 7), ("a castle at night", 59), ("three hearts", 3)):
        wanted = row(prompt, seed=seed, guidance_scale=guidance_scale)
        theirs = by_diffusers(stock, wanted)
        [ours] = images(runner, wanted)

        apart_db = psnr_db(ours, theirs)
        record_property(f"{prompt}, guidance {guidance_scale}", f"{apart_db:.1f} dB")
        assert apart_db >= ALIKE_DB


@pytest.mark.parametrize("others_count", [1, 2, 3, 7, 15, 31])
def test_a_seed_gives_the_same_image_in_any_batch(runner, others_count, record_property):
    others = [
        row(
            f"number {at}",
            seed=at,
            num_inference_steps=4 + at % 7,
            guidance_scale=[4.0, 1.0, 7.0][at % 3] if others_count > 3 else 4.0,
        )
        for at in range(others_count)
    ]
    [alone] = images(runner, row())
    [other_prompt] = images(runner, row("a blue car"))
    batched = images(runner, *others, row())[-1]

    assert psnr_db(alone, other_prompt) < 30  # the images differ at all
    apart_db = psnr_db(alone, batched)
    record_property("apart", f"{apart_db:.1f} dB")
    assert apart_db >= ALIKE_DB


@pytest.mark.parametrize("size", [(64, 64), (256, 128), (320, 192)])
def test_sizes_give_the_same_images_as_on_a_cpu(runner, size):
    width, height = size
    wanted = [row(width=width, height=height, seed=seed, num_inference_steps=4) for seed in (1, 2)]
    cpu = TorchRunner.load(DEMO, threads=None)
    for ours, theirs in zip(images(runner, *wanted), images(cpu, *wanted), strict=True):
        assert ours.shape == (height, width, 3)
        assert psnr_db(ours, theirs) >= ALIKE_DB


def test_batches_beyond_the_captured_ones_work(runner):
    wanted = [row(seed=seed, num_inference_steps=2, width=64, height=64) for seed in range(40)]
    together = images(runner, *wanted, max_unet_rows=160)
    [alone] = images(runner, wanted[39])
    assert psnr_db(alone, together[39]) >= ALIKE_DB


def test_events_arrive_during_generation(runner):
    happened = events(runner, row(num_inference_steps=2), row(num_inference_steps=30, seed=3))
    of_first = [event for event in happened if event.index == 0]
    assert of_first[:2] == [Step(0, 1, 2), Step(0, 2, 2)]
    assert isinstance(of_first[2], Image)
    assert happened.index(of_first[2]) < happened.index(Step(1, 30, 30))


def test_an_overflow_is_a_failure_and_not_a_black_image(runner):
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).cuda()
    latents[0] = float("inf")
    overflowed, finite = runner.decode(latents).images()
    assert overflowed is None
    assert finite is not None


def test_a_canceled_row_leaves_within_a_step(runner):
    to_cancel: set[int] = set()
    seen = []
    rows = [row(num_inference_steps=40), row(seed=5)]
    for event in generate(runner, rows, max_unet_rows=8, canceled=lambda: to_cancel):
        seen.append(event)
        if event == Step(0, 3, 40):
            to_cancel.add(0)
    assert Step(0, 5, 40) not in seen
    assert canceled_rows(seen) == [0]
    assert [event.index for event in seen if isinstance(event, Image)] == [1]


@pytest.mark.parametrize("after", [1, 5])
def test_a_row_that_joins_does_not_change_any_image(runner, after):
    others = [row(f"number {at}", seed=at, num_inference_steps=8 + at) for at in range(5)]
    batch = ContinuousBatch(runner, max_unet_rows=32)
    requests = [BatchRequest(others), BatchRequest([row()])]
    found: dict[BatchRequest, list[Pixels]] = {request: [] for request in requests}
    batch.add(requests[0])
    steps = 0
    while not batch.is_empty():
        for request, event in batch.step():
            if isinstance(event, Image):
                found[request].append(event.pixels)
        steps += 1
        if steps == after:
            batch.add(requests[1])

    for ours, wanted in zip(
        [*found[requests[0]], *found[requests[1]]], [*others, row()], strict=True
    ):
        [alone] = images(runner, wanted)
        assert psnr_db(ours, alone) >= ALIKE_DB
