"""Generator of most rows: a process of its own, instant, and breakable by the prompt.

Standard library only, so that a dead one is replaced in the twinkling of an eye. One line of JSON
in, one line out; the image is one color, which follows from prompt and seed.
"""

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
SLOW = "slow:"  # `slow:1.5` takes that many seconds, once a microbatch


def color_of(prompt, seed):
    """Return the one color of the image of this prompt and seed."""
    return tuple(hashlib.sha256(f"{prompt}|{seed}".encode()).digest()[:3])


def _busy_loop():
    while True:
        pass


def _allocate():
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # the machine is not ours alone
    return bytearray(20 * 2**30)


POISONS = {
    "poison:kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "poison:segv": lambda: ctypes.string_at(0),
    "poison:hang": lambda: time.sleep(3600),
    "poison:spin": _busy_loop,
    "poison:hoard": _allocate,
    "poison:raise": lambda: sys.exit("a prompt that the model cannot bear"),
    "poison:worker": lambda: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(3600),
}


def generate(microbatch):
    """The colors, after whatever the prompts make happen."""
    prompts = [prompt for prompt, _ in microbatch]
    for word, swallow in POISONS.items():
        if any(word in prompt for prompt in prompts):
            swallow()
    time.sleep(max(_slowness(prompt) for prompt in prompts))
    return [color_of(prompt, seed) for prompt, seed in microbatch]


def _slowness(prompt):
    return float(prompt.partition(SLOW)[2].split()[0]) if SLOW in prompt else 0.0


def main():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(generate(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
