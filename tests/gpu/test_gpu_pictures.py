"""Pictures drawn on a GPU: as diffusers draws them there, and the same in any company."""

import pytest
import torch

from engine.batcher import ContinuousBatch
from engine.generate import generate
from engine.requests import BatchRequest, Image, Pixels, Row, Step
from engine.torch_runner import TorchRunner
from tests.support import engine_requests
from tests.support.engine_requests import DEMO, by_diffusers, events, mishaps, psnr_db

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
    # of libraries, on their way to another version of themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

ALIKE_DB = 40.0


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, device="cuda", dtype="float16", threads=None)


def row(prompt: str = "a red apple", **changed: object) -> Row:
    usual = {"seed": 7, "num_inference_steps": 12, "guidance_scale": 4.0}
    return engine_requests.row(prompt, **(usual | {"width": 256, "height": 256} | changed))


def pictures(runner: TorchRunner, *rows: Row, max_unet_rows: int = 64) -> list[Pixels]:
    found = engine_requests.pictures(events(runner, *rows, max_unet_rows=max_unet_rows))
    return [found[index] for index in range(len(rows))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["single", "half"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_picture_is_the_one_diffusers_draws(runner, guidance_scale, dtype, record_property):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(
        DEMO, dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
    ).to("cuda")
    stock.set_progress_bar_config(disable=True)
    for prompt, seed in (("a red apple", 7), ("a castle at night", 59), ("three hearts", 3)):
        wanted = row(prompt, seed=seed, guidance_scale=guidance_scale)
        theirs = by_diffusers(stock, wanted)
        [ours] = pictures(runner, wanted)

        apart_db = psnr_db(ours, theirs)
        record_property(f"{prompt}, guidance {guidance_scale}", f"{apart_db:.1f} dB")
        assert apart_db >= ALIKE_DB


@pytest.mark.parametrize("company", [1, 2, 3, 7, 15, 31])
def test_a_seed_is_the_same_picture_in_any_company(runner, company, record_property):
    others = [
        row(
            f"number {at}",
            seed=at,
            num_inference_steps=4 + at % 7,
            guidance_scale=[4.0, 1.0, 7.0][at % 3] if company > 3 else 4.0,
        )
        for at in range(company)
    ]
    [alone] = pictures(runner, row())
    [elsewhere] = pictures(runner, row("a blue car"))
    accompanied = pictures(runner, *others, row())[-1]

    assert psnr_db(alone, elsewhere) < 30  # the model is not saying one thing to everybody
    apart_db = psnr_db(alone, accompanied)
    record_property("apart", f"{apart_db:.1f} dB")
    assert apart_db >= ALIKE_DB


@pytest.mark.parametrize("size", [(64, 64), (256, 128), (320, 192)])
def test_sizes_are_drawn_as_on_a_cpu(runner, size):
    width, height = size
    wanted = [row(width=width, height=height, seed=seed, num_inference_steps=4) for seed in (1, 2)]
    cpu = TorchRunner.load(DEMO, threads=None)
    for ours, theirs in zip(pictures(runner, *wanted), pictures(cpu, *wanted), strict=True):
        assert ours.shape == (height, width, 3)
        assert psnr_db(ours, theirs) >= ALIKE_DB


def test_rows_beyond_the_recorded_widths_are_drawn_too(runner):
    wanted = [row(seed=seed, num_inference_steps=2, width=64, height=64) for seed in range(40)]
    together = pictures(runner, *wanted, max_unet_rows=160)
    [alone] = pictures(runner, wanted[39])
    assert psnr_db(alone, together[39]) >= ALIKE_DB


def test_events_come_in_the_course_of_the_drawing(runner):
    happened = events(runner, row(num_inference_steps=2), row(num_inference_steps=30, seed=3))
    of_first = [event for event in happened if event.index == 0]
    assert of_first[:2] == [Step(0, 1, 2), Step(0, 2, 2)]
    assert isinstance(of_first[2], Image)
    assert happened.index(of_first[2]) < happened.index(Step(1, 30, 30))


def test_numbers_that_overflow_are_a_mishap_and_not_a_black_picture(runner):
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).cuda()
    latents[0] = float("inf")
    spoiled, sound = runner.decode(latents).pictures()
    assert spoiled is None
    assert sound is not None


def test_a_row_that_is_withdrawn_leaves_within_a_step(runner):
    gone: set[int] = set()
    seen = []
    rows = [row(num_inference_steps=40), row(seed=5)]
    for event in generate(runner, rows, max_unet_rows=8, withdrawn=lambda: gone):
        seen.append(event)
        if event == Step(0, 3, 40):
            gone.add(0)
    assert Step(0, 5, 40) not in seen
    assert mishaps(seen) == {0: "canceled"}
    assert [event.index for event in seen if isinstance(event, Image)] == [1]


@pytest.mark.parametrize("after", [1, 5])
def test_a_row_that_joins_is_drawn_as_alone_and_so_is_its_company(runner, after):
    others = [row(f"number {at}", seed=at, num_inference_steps=8 + at) for at in range(5)]
    company = ContinuousBatch(runner, max_unet_rows=32)
    calls = [BatchRequest(others), BatchRequest([row()])]
    told: dict[BatchRequest, list[Pixels]] = {call: [] for call in calls}
    company.join(calls[0])
    steps = 0
    while not company.is_empty():
        for call, event in company.step():
            if isinstance(event, Image):
                told[call].append(event.pixels)
        steps += 1
        if steps == after:
            company.join(calls[1])

    for ours, wanted in zip([*told[calls[0]], *told[calls[1]]], [*others, row()], strict=True):
        [alone] = pictures(runner, wanted)
        assert psnr_db(ours, alone) >= ALIKE_DB
