"""Continuous batching: rows enter the batch between two steps and leave as they finish.

An image is the same in any batch, up to rounding: one gray level of 255 in float32 on CPU.
"""

import itertools
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from engine.denoise import RunningRow, denoise_step, prepare, step_table_of
from engine.requests import (
    BatchRequest,
    Canceled,
    FinalEvent,
    Image,
    RowEvent,
    RowFailed,
    Step,
    admit,
    unet_rows,
)
from engine.runner import Decoding, NetworkRunner
from engine.schedulers import UnsupportedSchedule

GUIDED_UNET_ROWS: Final = 2
DECODE_BATCH: Final = 4  # images at a time: the VAE's activations dwarf the UNet's

logger = logging.getLogger(__name__)

RequestEvent = tuple[BatchRequest, RowEvent]
RequestFinalEvent = tuple[BatchRequest, FinalEvent]


@dataclass(frozen=True, eq=False)
class DecodingRows:
    """Rows that have done all their steps and are being decoded."""

    rows: list[RunningRow]
    decoding: Decoding


class ContinuousBatch:
    """The rows that share UNet batches of at most `max_unet_rows`, and the rows that wait.

    Requests start in the order in which they were added: none passes an earlier one that still
    waits, for room or because its images have another size. Not thread-safe.
    """

    def __init__(self, runner: NetworkRunner, *, max_unet_rows: int) -> None:
        """Raise ValueError when not even one guided row may run."""
        if max_unet_rows < GUIDED_UNET_ROWS:
            raise ValueError(
                f"max_unet_rows is {max_unet_rows}; one guided row takes {GUIDED_UNET_ROWS}"
            )
        self._runner = runner
        self._max_unet_rows = max_unet_rows
        self._fitting_unet_rows = max_unet_rows  # lowered when memory was short
        self._added: list[BatchRequest] = []
        self._waiting: list[RunningRow] = []
        self._running: list[RunningRow] = []
        self._decoding: list[DecodingRows] = []

    def add(self, request: BatchRequest) -> None:
        """Generate these rows from the next step on that has room for them."""
        self._added.append(request)

    def is_empty(self) -> bool:
        """Return whether no row is left."""
        return not (self._added or self._waiting or self._running or self._decoding)

    def waiting(self) -> Collection[BatchRequest]:
        """Return the requests of which no row is in the batch yet."""
        active = self._active()
        waiting = dict.fromkeys([*(row.request for row in self._waiting), *self._added])
        return [request for request in waiting if request not in active]

    def remove_suspects(self) -> Collection[BatchRequest]:
        """Remove and return the requests that may be why `step` raised."""
        suspects = dict.fromkeys([*self._active(), *self._added])
        removed = suspects or dict.fromkeys(row.request for row in self._waiting)
        self._running, self._decoding, self._added = [], [], []
        self._waiting = [row for row in self._waiting if row.request not in removed]
        return removed

    def _active(self) -> Collection[BatchRequest]:
        decoding = (row for decoding in self._decoding for row in decoding.rows)
        return dict.fromkeys(row.request for row in (*decoding, *self._running))

    def step(self) -> Iterator[RequestEvent]:
        """Run one step of all rows in the batch and yield its events. To be read to its end.

        When memory is short, the later half of the requests waits until others have finished. One
        that is alone fails with `out_of_memory`: fewer rows at once may fit.
        Raises what the networks raise.
        """
        try:
            for request, event in self._step():
                if not isinstance(event, Step):
                    request.unfinished.discard(event.index)
                yield request, event
        except torch.OutOfMemoryError as error:
            shortage = str(error)
        else:
            return
        # Not inside `except`: there, the error keeps the frames whose tensors fill the memory.
        torch.cuda.empty_cache()
        logger.warning(
            "out of memory with %d rows: %s; continuing with fewer", len(self._running), shortage
        )
        for request, event in self._shrink():
            request.unfinished.discard(event.index)
            yield request, event

    def _step(self) -> Iterator[RequestEvent]:
        yield from self._remove_canceled()
        yield from self._enqueue_added()
        self._start_waiting()
        stepping = [row for row in self._running if row.step < row.steps]
        if stepping:
            denoise_step(self._runner, stepping)
        yield from ((row.request, Step(row.index, row.step, row.steps)) for row in stepping)
        self._start_decoding()
        # With no step left to run, there is nothing better to do than to wait for images.
        yield from self._finish_decoded(wait=not (self._running or self._waiting or self._added))

    def _remove_canceled(self) -> Iterator[RequestFinalEvent]:
        rows = (*self._running, *self._waiting)
        requests = dict.fromkeys([*(row.request for row in rows), *self._added])
        canceled = {request: request.canceled() for request in requests}
        removed = [(row.request, row.index) for row in rows if row.index in canceled[row.request]]
        removed += [
            (request, index)
            for request in self._added
            for index in request.unfinished
            if index in canceled[request]
        ]
        self._running = [row for row in self._running if row.index not in canceled[row.request]]
        self._waiting = [row for row in self._waiting if row.index not in canceled[row.request]]
        for request, index in removed:
            yield request, Canceled(index)

    def _enqueue_added(self) -> Iterator[RequestFinalEvent]:
        """Append the rows of new requests to the waiting ones; fail those with invalid params."""
        while self._added:
            request = self._added[0]
            for index in sorted(request.unfinished):
                row = request.rows[index]
                try:
                    step_table = step_table_of(self._runner, row)
                except UnsupportedSchedule as error:
                    yield request, RowFailed(index, "invalid_params", str(error))
                    continue
                self._waiting.append(RunningRow(request, index, row, step_table))
            self._added.remove(request)

    def _start_waiting(self) -> None:
        """Start the waiting rows that fit: of the size that is running, in order of arrival."""
        if not self._running:
            self._fitting_unet_rows = self._max_unet_rows
        started: list[RunningRow] = []
        for _, group in itertools.groupby(self._waiting, key=lambda row: row.request):
            rows = list(group)
            size = next(row.size for row in (*self._running, *started, *rows))
            candidates = [row for row in rows if row.size == size]
            used = sum(unet_rows(row.row) for row in (*self._running, *started))
            free = self._fitting_unet_rows - used
            admitted = admit([row.row for row in candidates], free_unet_rows=free)
            started += [candidates[position] for position in admitted]
            if len(admitted) < len(rows):
                break
        self._waiting = [row for row in self._waiting if row not in started]
        self._running += started
        if new := [row for row in started if not row.is_prepared]:
            prepare(self._runner, new)

    def _start_decoding(self) -> None:
        """Start to decode the latents of rows that have done all their steps."""
        done = [row for row in self._running if row.step == row.steps]
        for first in range(0, len(done), DECODE_BATCH):
            chunk = done[first : first + DECODE_BATCH]
            decoding = self._runner.decode(torch.stack([row.latents for row in chunk]))
            self._decoding.append(DecodingRows(chunk, decoding))
            self._running = [row for row in self._running if row not in chunk]

    def _finish_decoded(self, *, wait: bool) -> Iterator[RequestFinalEvent]:
        """Yield the images that are ready. One with NaN or infinity fails instead."""
        for batch in [batch for batch in self._decoding if wait or batch.decoding.done()]:
            images = batch.decoding.images()
            self._decoding.remove(batch)
            for row, pixels in zip(batch.rows, images, strict=True):
                if pixels is None:
                    message = "the image has NaN or infinite values (numeric overflow)"
                    yield row.request, RowFailed(row.index, "not_finite", message)
                else:
                    yield row.request, Image(row.index, pixels)

    def _shrink(self) -> Iterator[RequestFinalEvent]:
        """Let fewer rows share the next step, after one that found too little memory."""
        requests = list(dict.fromkeys(row.request for row in self._running))
        if len(requests) > 1:
            for request in reversed(requests[(len(requests) + 1) // 2 :]):
                self._pause(request)
            return
        if self._decoding:  # finishing these frees their memory
            yield from self._finish_decoded(wait=True)
            return
        self._running = []
        self._waiting = [row for row in self._waiting if row.request not in requests]
        for request in requests:
            for index in sorted(request.unfinished):
                yield request, RowFailed(index, "out_of_memory", "not enough memory for this batch")

    def _pause(self, request: BatchRequest) -> None:
        """Make a request wait; its rows keep their latents and continue when others finish."""
        paused = [row for row in self._running if row.request is request]
        self._running = [row for row in self._running if row.request is not request]
        self._waiting = paused + self._waiting
        self._fitting_unet_rows = sum(unet_rows(row.row) for row in self._running)
