"""`python -m compile MODEL`: Stable Diffusion as TensorRT plans in Triton's layout.

Each part (text encoders, UNet, VAE decoder) is exported to ONNX, compared with PyTorch, and built
into a plan. Existing files that fit are kept, so an interrupted run continues where it stopped.
Exit codes: 0 all built, 1 a part failed, 2 the arguments or the model are not supported.
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
    """Run the command and return its exit code; argparse exits with 2 by itself."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from compile.build import BuildFailed  # torch takes seconds to load; --help should not
    from compile.conversion import UnsupportedSize
    from compile.export import ExportFailed
    from compile.parity import ParityFailed
    from compile.parts import UnsupportedModel
    from compile.sources import ModelNotFound
    from engine.tensorrt.api import TensorRTMissing

    try:
        _run(options)
    except (ExportFailed, ParityFailed, BuildFailed, DarkroomError) as error:
        print(f"compile: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (
        ModelNotFound,
        UnsupportedModel,
        UnsupportedSize,
        TensorRTMissing,
        FileNotFoundError,
    ) as error:
        print(f"compile: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _run(options: argparse.Namespace) -> None:
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from compile.conversion import CompileJob, convert
    from compile.export import OPSETS
    from compile.parts import default_size
    from compile.sources import find_model

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    model_dir = find_model(options.model, options.revision)
    output = options.output or str(HOME / "plans" / model_dir.resolve().name)
    repository = compiled_models.local_folder(output)
    log = _progress_log()
    if compiled_models.is_url(output):
        log(f"{compiled_models.pull(output, repository)} files downloaded from {output}")
    repository.mkdir(parents=True, exist_ok=True)
    job = CompileJob(
        model=options.model,
        model_dir=model_dir,
        repository=repository,
        precision=options.precision,
        rows=options.rows,
        sizes=tuple(dict.fromkeys(options.size or [default_size(model_dir)])),
        opsets=(options.opset,) if options.opset else OPSETS,
        builder=options.builder,
        compute_capability=options.compute_capability,
        dry_run=options.dry_run,
        command=_command(options, output),
    )
    try:
        convert(job, log)
    finally:  # keep finished parts also when a later one failed
        if compiled_models.is_url(output):
            log(f"{compiled_models.push(repository, output)} files uploaded to {output}")
    log(f"done: {output}")


def _progress_log() -> Callable[[str], None]:
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - started:7.1f} s] {line}", flush=True)

    return log


def _command(options: argparse.Namespace, output: str) -> str:
    words = ["python", "-m", "compile", options.model, "--precision", options.precision]
    words += ["--rows", ",".join(map(str, options.rows)), "--builder", options.builder]
    if options.size:
        words += ["--size", *(f"{width}x{height}" for width, height in options.size)]
    for option in ("compute_capability", "revision", "opset"):
        if value := getattr(options, option):
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--output", output])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, or a hub id")
    parser.add_argument("--revision", help="commit, tag or branch of the hub id")
    parser.add_argument(
        "--precision",
        choices=("float16", "float32"),
        type=_precision,
        default="float16",
        help="precision of the networks, also fp16 and fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        default=(1, 16, 64),
        metavar="MIN,OPT,MAX",
        help="UNet rows in one call; a guided image takes two (default: 1,16,64)",
    )
    parser.add_argument(
        "--size",
        type=_size,
        nargs="+",
        action="extend",
        metavar="WIDTHxHEIGHT",
        help="image sizes in pixels; each has a profile of its own (default: the model's)",
    )
    parser.add_argument(
        "--builder",
        choices=("tensorrt", "tensorrt-rtx"),
        default="tensorrt",
        help="tensorrt needs the GPU that will run the plan; tensorrt-rtx is for consumer GPUs "
        "and needs none (default: %(default)s)",
    )
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="compute capability that tensorrt-rtx builds for, such as 8.9 (default: this GPU's)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER|s3://BUCKET/PREFIX",
        help="Triton repository to write (default: plans/ and the model's name)",
    )
    parser.add_argument("--opset", type=int, choices=(23, 20), help="of ONNX (default: 23, or 20)")
    parser.add_argument("--threads", type=int, help="of PyTorch and onnxruntime (default: theirs)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="stop before the plans, on any machine: ONNX, comparison, configuration",
    )
    return parser


def _precision(word: str) -> str:
    return {"fp16": "float16", "fp32": "float32"}.get(word, word)


def _rows(words: str) -> tuple[int, int, int]:
    numbers = [int(word) for word in words.split(",")]
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:  # noqa: PLR2004
        raise argparse.ArgumentTypeError("must be three rising numbers, such as 2,16,64")
    return numbers[0], numbers[1], numbers[2]


def _size(word: str) -> tuple[int, int]:
    width, _, height = word.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{word!r} is not a size such as 512x768")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
