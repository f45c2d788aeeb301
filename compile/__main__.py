"""`python -m compile MODEL`: Stable Diffusion as TensorRT plans in Triton's layout.

Each part (text encoders, UNet, VAE decoder) is exported to ONNX, compared with PyTorch, and built
into a plan. What is there already and fits is not made again, so an interrupted run goes on where
it was. Exit codes: 0 all made, 1 something could not be made, 2 it was asked for the impossible.
See docs/compile.md.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from darkroom.errors import DarkroomError
from darkroom.settings import HOME
from darkroom.storage import compiled_models

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. Returns the exit code; argparse leaves with 2 by itself."""
    asked = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from compile.build import BuildFailed  # torch takes seconds to load; --help should not
    from compile.conversion import ImpossibleSize
    from compile.export import ExportFailed
    from compile.parity import ParityFailed
    from compile.parts import UnsupportedModel
    from compile.sources import ModelNotFound
    from engine.tensorrt.api import TensorRTMissing

    try:
        _run(asked)
    except (ExportFailed, ParityFailed, BuildFailed, DarkroomError) as failure:
        print(f"compile: {failure}", file=sys.stderr)
        return EXIT_FAILED
    except (
        ModelNotFound,
        UnsupportedModel,
        ImpossibleSize,
        TensorRTMissing,
        FileNotFoundError,
    ) as refusal:
        print(f"compile: {refusal}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _run(asked: argparse.Namespace) -> None:
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from compile.conversion import Order, convert
    from compile.export import OPSETS
    from compile.parts import default_size
    from compile.sources import find_model

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    model_dir = find_model(asked.model, asked.revision)
    output = asked.output or str(HOME / "plans" / model_dir.resolve().name)
    repository = compiled_models.local_folder(output)
    tell = _teller()
    if compiled_models.is_url(output):
        tell(f"{compiled_models.pull(output, repository)} files fetched from {output}")
    repository.mkdir(parents=True, exist_ok=True)
    order = Order(
        model=asked.model,
        model_dir=model_dir,
        repository=repository,
        precision=asked.precision,
        rows=asked.rows,
        sizes=tuple(dict.fromkeys(asked.size or [default_size(model_dir)])),
        opsets=(asked.opset,) if asked.opset else OPSETS,
        builder=asked.builder,
        compute_capability=asked.compute_capability,
        dry_run=asked.dry_run,
        command=_command(asked, output),
    )
    try:
        convert(order, tell)
    finally:  # what was made is kept, also of a run that failed later
        if compiled_models.is_url(output):
            tell(f"{compiled_models.push(repository, output)} files sent to {output}")
    tell(f"done: {output}")


def _teller() -> Callable[[str], None]:
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - began:7.1f} s] {line}", flush=True)

    return tell


def _command(asked: argparse.Namespace, output: str) -> str:
    words = ["python", "-m", "compile", asked.model, "--precision", asked.precision]
    words += ["--rows", ",".join(map(str, asked.rows)), "--builder", asked.builder]
    if asked.size:
        words += ["--size", *(f"{width}x{height}" for width, height in asked.size)]
    for option in ("compute_capability", "revision", "opset"):
        if value := getattr(asked, option):
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--output", output])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, or a hub id")
    parser.add_argument("--revision", help="of the hub id: a commit, tag or branch")
    parser.add_argument(
        "--precision",
        choices=("float16", "float32"),
        type=_precision,
        default="float16",
        help="that the networks compute in, also fp16 and fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        default=(1, 16, 64),
        metavar="LEAST,BEST,MOST",
        help="rows of the UNet in one call; a guided picture takes two (default: 1,16,64)",
    )
    parser.add_argument(
        "--size",
        type=_size,
        nargs="+",
        action="extend",
        metavar="WIDTHxHEIGHT",
        help="of the pictures, in pixels; each has a profile of its own (default: the model's)",
    )
    parser.add_argument(
        "--builder",
        choices=("tensorrt", "tensorrt-rtx"),
        default="tensorrt",
        help="tensorrt needs the GPU that will run the plan; tensorrt-rtx is for consumer cards "
        "and needs none (default: %(default)s)",
    )
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="of the GPU that tensorrt-rtx builds for, as 8.9 (default: the GPU here)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER|s3://BUCKET/PREFIX",
        help="the Triton repository to write (default: plans/ and the model's name)",
    )
    parser.add_argument("--opset", type=int, choices=(23, 20), help="of ONNX (default: 23, or 20)")
    parser.add_argument("--threads", type=int, help="of PyTorch and onnxruntime (default: theirs)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="everything up to the plan, on any machine: ONNX, comparison, configuration",
    )
    return parser


def _precision(word: str) -> str:
    return {"fp16": "float16", "fp32": "float32"}.get(word, word)


def _rows(words: str) -> tuple[int, int, int]:
    numbers = [int(word) for word in words.split(",")]
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:  # noqa: PLR2004
        raise argparse.ArgumentTypeError("three rising numbers, as 2,16,64")
    return numbers[0], numbers[1], numbers[2]


def _size(word: str) -> tuple[int, int]:
    width, _, height = word.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{word!r} is no size like 512x768")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
