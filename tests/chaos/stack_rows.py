"""Faults of what generates: replicas, Ray's own processes, Triton and its Python backend."""

import signal
import time

from tests.chaos.run import FaultRun

STEPS = (("num_inference_steps", 20),)


def broken(
    run: FaultRun, *words: str, jobs: int, times: int = 1, sent: signal.Signals = signal.SIGKILL
) -> None:
    """A signal to the processes of these words in mid-drawing; how long until an urgent job ends.

    Each time with jobs of its own, so that none is there at three crashes.
    """
    for _ in range(times):
        load = run.load(jobs, prompts=["a red apple", "a dog"], largest=8, fields=STEPS)
        run.wait_for_running()
        time.sleep(run.rng.uniform(0.2, 0.8))
        run.injections += run.system.kill(*words, signal=sent)
        run.probe()
        assert run.quiet(load)
