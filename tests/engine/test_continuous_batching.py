"""Rows that come while others are drawn: when they begin, and that nobody's picture changes."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batcher import ContinuousBatch
from engine.requests import BatchRequest, Event, Image, Row, Step
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import (
    DEMO,
    Counting,
    alone,
    levels_apart,
    mishaps,
    pictures,
    psnr_db,
    row,
)


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, threads=2)


class Watched:
    """A company, what each call was told, and calls that come before a certain step."""

    def __init__(self, runner: object, *, max_unet_rows: int = 32) -> None:
        self.company = ContinuousBatch(runner, max_unet_rows=max_unet_rows)  # type: ignore[arg-type]
        self.told: dict[BatchRequest, list[Event]] = {}
        self.gone: dict[int, set[int]] = {}

    def join(self, *rows: Row) -> list[Event]:
        """What these rows will have been told, as a list that grows."""
        call = BatchRequest(rows, lambda: self.gone.get(id(told), set()))
        told = self.told[call] = []
        self.company.join(call)
        return told

    def withdraw(self, told: list[Event], *indices: int) -> None:
        self.gone[id(told)] = set(indices)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for call, event in self.company.step():
                self.told[call].append(event)

    def finish(self) -> None:
        while not self.company.is_empty():
            self.step()


LONG = {"num_inference_steps": 9}


def company_of(count: int, **changed: object) -> list[Row]:
    """Rows of every kind, that take from 6 steps to 9."""
    return [
        row(
            f"another {at}",
            seed=at,
            num_inference_steps=6 + at % 4,
            guidance_scale=[1.0, 3.0, 9.0][at % 3],
            scheduler=["euler", "dpmsolver++", "ddim"][at % 3],
            **changed,
        )
        for at in range(count)
    ]


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize(("company", "after"), [(1, 1), (3, 4), (7, 2)])
def test_a_row_that_joins_is_drawn_as_alone_and_so_is_its_company(
    runner, scheduler, company, after
):
    size = {"width": 64, "height": 96}
    wanted = row(scheduler=scheduler, num_inference_steps=5, **size)
    others = company_of(company, **size)
    watched = Watched(runner)
    first = watched.join(*others)
    watched.step(after)
    joined = watched.join(wanted)
    watched.finish()

    own = alone(runner, wanted)
    assert psnr_db(own, alone(runner, dataclasses.replace(wanted, seed=12))) < 30
    assert levels_apart(pictures(joined)[0], own) <= 1
    assert psnr_db(pictures(joined)[0], own) >= 40
    for at, other in enumerate(others):
        assert levels_apart(pictures(first)[at], alone(runner, other)) <= 1


def test_a_row_that_comes_takes_part_in_the_very_next_step(runner):
    counting = Counting(runner)
    watched = Watched(counting)
    watched.join(row(**LONG))
    watched.step(4)
    joined = watched.join(row(seed=3, num_inference_steps=2))
    watched.step()
    assert joined == [Step(0, 1, 2)]
    watched.finish()

    assert counting.batches == [2, 2, 2, 2, 4, 4, 2, 2, 2]
    assert list(pictures(joined)) == [0]


def test_a_row_that_finds_no_seat_gets_the_first_that_is_free(runner):
    counting = Counting(runner)
    watched = Watched(counting, max_unet_rows=4)
    watched.join(row(), row(seed=2, num_inference_steps=6))
    watched.step()
    joined = watched.join(row(seed=3, num_inference_steps=2))
    assert [call.rows[0].seed for call in watched.company.waiting()] == [3]
    watched.step(2)
    assert joined == []
    watched.step()
    assert joined == [Step(0, 1, 2)]
    assert not watched.company.waiting()
    watched.finish()

    assert counting.batches == [4, 4, 4, 4, 4, 2]


def test_another_size_waits_for_its_turn_and_is_not_overtaken(runner):
    watched = Watched(runner)
    watched.join(row(num_inference_steps=4))
    watched.step()
    wide = watched.join(row(width=128, num_inference_steps=2))
    narrow = watched.join(row(seed=2, num_inference_steps=2))
    watched.step(3)
    assert (wide, narrow) == ([], [])
    watched.step(2)
    assert [event for event in wide if isinstance(event, Step)] == [Step(0, 1, 2), Step(0, 2, 2)]
    assert narrow == []
    watched.finish()
    assert [pictures(told)[0].shape for told in (wide, narrow)] == [(64, 128, 3), (64, 64, 3)]


def test_a_narrow_row_does_not_pass_a_wide_one_of_an_earlier_call(runner):
    watched = Watched(runner, max_unet_rows=3)
    watched.join(row(num_inference_steps=3))
    wide = watched.join(row(num_inference_steps=1))
    narrow = watched.join(row(guidance_scale=1.0, num_inference_steps=1))
    watched.step(3)
    assert (wide, narrow) == ([], [])  # or a stream of narrow ones would keep it out for ever
    watched.step()
    assert (Step(0, 1, 1) in wide, Step(0, 1, 1) in narrow) == (True, True)


def test_a_row_can_be_withdrawn_while_it_waits_to_join(runner):
    counting = Counting(runner)
    watched = Watched(counting, max_unet_rows=2)
    watched.join(row(num_inference_steps=4))
    watched.step()
    waiting = watched.join(row(seed=2), row(seed=3, num_inference_steps=1))
    watched.step()
    watched.withdraw(waiting, 0)
    watched.step()
    assert mishaps(waiting) == {0: "canceled"}
    watched.finish()

    assert list(pictures(waiting)) == [1]
    assert counting.batches == [2] * 5


class Cramped(Counting):
    """The real networks in a memory that holds so many rows of the UNet."""

    def __init__(self, runner: TorchRunner, *, unet_rows: int) -> None:
        super().__init__(runner)
        self._unet_rows = unet_rows

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        if len(embeddings) > self._unet_rows:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return super().unet(latents, timesteps, embeddings)


def test_who_joins_where_there_is_no_memory_waits_for_it(runner):
    cramped = Cramped(runner, unet_rows=4)
    watched = Watched(cramped)
    wanted = [row(seed=1, num_inference_steps=4), row(seed=2, num_inference_steps=6)]
    first = watched.join(*wanted)
    watched.step()
    late = watched.join(row(seed=3))
    watched.step()  # finds no memory for three
    assert late == []
    assert [call.rows[0].seed for call in watched.company.waiting()] == [3]
    watched.finish()

    assert cramped.batches == [4, 4, 4, 4, 4, 4, 2]
    assert not mishaps([*first, *late])
    assert levels_apart(pictures(late)[0], alone(runner, row(seed=3))) <= 1
    for at, other in enumerate(wanted):
        assert levels_apart(pictures(first)[at], alone(runner, other)) <= 1


class Shrinking(Cramped):
    """A memory that others take from in mid-drawing."""

    def shrink(self, unet_rows: int) -> None:
        self._unet_rows = unet_rows


def test_who_has_to_wait_for_memory_goes_on_where_it_was(runner):
    shrinking = Shrinking(runner, unet_rows=4)
    watched = Watched(shrinking)
    watched.join(row(seed=1, num_inference_steps=6))
    late = watched.join(row(seed=2, num_inference_steps=5))
    watched.step(3)
    shrinking.shrink(2)
    watched.finish()

    steps = [event.step for event in late if isinstance(event, Step)]
    assert steps == [1, 2, 3, 4, 5]
    own = alone(runner, row(seed=2, num_inference_steps=5))
    assert levels_apart(pictures(late)[0], own) <= 1


def test_a_call_that_does_not_fit_alone_ends_and_the_next_is_drawn(runner):
    watched = Watched(Cramped(runner, unet_rows=4))
    large = watched.join(*[row()] * 3)
    small = watched.join(row())
    watched.finish()
    assert mishaps(large) == dict.fromkeys(range(3), "out_of_memory")
    assert list(pictures(small)) == [0]


class Failing(Counting):
    """The real networks with a bug that a wide batch meets."""

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        if len(embeddings) > 2:
            raise RuntimeError("a bug")
        return super().unet(latents, timesteps, embeddings)


def test_what_fails_takes_with_it_who_took_part_and_nobody_who_waits(runner):
    watched = Watched(Failing(runner))
    watched.join(row(seed=1))
    watched.step()
    watched.join(row(seed=2))
    waiting = watched.join(row(seed=3, width=128))
    with pytest.raises(RuntimeError, match="a bug"):
        watched.step()

    assert [call.rows[0].seed for call in watched.company.dissolve()] == [1, 2]
    watched.finish()
    assert [picture.shape for picture in pictures(waiting).values()] == [(64, 128, 3)]


def test_a_stream_of_calls_is_drawn_in_the_order_in_which_they_came(runner):
    watched = Watched(runner, max_unet_rows=8)
    rng = np.random.default_rng(7)
    told = []
    for seed in range(12):
        wide = {"width": 128} if rng.random() < 0.3 else {}
        steps, count = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        told.append(watched.join(*[row(seed=seed, num_inference_steps=steps, **wide)] * count))
        watched.step()
    began = []
    while not watched.company.is_empty():
        watched.step()
        began += [at for at, one in enumerate(told) if one and at not in began]
    assert began == sorted(began)
    for one in told:
        drawn = [event.index for event in one if isinstance(event, Image)]
        assert sorted(drawn) == list(range(len(drawn)))
        assert drawn
