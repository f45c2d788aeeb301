"""The images: those of diffusers, and the same in any batch."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.generate import generate
from engine.requests import Image, RowEvent, Step
from engine.runner import Decoded
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import (
    DEMO,
    CountingRunner,
    LimitedMemoryRunner,
    by_diffusers,
    canceled_rows,
    events,
    failures,
    images,
    levels_apart,
    row,
)


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, threads=2)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_an_image_is_that_of_diffusers(runner, guidance_scale):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(
        DEMO, dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    stock.set_progress_bar_config(disable=True)
    wanted = row(num_inference_steps=6, guidance_scale=guidance_scale, width=128, height=96)
    wanted = dataclasses.replace(wanted, negative_prompt="fog", prompt="a red rose " * 40)
    theirs = by_diffusers(stock, wanted)

    ours = images(events(runner, wanted))[0]

    assert ours.shape == (96, 128, 3)
    assert levels_apart(ours, theirs) <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("batch", [2, 4, 8])
def test_an_image_does_not_depend_on_its_batch(runner, scheduler, batch):
    wanted = row(scheduler=scheduler, width=128, height=128)
    others = [
        row(
            f"another {at}",
            seed=at,
            num_inference_steps=1 + at % 5,
            guidance_scale=[1.0, 3.0, 9.0][at % 3],
            scheduler=["euler", "dpmsolver++", "ddim"][at % 3],
            width=128,
            height=128,
        )
        for at in range(batch - 1)
    ]
    alone = images(events(runner, wanted))[0]
    batched = images(events(runner, *others, wanted))[batch - 1]

    other_seed = images(events(runner, dataclasses.replace(wanted, seed=12)))[0]
    assert levels_apart(alone, other_seed) > 50  # the images differ at all
    assert levels_apart(alone, batched) <= 1


def test_every_row_reports_its_steps_and_then_its_image(runner):
    happened = events(runner, row(num_inference_steps=2), row(num_inference_steps=4, seed=3))

    of_first = [event for event in happened if event.index == 0]
    assert of_first[:2] == [Step(0, 1, 2), Step(0, 2, 2)]
    assert isinstance(of_first[2], Image)
    assert len(of_first) == 3
    # the short row does not wait for the long one
    assert happened.index(of_first[2]) < happened.index(Step(1, 3, 4))


def test_an_unguided_row_costs_one_unet_row_and_a_guided_one_two(runner):
    counting = CountingRunner(runner)
    events(counting, row(guidance_scale=1.0), row(guidance_scale=0.0), row(guidance_scale=1.5))
    assert counting.batches == [4, 4, 4]


def test_rows_beyond_the_limit_wait_and_unguided_ones_pass(runner):
    counting = CountingRunner(runner)
    happened = events(
        counting,
        row(num_inference_steps=2),
        row(num_inference_steps=1),
        row(num_inference_steps=1, guidance_scale=1.0),
        max_unet_rows=3,
    )
    assert counting.batches == [3, 2, 2]
    assert list(images(happened)) == [2, 0, 1]


def test_a_row_with_invalid_params_does_not_fail_the_others(runner):
    happened = events(
        runner,
        row(scheduler="plms"),
        row(num_inference_steps=0),
        row(width=65),
        row(guidance_scale=float("nan")),
        row(),
    )
    assert failures(happened) == dict.fromkeys(range(4), "invalid_params")
    assert list(images(happened)) == [4]


def test_rows_of_two_sizes_are_both_generated(runner):
    found = images(events(runner, row(), row(width=128)))
    assert [image.shape for image in found.values()] == [(64, 64, 3), (64, 128, 3)]


class NanRunner(CountingRunner):
    """The real networks, but one row's output is NaN."""

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        output = super().unet(latents, timesteps, embeddings).clone()
        output[0] = float("nan")
        return output


def test_nan_latents_fail_only_their_row(runner):
    happened = events(NanRunner(runner), row(guidance_scale=1.0), row(guidance_scale=1.0, seed=2))

    assert failures(happened) == {0: "not_finite"}
    assert (
        levels_apart(
            images(happened)[1], images(events(runner, row(seed=2, guidance_scale=1.0)))[0]
        )
        <= 1
    )


def test_a_decoder_overflow_is_a_failure_and_not_a_black_image(runner):
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    latents[0] = float("inf")

    overflowed, finite = runner.decode(latents).images()

    assert overflowed is None
    assert finite is not None
    assert finite.shape == (64, 64, 3)


class OverflowingDecoder(CountingRunner):
    """The real networks, but the first image of each decoding overflows."""

    def __init__(self, runner: TorchRunner) -> None:
        super().__init__(runner)
        self.decode = lambda latents: Decoded([None, *runner.decode(latents).images()[1:]])


def test_an_image_that_overflows_in_the_decoder_fails_alone(runner):
    happened = events(OverflowingDecoder(runner), row(), row(seed=2))
    assert failures(happened) == {0: "not_finite"}
    assert list(images(happened)) == [1]


def cancel_first_after(
    step: int, happened: Iterator[RowEvent], canceled: set[int]
) -> list[RowEvent]:
    seen = []
    for event in happened:
        seen.append(event)
        if event == Step(0, step, 9):
            canceled.add(0)
    return seen


def test_a_canceled_row_leaves_before_its_next_step_and_the_others_stay(runner):
    canceled: set[int] = set()
    happened = cancel_first_after(
        2,
        generate(
            runner,
            [row(num_inference_steps=9), row(seed=5)],
            max_unet_rows=8,
            canceled=lambda: canceled,
        ),
        canceled,
    )
    assert Step(0, 3, 9) not in happened
    assert canceled_rows(happened) == [0]
    assert list(images(happened)) == [1]


def test_a_row_canceled_before_it_starts_costs_nothing(runner):
    counting = CountingRunner(runner)
    wanted = [row(guidance_scale=1.0), row(scheduler="plms")]
    happened = list(generate(counting, wanted, max_unet_rows=8, canceled=lambda: {0, 1}))

    assert canceled_rows(happened) == [0, 1]
    assert counting.batches == []


def test_the_unet_batch_becomes_smaller_when_a_row_is_canceled(runner):
    counting = CountingRunner(runner)
    canceled: set[int] = set()
    generation = generate(
        counting,
        [row(num_inference_steps=9), row(num_inference_steps=4, seed=5)],
        max_unet_rows=8,
        canceled=lambda: canceled,
    )
    happened = cancel_first_after(2, generation, canceled)

    assert counting.batches == [4, 4, 2, 2]
    alone = images(events(runner, row(num_inference_steps=4, seed=5)))[0]
    assert levels_apart(images(happened)[1], alone) <= 1


def test_rows_that_do_not_fit_into_memory_fail_and_fewer_succeed(runner):
    low_memory = LimitedMemoryRunner(runner, unet_rows=4)
    assert failures(events(low_memory, *[row()] * 3)) == dict.fromkeys(range(3), "out_of_memory")
    assert list(images(events(low_memory, *[row()] * 2))) == [0, 1]


def test_rows_that_finished_before_memory_was_short_stay_finished(runner):
    low_memory = LimitedMemoryRunner(runner, unet_rows=8, decoded=1)
    happened = events(low_memory, row(), row(num_inference_steps=1), row(scheduler="plms"), row())

    assert list(images(happened)) == [1]
    assert failures(happened) == {0: "out_of_memory", 2: "invalid_params", 3: "out_of_memory"}


def test_a_text_is_encoded_once(runner):
    first = runner.encode(["a new text", ""])
    again = runner.encode(["", "a new text"])
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[0])


def test_a_limit_below_one_guided_row_is_rejected(runner):
    with pytest.raises(ValueError, match="max_unet_rows"):
        events(runner, row(), max_unet_rows=1)


def test_no_rows_give_no_events(runner):
    assert events(runner) == []
