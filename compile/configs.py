"""Triton's configuration of a plan: `config.pbtxt`."""

from collections.abc import Iterable, Sequence
from typing import Final

from engine.tensorrt.plans import PLAN, Builder, Port, Profile

_TYPES: Final = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int32": "TYPE_INT32"}


def config_pbtxt(
    name: str,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    profiles: Sequence[Profile],
    builder: Builder,
) -> str:
    """Return the configuration of one part as a model; its rows are Triton's batch."""
    max_rows = max(profile.rows[2] for profile in profiles)
    indices = ", ".join(f'"{index}"' for index in range(len(profiles)))
    return f"""\
# Written by `python -m compile`. {_NOTES[builder]}
name: "{name}"
backend: "tensorrt"
default_model_filename: "{PLAN}"
max_batch_size: {max_rows}
input [{_tensors(inputs)}
]
output [{_tensors(outputs)}
]
dynamic_batching {{ }}
instance_group [ {{ kind: KIND_GPU count: 1 profile: [ {indices} ] }} ]
parameters [
  # Memory for one profile at a time, instead of all profiles at once.
  {{ key: "execution_context_allocation_strategy" value: {{ string_value: "ON_PROFILE_CHANGE" }} }}
]
"""


_NOTES: Final[dict[Builder, str]] = {
    "tensorrt": "engine.json records the TensorRT and the GPU that can run it.",
    "tensorrt-rtx": "Triton's backend cannot read it (TensorRT for RTX); Darkroom can.",
}


def _tensors(ports: Iterable[Port]) -> str:
    lines = (
        f'\n  {{ name: "{port.name}" data_type: {_TYPES[port.dtype]} {_dims(port)} }}'
        for port in ports
    )
    return ",".join(lines)


def _dims(port: Port) -> str:
    """Return the dims without rows, which Triton adds; a scalar per row has none of its own."""
    if len(port.dims) == 1:
        return "dims: [ 1 ] reshape { shape: [ ] }"
    dims = [str(dim) if isinstance(dim, int) else "-1" for dim in port.dims[1:]]
    return f"dims: [ {', '.join(dims)} ]"
