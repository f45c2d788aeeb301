"""TensorRT as a Python module: found, or else said where to get it; and the GPU it would run on."""

import importlib
from typing import Any, Final

import torch

from engine.tensorrt.plans import Builder, Machine

#: what to import, and what to do when it is not there
_MODULES: Final[dict[Builder, tuple[str, str]]] = {
    "tensorrt": (
        "tensorrt",
        """\
NVIDIA's Triton image has the library, and
`pip install --extra-index-url https://pypi.nvidia.com tensorrt==VERSION` the module: take the
VERSION that the image has""".replace("\n", " "),
    ),
    "tensorrt-rtx": (
        "tensorrt_rtx_bindings",
        "pip install tensorrt-rtx-cu12-libs tensorrt-rtx-cu12-bindings",
    ),
}


class TensorRTMissing(RuntimeError):
    """TensorRT cannot be imported; the message says how to get it."""


def import_tensorrt(builder: Builder) -> Any:
    """The module; both editions have the same API. Raises TensorRTMissing."""
    name, remedy = _MODULES[builder]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: the bindings are there, a library is not
        raise TensorRTMissing(f"{builder} cannot be imported ({error}); {remedy}") from error


def this_machine(trt: Any, builder: Builder, device: int = 0) -> Machine | None:
    """What a plan must fit to run here; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(
        builder=builder,
        builder_version=trt.__version__,
        compute_capability=f"{major}.{minor}",
        gpu=torch.cuda.get_device_name(device),
    )
