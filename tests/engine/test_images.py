"""The pictures themselves: as diffusers draws them, and the same in any company."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.generate import generate
from engine.requests import Event, Image, Step
from engine.runner import Decoded, Decoding
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import (
    DEMO,
    Counting,
    by_diffusers,
    events,
    levels_apart,
    mishaps,
    pictures,
    row,
)


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, threads=2)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_picture_is_the_one_diffusers_draws(runner, guidance_scale):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(
        DEMO, dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    stock.set_progress_bar_config(disable=True)
    wanted = row(num_inference_steps=6, guidance_scale=guidance_scale, width=128, height=96)
    wanted = dataclasses.replace(wanted, negative_prompt="fog", prompt="a red rose " * 40)
    theirs = by_diffusers(stock, wanted)

    ours = pictures(events(runner, wanted))[0]

    assert ours.shape == (96, 128, 3)
    assert levels_apart(ours, theirs) <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("company", [2, 4, 8])
def test_a_picture_does_not_depend_on_its_company(runner, scheduler, company):
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
        for at in range(company - 1)
    ]
    alone = pictures(events(runner, wanted))[0]
    accompanied = pictures(events(runner, *others, wanted))[company - 1]

    elsewhere = pictures(events(runner, dataclasses.replace(wanted, seed=12)))[0]
    assert levels_apart(alone, elsewhere) > 50  # the model is not saying one thing to everybody
    assert levels_apart(alone, accompanied) <= 1


def test_every_row_reports_its_steps_and_then_its_picture(runner):
    happened = events(runner, row(num_inference_steps=2), row(num_inference_steps=4, seed=3))

    of_first = [event for event in happened if event.index == 0]
    assert of_first[:2] == [Step(0, 1, 2), Step(0, 2, 2)]
    assert isinstance(of_first[2], Image)
    assert len(of_first) == 3
    # the short row does not wait for the long one
    assert happened.index(of_first[2]) < happened.index(Step(1, 3, 4))


def test_an_unguided_row_costs_one_unet_row_and_a_guided_one_two(runner):
    counting = Counting(runner)
    events(counting, row(guidance_scale=1.0), row(guidance_scale=0.0), row(guidance_scale=1.5))
    assert counting.batches == [4, 4, 4]


def test_rows_beyond_the_limit_wait_for_a_seat_and_narrow_ones_pass(runner):
    counting = Counting(runner)
    happened = events(
        counting,
        row(num_inference_steps=2),
        row(num_inference_steps=1),
        row(num_inference_steps=1, guidance_scale=1.0),
        max_unet_rows=3,
    )
    assert counting.batches == [3, 2, 2]
    assert list(pictures(happened)) == [2, 0, 1]


def test_a_row_that_cannot_be_drawn_does_not_fail_its_company(runner):
    happened = events(
        runner,
        row(scheduler="plms"),
        row(num_inference_steps=0),
        row(width=65),
        row(guidance_scale=float("nan")),
        row(),
    )
    assert mishaps(happened) == dict.fromkeys(range(4), "invalid_params")
    assert list(pictures(happened)) == [4]


def test_rows_of_two_sizes_are_both_drawn(runner):
    drawn = pictures(events(runner, row(), row(width=128)))
    assert [picture.shape for picture in drawn.values()] == [(64, 64, 3), (64, 128, 3)]


class Poisoned(Counting):
    """The real networks, but one row's output stops being numbers."""

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        output = super().unet(latents, timesteps, embeddings).clone()
        output[0] = float("nan")
        return output


def test_latents_that_are_no_numbers_are_a_mishap_and_stay_with_their_row(runner):
    happened = events(Poisoned(runner), row(guidance_scale=1.0), row(guidance_scale=1.0, seed=2))

    assert mishaps(happened) == {0: "not_finite"}
    assert (
        levels_apart(
            pictures(happened)[1], pictures(events(runner, row(seed=2, guidance_scale=1.0)))[0]
        )
        <= 1
    )


def test_a_decoder_that_overflows_is_a_mishap_and_not_a_black_picture(runner):
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    latents[0] = float("inf")

    spoiled, sound = runner.decode(latents).pictures()

    assert spoiled is None
    assert sound is not None
    assert sound.shape == (64, 64, 3)


class Overexposed(Counting):
    """The real networks, but the first picture of each decoding overflows."""

    def __init__(self, runner: TorchRunner) -> None:
        super().__init__(runner)
        self.decode = lambda latents: Decoded([None, *runner.decode(latents).pictures()[1:]])


def test_a_picture_that_overflows_in_the_decoder_does_not_spoil_its_neighbour(runner):
    happened = events(Overexposed(runner), row(), row(seed=2))
    assert mishaps(happened) == {0: "not_finite"}
    assert list(pictures(happened)) == [1]


def cancelled_after(step: int, happened: Iterator[Event], cancelled: set[int]) -> list[Event]:
    seen = []
    for event in happened:
        seen.append(event)
        if event == Step(0, step, 9):
            cancelled.add(0)
    return seen


def test_a_cancelled_row_leaves_before_its_next_step_and_the_others_stay(runner):
    cancelled: set[int] = set()
    happened = cancelled_after(
        2,
        generate(
            runner,
            [row(num_inference_steps=9), row(seed=5)],
            max_unet_rows=8,
            withdrawn=lambda: cancelled,
        ),
        cancelled,
    )
    assert Step(0, 3, 9) not in happened
    assert mishaps(happened) == {0: "canceled"}
    assert list(pictures(happened)) == [1]


def test_a_row_that_is_canceled_before_it_begins_costs_nothing(runner):
    counting = Counting(runner)
    wanted = [row(guidance_scale=1.0), row(scheduler="plms")]
    happened = list(generate(counting, wanted, max_unet_rows=8, withdrawn=lambda: {0, 1}))

    assert mishaps(happened) == {0: "canceled", 1: "canceled"}
    assert counting.batches == []


def test_the_unet_batch_becomes_smaller_when_a_row_is_canceled(runner):
    counting = Counting(runner)
    cancelled: set[int] = set()
    drawing = generate(
        counting,
        [row(num_inference_steps=9), row(num_inference_steps=4, seed=5)],
        max_unet_rows=8,
        withdrawn=lambda: cancelled,
    )
    happened = cancelled_after(2, drawing, cancelled)

    assert counting.batches == [4, 4, 2, 2]
    alone = pictures(events(runner, row(num_inference_steps=4, seed=5)))[0]
    assert levels_apart(pictures(happened)[1], alone) <= 1


class Cramped(Counting):
    """The real networks in a memory that holds so many rows of the UNet, or of the decoder."""

    def __init__(self, runner: TorchRunner, *, unet_rows: int, decoded: int = 8) -> None:
        super().__init__(runner)
        self._unet_rows, self._decoded = unet_rows, decoded
        self.decode = self._decode

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        if len(embeddings) > self._unet_rows:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return super().unet(latents, timesteps, embeddings)

    def _decode(self, latents: Tensor) -> Decoding:
        if len(latents) > self._decoded:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return self.runner.decode(latents)


def test_rows_that_do_not_fit_into_memory_together_say_so_and_fewer_are_drawn(runner):
    cramped = Cramped(runner, unet_rows=4)
    assert mishaps(events(cramped, *[row()] * 3)) == dict.fromkeys(range(3), "out_of_memory")
    assert list(pictures(events(cramped, *[row()] * 2))) == [0, 1]


def test_who_had_ended_before_memory_was_short_stays_as_it_ended(runner):
    cramped = Cramped(runner, unet_rows=8, decoded=1)
    happened = events(cramped, row(), row(num_inference_steps=1), row(scheduler="plms"), row())

    assert list(pictures(happened)) == [1]
    assert mishaps(happened) == {0: "out_of_memory", 2: "invalid_params", 3: "out_of_memory"}


def test_a_text_is_encoded_once(runner):
    first = runner.encode(["a text not seen before", ""])
    again = runner.encode(["", "a text not seen before"])
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[0])


def test_a_limit_below_one_guided_row_is_refused(runner):
    with pytest.raises(ValueError, match="max_unet_rows"):
        events(runner, row(), max_unet_rows=1)


def test_nothing_to_draw_is_no_event(runner):
    assert events(runner) == []
