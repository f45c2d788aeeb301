"""Rows that join a running batch: when they start, and that no row's image changes."""

import dataclasses

import numpy as np
import pytest
from torch import Tensor

from engine.batcher import ContinuousBatch
from engine.requests import BatchRequest, Image, Row, RowEvent, Step
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import (
    DEMO,
    CountingRunner,
    LimitedMemoryRunner,
    alone,
    canceled_rows,
    failures,
    images,
    levels_apart,
    psnr_db,
    row,
)


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(DEMO, threads=2)


class RecordedBatch:
    """A continuous batch that records the events of each request."""

    def __init__(self, runner: object, *, max_unet_rows: int = 32) -> None:
        self.batch = ContinuousBatch(runner, max_unet_rows=max_unet_rows)  # type: ignore[arg-type]
        self.events: dict[BatchRequest, list[RowEvent]] = {}
        self.rows_to_cancel: dict[int, set[int]] = {}

    def add(self, *rows: Row) -> list[RowEvent]:
        """Return the list that the events of these rows are appended to."""
        request = BatchRequest(rows, lambda: self.rows_to_cancel.get(id(events), set()))
        events = self.events[request] = []
        self.batch.add(request)
        return events

    def cancel(self, events: list[RowEvent], *indices: int) -> None:
        self.rows_to_cancel[id(events)] = set(indices)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for request, event in self.batch.step():
                self.events[request].append(event)

    def finish(self) -> None:
        while not self.batch.is_empty():
            self.step()


LONG = {"num_inference_steps": 9}


def mixed_rows(count: int, **changed: object) -> list[Row]:
    """Return rows of every kind that take 6 to 9 steps."""
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
@pytest.mark.parametrize(("others_count", "after"), [(1, 1), (3, 4), (7, 2)])
def test_a_row_that_joins_does_not_change_any_image(runner, scheduler, others_count, after):
    size = {"width": 64, "height": 96}
    wanted = row(scheduler=scheduler, num_inference_steps=5, **size)
    others = mixed_rows(others_count, **size)
    batch = RecordedBatch(runner)
    first = batch.add(*others)
    batch.step(after)
    joined = batch.add(wanted)
    batch.finish()

    own = alone(runner, wanted)
    assert psnr_db(own, alone(runner, dataclasses.replace(wanted, seed=12))) < 30
    assert levels_apart(images(joined)[0], own) <= 1
    assert psnr_db(images(joined)[0], own) >= 40
    for at, other in enumerate(others):
        assert levels_apart(images(first)[at], alone(runner, other)) <= 1


def test_a_row_joins_at_the_next_step(runner):
    counting = CountingRunner(runner)
    batch = RecordedBatch(counting)
    batch.add(row(**LONG))
    batch.step(4)
    joined = batch.add(row(seed=3, num_inference_steps=2))
    batch.step()
    assert joined == [Step(0, 1, 2)]
    batch.finish()

    assert counting.batches == [2, 2, 2, 2, 4, 4, 2, 2, 2]
    assert list(images(joined)) == [0]


def test_a_row_without_room_starts_when_another_finishes(runner):
    counting = CountingRunner(runner)
    batch = RecordedBatch(counting, max_unet_rows=4)
    batch.add(row(), row(seed=2, num_inference_steps=6))
    batch.step()
    joined = batch.add(row(seed=3, num_inference_steps=2))
    assert [request.rows[0].seed for request in batch.batch.waiting()] == [3]
    batch.step(2)
    assert joined == []
    batch.step()
    assert joined == [Step(0, 1, 2)]
    assert not batch.batch.waiting()
    batch.finish()

    assert counting.batches == [4, 4, 4, 4, 4, 2]


def test_another_size_waits_and_is_not_overtaken(runner):
    batch = RecordedBatch(runner)
    batch.add(row(num_inference_steps=4))
    batch.step()
    wide = batch.add(row(width=128, num_inference_steps=2))
    narrow = batch.add(row(seed=2, num_inference_steps=2))
    batch.step(3)
    assert (wide, narrow) == ([], [])
    batch.step(2)
    assert [event for event in wide if isinstance(event, Step)] == [Step(0, 1, 2), Step(0, 2, 2)]
    assert narrow == []
    batch.finish()
    assert [images(events)[0].shape for events in (wide, narrow)] == [(64, 128, 3), (64, 64, 3)]


def test_an_unguided_row_does_not_pass_a_guided_one_of_an_earlier_request(runner):
    batch = RecordedBatch(runner, max_unet_rows=3)
    batch.add(row(num_inference_steps=3))
    wide = batch.add(row(num_inference_steps=1))
    narrow = batch.add(row(guidance_scale=1.0, num_inference_steps=1))
    batch.step(3)
    assert (wide, narrow) == ([], [])  # otherwise a stream of unguided rows starves it
    batch.step()
    assert (Step(0, 1, 1) in wide, Step(0, 1, 1) in narrow) == (True, True)


def test_a_row_can_be_canceled_while_it_waits(runner):
    counting = CountingRunner(runner)
    batch = RecordedBatch(counting, max_unet_rows=2)
    batch.add(row(num_inference_steps=4))
    batch.step()
    waiting = batch.add(row(seed=2), row(seed=3, num_inference_steps=1))
    batch.step()
    batch.cancel(waiting, 0)
    batch.step()
    assert canceled_rows(waiting) == [0]
    batch.finish()

    assert list(images(waiting)) == [1]
    assert counting.batches == [2] * 5


def test_a_request_that_joins_without_memory_waits(runner):
    low_memory = LimitedMemoryRunner(runner, unet_rows=4)
    batch = RecordedBatch(low_memory)
    wanted = [row(seed=1, num_inference_steps=4), row(seed=2, num_inference_steps=6)]
    first = batch.add(*wanted)
    batch.step()
    late = batch.add(row(seed=3))
    batch.step()  # out of memory with three rows
    assert late == []
    assert [request.rows[0].seed for request in batch.batch.waiting()] == [3]
    batch.finish()

    assert low_memory.batches == [4, 4, 4, 4, 4, 4, 2]
    assert not failures([*first, *late])
    assert levels_apart(images(late)[0], alone(runner, row(seed=3))) <= 1
    for at, other in enumerate(wanted):
        assert levels_apart(images(first)[at], alone(runner, other)) <= 1


class ShrinkingMemoryRunner(LimitedMemoryRunner):
    """Memory that shrinks during generation."""

    def shrink(self, unet_rows: int) -> None:
        self._unet_rows = unet_rows


def test_a_request_paused_for_memory_continues_at_its_step(runner):
    shrinking = ShrinkingMemoryRunner(runner, unet_rows=4)
    batch = RecordedBatch(shrinking)
    batch.add(row(seed=1, num_inference_steps=6))
    late = batch.add(row(seed=2, num_inference_steps=5))
    batch.step(3)
    shrinking.shrink(2)
    batch.finish()

    steps = [event.step for event in late if isinstance(event, Step)]
    assert steps == [1, 2, 3, 4, 5]
    own = alone(runner, row(seed=2, num_inference_steps=5))
    assert levels_apart(images(late)[0], own) <= 1


def test_a_request_that_does_not_fit_alone_fails_and_the_next_succeeds(runner):
    batch = RecordedBatch(LimitedMemoryRunner(runner, unet_rows=4))
    large = batch.add(*[row()] * 3)
    small = batch.add(row())
    batch.finish()
    assert failures(large) == dict.fromkeys(range(3), "out_of_memory")
    assert list(images(small)) == [0]


class FailingRunner(CountingRunner):
    """The real networks with a bug in wide batches."""

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        if len(embeddings) > 2:
            raise RuntimeError("a bug")
        return super().unet(latents, timesteps, embeddings)


def test_an_error_fails_the_active_requests_and_spares_the_waiting(runner):
    batch = RecordedBatch(FailingRunner(runner))
    batch.add(row(seed=1))
    batch.step()
    batch.add(row(seed=2))
    waiting = batch.add(row(seed=3, width=128))
    with pytest.raises(RuntimeError, match="a bug"):
        batch.step()

    assert [request.rows[0].seed for request in batch.batch.remove_suspects()] == [1, 2]
    batch.finish()
    assert [image.shape for image in images(waiting).values()] == [(64, 128, 3)]


def test_requests_start_in_order_of_arrival(runner):
    batch = RecordedBatch(runner, max_unet_rows=8)
    rng = np.random.default_rng(7)
    recorded: list[list[RowEvent]] = []
    for seed in range(12):
        wide = {"width": 128} if rng.random() < 0.3 else {}
        steps, count = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        recorded.append(batch.add(*[row(seed=seed, num_inference_steps=steps, **wide)] * count))
        batch.step()
    started = []
    while not batch.batch.is_empty():
        batch.step()
        started += [at for at, events in enumerate(recorded) if events and at not in started]
    assert started == sorted(started)
    for events in recorded:
        finished = [event.index for event in events if isinstance(event, Image)]
        assert sorted(finished) == list(range(len(finished)))
        assert finished
