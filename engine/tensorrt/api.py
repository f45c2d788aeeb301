"""Import of TensorRT's Python module, and the description of this machine's GPU."""

import importlib
from typing import Any, Final

import torch

from engine.tensorrt.plans import Builder, Machine

#: module name, and how to install it
_MODULES: Final[dict[Builder, tuple[str, str]]] = {
    "tensorrt": (
        "tensorrt",
        """\
NVIDIA's Triton image has the library, and
`pip install --extra-index-url https://pypi.nvidia.com tensorrt==VERSION` the module: use the
VERSION in the image""".replace("\n", " "),
    ),
    "tensorrt-rtx": (
        "tensorrt_rtx_bindings",
        "pip install tensorrt-rtx-cu12-libs tensorrt-rtx-cu12-bindings",
    ),
}


class TensorRTMissing(RuntimeError):
    """TensorRT cannot be imported; the message says how to install it."""


def import_tensorrt(builder: Builder) -> Any:
    """Import the module; both editions have the same API. Raises TensorRTMissing."""
    name, remedy = _MODULES[builder]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: the bindings are installed, a library is not
        raise TensorRTMissing(f"{builder} cannot be imported ({error}); {remedy}") from error


def this_machine(trt: Any, builder: Builder, device: int = 0) -> Machine | None:
    """Return what a plan must match to run here; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(
        builder=builder,
        builder_version=trt.__version__,
        compute_capability=f"{major}.{minor}",
        gpu=torch.cuda.get_device_name(device),
    )
