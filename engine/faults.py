"""Faults that tests inject into a model. Nothing happens without a DARKROOM_FAULT_… variable.

POISON, HANG, LOOP and RAISE each hold a word; a row whose prompt contains it triggers the fault in
the model's process: POISON kills it, HANG and LOOP never return, RAISE is a bug. MAX_ROWS is a
number: wider UNet batches run out of memory.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from engine.requests import Row

_PREFIX: Final = "DARKROOM_FAULT_"


def inject(rows: Sequence[Row]) -> None:
    """Trigger the fault that one of the prompts selects."""
    for name, fault in _FAULTS.items():
        word = os.environ.get(_PREFIX + name)
        if word and any(word in row.prompt for row in rows):
            fault()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    threading.Event().wait()


def _loop() -> None:
    while True:
        pass


def _raise() -> None:
    raise RuntimeError("a bug that only this prompt triggers")


_FAULTS: Final[Mapping[str, Callable[[], None]]] = {
    "POISON": _kill,
    "HANG": _hang,
    "LOOP": _loop,
    "RAISE": _raise,
}


def limit_rows(runner: Any) -> Any:
    """Return the runner, with limited memory if MAX_ROWS is set."""
    limit = os.environ.get(f"{_PREFIX}MAX_ROWS")
    return LimitedRunner(runner, unet_rows=int(limit)) if limit else runner


class LimitedRunner:
    """A runner whose memory holds `unet_rows` rows of the UNet."""

    def __init__(self, runner: Any, *, unet_rows: int) -> None:
        self._runner, self._unet_rows = runner, unet_rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """See NetworkRunner."""
        if len(embeddings) > self._unet_rows:
            raise torch.OutOfMemoryError(f"no room for {len(embeddings)} rows")
        output: Tensor = self._runner.unet(latents, timesteps, embeddings)
        return output
