"""How far a stage of training is: its time, its learning rate, its log, and where it left off."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

_WARM_UP_STEPS: Final = 400
_FLAT_SHARE: Final = 0.5  #: of a stage's time at the full rate; then a cosine down
_LAST_RATE: Final = 0.01
_LOG_EVERY_S: Final = 15.0

Log = Callable[[str], None]


class Stage:
    """Stage of training with a budget in seconds, counted over all its runs.

    The learning rate follows the time spent and not the steps made, so that any budget on any
    machine ends annealed.
    """

    def __init__(self, name: str, folder: Path, *, budget_s: float, log: Log) -> None:
        self.name = name
        self.budget_s = budget_s
        self.spent_s = 0.0
        self.step = 0
        self._log = log
        self._path = folder / f"{name}.pt"
        self._tick = time.monotonic()
        self._logged = self._tick
        self._logged_step = 0

    @property
    def done(self) -> bool:
        return self.spent_s >= self.budget_s

    @property
    def share(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(1.0, self.spent_s / self.budget_s)

    @property
    def rate(self) -> float:
        """Factor of the learning rates."""
        warm = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        fall = max(0.0, (self.share - _FLAT_SHARE) / (1 - _FLAT_SHARE))
        return warm * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * fall)) / 2)

    def begin(self) -> None:
        """Count from now on; what was compiled or drawn before is not training."""
        self._tick = self._logged = time.monotonic()

    def advance(self, loss: torch.Tensor) -> None:
        """One step is done. Now and then, say so: reading the loss waits for the device."""
        now = time.monotonic()
        self.spent_s += now - self._tick
        self._tick = now
        self.step += 1
        if now - self._logged >= _LOG_EVERY_S or self.step == 1 or self.done:
            speed = (self.step - self._logged_step) / max(1e-6, now - self._logged)
            self._log(
                f"{self.name}: step {self.step}, loss {float(loss.detach()):.4f}, "
                f"rate {self.rate:.3f}, {speed:.2f} steps/s, "
                f"{self.spent_s:.0f} of {self.budget_s:.0f} s"
            )
            self._logged, self._logged_step = now, self.step

    def save(self, content: Mapping[str, Any]) -> None:
        """Replace the checkpoint at once: a killed run leaves the last whole one."""
        unfinished = self._path.with_suffix(".tmp")
        torch.save({"spent_s": self.spent_s, "step": self.step, **content}, unfinished)
        unfinished.replace(self._path)

    def resume(self) -> dict[str, Any] | None:
        """Load the last checkpoint, if any; its time spent counts on."""
        if not self._path.exists():
            return None
        content: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        self.spent_s, self.step = content["spent_s"], content["step"]
        self._logged_step = self.step
        self._log(f"{self.name}: continuing at step {self.step}, after {self.spent_s:.0f} s")
        return content


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, *, step: int, decay: float) -> None:
    """Move an average of the weights towards them, faster in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    ours = [p.data for p in average.parameters()]
    theirs = [p.data for p in module.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - decay)
