"""`python -m recipes.demo_model STEP`: one step towards the demo model (docs/demo-model.md)."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.demo_model.prompt_sets import HELD_OUT, SCORES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step; its help says what it reads and writes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked
    options = _parser().parse_args(arguments)
    from recipes.demo_model import steps  # torch takes seconds to load; --help should not

    step = getattr(steps, options.step.replace("-", "_"))
    step(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.demo_model", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--work",
        type=Path,
        default=Path("demo-output/model"),
        metavar="FOLDER",
        help="where everything is kept between the steps (default: %(default)s)",
    )
    shared.add_argument(
        "--smoke", action="store_true", help="run the step on a toy model, in seconds"
    )
    shared.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    shared.add_argument("--device", default=None, help="cuda or cpu (default: cuda if available)")

    def step(name: str, does: str) -> argparse.ArgumentParser:
        return steps.add_parser(name, help=does, description=does, parents=[shared])

    step("data", "fetch the packages, check them, write sprites.zip; print its digest")
    words = step("tokenizer", "learn the tokenizer from 300,000 captions, or take a model's")
    preview = step("preview", "a sheet of composed images and their captions")
    preview.add_argument("--count", type=int, default=64)
    train = step("train", "train `vae`, or `denoiser`: text encoder and UNet")
    train.add_argument("part", choices=("vae", "denoiser"))
    train.add_argument(
        "--seconds", type=float, default=1100.0, help="training time of this part, over all runs"
    )
    train.add_argument(
        "--gently", action="store_true", help="lower learning rates, for a trained model"
    )
    for continued in (words, train):
        continued.add_argument(
            "--start", type=Path, metavar="MODEL", help="the model to continue from"
        )
    for name, does, seconds in (
        ("polish", "train the decoder on latents as the UNet leaves them", 100.0),
        ("distil", "a UNet for 4 to 8 steps without guidance", 120.0),
    ):
        step(name, does).add_argument("--seconds", type=float, default=seconds)
    step("export", "write the model in diffusers' layout, in half precision")
    sample = step("sample", "a sheet of the 48 show prompts by one or more models")
    sample.add_argument("--out", type=Path, default=Path("sheet.png"))
    evaluate = step("evaluate", "the table of scores of one or more models")
    for reader in (sample, evaluate):
        reader.add_argument("models", type=Path, nargs="*", help="default: the exported one")
        reader.add_argument("--steps", type=int, nargs="+", default=[8])
        reader.add_argument("--guidance", type=float, default=4.0)
    evaluate.add_argument(
        "--sets", nargs="+", choices=(*SCORES, HELD_OUT), default=SCORES, help="of prompts"
    )
    evaluate.add_argument("--every", type=int, default=1, help="only every n-th prompt")
    evaluate.add_argument("--out", type=Path, default=None, help="the scores as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
