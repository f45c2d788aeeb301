"""Who is drawn together: rows take their seats between two steps, and leave as they finish.

A picture is the same in any company, up to rounding: one grey level of 255 in float32 on CPU.
"""

import itertools
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from engine.denoise import RunningRow, make_ready, step_table_of, step_together
from engine.requests import BatchRequest, Event, Image, RowFailed, Step, admit, unet_rows
from engine.runner import Decoding, NetworkRunner
from engine.schedulers import UnsupportedSchedule

GUIDED_UNET_ROWS: Final = 2
DECODED_TOGETHER: Final = 4  # pictures at a time: the VAE's activations dwarf the UNet's

logger = logging.getLogger(__name__)

Said = tuple[BatchRequest, Event]  #: to whom, and what
Ended = tuple[BatchRequest, Image | RowFailed]


@dataclass(frozen=True, eq=False)
class DecodingRows:
    """Rows that have done all their steps, and are being decoded."""

    seats: list[RunningRow]
    decoding: Decoding


class ContinuousBatch:
    """The rows that share the UNet's batches, at most `max_unet_rows` of it, and those who wait.

    Calls take their seats in the order in which they came: nobody passes an earlier call that
    still waits, be it for seats or because its pictures have another size. Not to be shared
    between threads.
    """

    def __init__(self, runner: NetworkRunner, *, max_unet_rows: int) -> None:
        """Raises ValueError when not even one guided row may run."""
        if max_unet_rows < GUIDED_UNET_ROWS:
            raise ValueError(
                f"max_unet_rows is {max_unet_rows}; one guided row takes {GUIDED_UNET_ROWS}"
            )
        self._runner = runner
        self._max_unet_rows = max_unet_rows
        self._roomy_unet_rows = max_unet_rows  # so many fit into memory, as far as is known
        self._arrived: list[BatchRequest] = []
        self._waiting: list[RunningRow] = []
        self._running: list[RunningRow] = []
        self._developing: list[DecodingRows] = []

    def join(self, call: BatchRequest) -> None:
        """Have these rows drawn too, from the next step on in which there are seats for them."""
        self._arrived.append(call)

    def is_empty(self) -> bool:
        """Whether nothing is left to be done."""
        return not (self._arrived or self._waiting or self._running or self._developing)

    def waiting(self) -> Collection[BatchRequest]:
        """The calls none of whose rows has a seat yet."""
        taking_part = self._taking_part()
        waiting = dict.fromkeys([*(seat.call for seat in self._waiting), *self._arrived])
        return [call for call in waiting if call not in taking_part]

    def dissolve(self) -> Collection[BatchRequest]:
        """After `step` has raised: forget those who may be why, and say who they were."""
        suspects = dict.fromkeys([*self._taking_part(), *self._arrived])
        gone = suspects or dict.fromkeys(seat.call for seat in self._waiting)
        self._running, self._developing, self._arrived = [], [], []
        self._waiting = [seat for seat in self._waiting if seat.call not in gone]
        return gone

    def _taking_part(self) -> Collection[BatchRequest]:
        developing = (seat for one in self._developing for seat in one.seats)
        return dict.fromkeys(seat.call for seat in (*developing, *self._running))

    def step(self) -> Iterator[Said]:
        """One step of all who have a seat, and what it brings. To be read to its end.

        When the device's memory does not suffice, those who came last wait until others have
        left; a call that is alone then ends in Mishaps that say so: fewer rows together may fit.
        Raises what the networks raise.
        """
        try:
            for call, event in self._step():
                if not isinstance(event, Step):
                    call.left.discard(event.index)
                yield call, event
        except torch.OutOfMemoryError as error:
            shortage = str(error)
        else:
            return
        # Not inside `except`: there, the error keeps the frames whose tensors fill the memory.
        torch.cuda.empty_cache()
        logger.warning("%d rows together do not fit: %s", len(self._running), shortage)
        for call, event in self._make_room():
            call.left.discard(event.index)
            yield call, event

    def _step(self) -> Iterator[Said]:
        yield from self._let_leave()
        yield from self._receive()
        self._seat()
        stepping = [seat for seat in self._running if seat.step < seat.steps]
        if stepping:
            step_together(self._runner, stepping)
        yield from ((seat.call, Step(seat.index, seat.step, seat.steps)) for seat in stepping)
        self._develop()
        # With nobody left to step for, there is nothing better to do than to wait for pictures.
        yield from self._hand_out(wait=not (self._running or self._waiting or self._arrived))

    def _let_leave(self) -> Iterator[Ended]:
        """Those who are not wanted any more; before anything was done for them, if they are new."""
        calls = dict.fromkeys(seat.call for seat in (*self._running, *self._waiting))
        gone = {call: call.withdrawn() for call in (*calls, *self._arrived)}
        seats = (*self._running, *self._waiting)
        leaving = [(seat.call, seat.index) for seat in seats if seat.index in gone[seat.call]]
        leaving += [(call, at) for call in self._arrived for at in call.left if at in gone[call]]
        self._running = [seat for seat in self._running if seat.index not in gone[seat.call]]
        self._waiting = [seat for seat in self._waiting if seat.index not in gone[seat.call]]
        for call, index in leaving:
            yield call, RowFailed(index, "canceled", "canceled while drawing")

    def _receive(self) -> Iterator[Ended]:
        """The new ones get in line, but for what cannot be drawn at all."""
        while self._arrived:
            call = self._arrived[0]
            for index in sorted(call.left):
                row = call.rows[index]
                try:
                    step_table = step_table_of(self._runner, row)
                except UnsupportedSchedule as refusal:
                    yield call, RowFailed(index, "invalid_params", str(refusal))
                    continue
                self._waiting.append(RunningRow(call, index, row, step_table))
            self._arrived.remove(call)

    def _seat(self) -> None:
        """Whoever fits in takes a seat: of the size that is drawn now, in the order of the line."""
        if not self._running:
            self._roomy_unet_rows = self._max_unet_rows
        taken: list[RunningRow] = []
        for _, group in itertools.groupby(self._waiting, key=lambda seat: seat.call):
            line = list(group)
            size = next(seat.size for seat in (*self._running, *taken, *line))
            fitting = [seat for seat in line if seat.size == size]
            used = sum(unet_rows(seat.row) for seat in (*self._running, *taken))
            free = self._roomy_unet_rows - used
            admitted = admit([seat.row for seat in fitting], free_unet_rows=free)
            taken += [fitting[at] for at in admitted]
            if len(admitted) < len(line):
                break
        self._waiting = [seat for seat in self._waiting if seat not in taken]
        self._running += taken
        if new := [seat for seat in taken if not seat.is_ready]:
            make_ready(self._runner, new)

    def _develop(self) -> None:
        """Start to decode the latents of rows that are through."""
        done = [seat for seat in self._running if seat.step == seat.steps]
        for first in range(0, len(done), DECODED_TOGETHER):
            chunk = done[first : first + DECODED_TOGETHER]
            decoding = self._runner.decode(torch.stack([seat.latents for seat in chunk]))
            self._developing.append(DecodingRows(chunk, decoding))
            self._running = [seat for seat in self._running if seat not in chunk]

    def _hand_out(self, *, wait: bool) -> Iterator[Ended]:
        """The pictures that are ready. One that is not a number is said so, never shown."""
        for one in [one for one in self._developing if wait or one.decoding.done()]:
            pictures = one.decoding.pictures()
            self._developing.remove(one)
            for seat, pixels in zip(one.seats, pictures, strict=True):
                if pixels is None:
                    message = "the numbers of this picture overflowed"
                    yield seat.call, RowFailed(seat.index, "not_finite", message)
                else:
                    yield seat.call, Image(seat.index, pixels)

    def _make_room(self) -> Iterator[Ended]:
        """After a step that found too little memory: fewer share the next, or nobody is left."""
        calls = list(dict.fromkeys(seat.call for seat in self._running))
        if len(calls) > 1:
            self._pause(calls[-1])
            return
        if self._developing:  # what they take comes free
            yield from self._hand_out(wait=True)
            return
        self._running = []
        self._waiting = [seat for seat in self._waiting if seat.call not in calls]
        for call in calls:
            for index in sorted(call.left):
                yield call, RowFailed(index, "out_of_memory", "it does not fit into memory")

    def _pause(self, call: BatchRequest) -> None:
        """Its rows keep what they have reached, and go on when others have left."""
        paused = [seat for seat in self._running if seat.call is call]
        self._running = [seat for seat in self._running if seat.call is not call]
        self._waiting = paused + self._waiting
        self._roomy_unet_rows = sum(unet_rows(seat.row) for seat in self._running)
